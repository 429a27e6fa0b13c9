package redirecttest

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/tests/netnstest"
)

// TestProxyRestarts kills and starts the proxy a hundred times under load, while
// no agent runs. In between nobody gets past it; each time the first connection
// after it listens is captured.
func TestProxyRestarts(t *testing.T) {
	const restarts, workers = 100, 2
	node := netnstest.NewNode(t)
	o := both(t, node)
	for _, b := range []redirect.Backend{redirect.BackendEBPF, redirect.BackendIPTables} {
		t.Run(string(b), func(t *testing.T) {
			t.Parallel()
			o := o
			o.Node = b
			o.Left = func(redirect.Backend) bool { return false }
			c, err := redirect.Choose(o)
			if err != nil {
				t.Fatal(err)
			}
			e := &env{T: t, node: node, pod: node.Pod(t, "pod"), peer: node.Pod(t, "peer")}
			e.w = workload(t, e.pod)
			any6 := netip.AddrPortFrom(netip.IPv6Unspecified(), appPort)
			e.pod.Serve(t, any6, "app")
			e.peer.Serve(t, any6, "peer")
			if err := errors.Join(c.Add(t.Context(), e.w), c.Close()); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			var served, refused atomic.Int64
			var load sync.WaitGroup
			for _, v4 := range []bool{true, false} {
				for _, out := range []bool{true, false} {
					e := &env{T: t, v4: v4, pod: e.pod, peer: e.peer}
					from, to := e.pod.Namespace, e.peerPort(appPort)
					if !out {
						from, to = e.peer.Namespace, e.podPort(appPort)
					}
					for range workers {
						load.Go(func() {
							for ctx.Err() == nil {
								switch a, err := e.try(from, to); {
								case err != nil:
									refused.Add(1)
								case a.Name != "proxy" || a.Orig != to:
									t.Errorf("connection to %s: %+v", to, a)
									return
								default:
									served.Add(1)
								}
							}
						})
					}
				}
			}
			var slowest time.Duration
			for range restarts {
				e.startProxy(tell) // kills the one before
				began := time.Now()
				for _, e.v4 = range []bool{true, false} {
					e.wantProxy(e.ask(e.pod.Namespace, e.peerPort(appPort)), redirect.OutboundPort, e.peerPort(appPort))
					e.wantProxy(e.ask(e.peer.Namespace, e.podPort(appPort)), redirect.InboundPort, e.podPort(appPort))
				}
				slowest = max(slowest, time.Since(began))
				if t.Failed() {
					break
				}
			}
			cancel()
			load.Wait()
			t.Logf("%d connections, %d without a proxy; the first four after a start took %v at most", served.Load(), refused.Load(), slowest)
			if served.Load() < restarts || refused.Load() == 0 {
				t.Error("that was no load")
			}
		})
	}
}

// try connects and reads the answer. It gives up before the kernel would send a
// SYN that was dropped for the second time.
func (e *env) try(from netnstest.Namespace, to netip.AddrPort) (answer, error) {
	c, err := e.dial(from, to, downTimeout)
	if err != nil {
		return answer{}, err
	}
	defer func() { _ = c.Close() }()
	ctx, cancel := context.WithTimeout(e.Context(), askTimeout)
	defer cancel()
	return readAnswer(ctx, c)
}
