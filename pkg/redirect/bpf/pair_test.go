package bpf

import (
	"context"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sluicemesh/sluice/tests/netnstest"
)

// newPair makes a node with the pod that a test redirects, in which an application
// and what stands for Envoy listen, and a peer, in which only an application does.
// They answer with "app", "proxy" and "peer".
func newPair(tb testing.TB) (pod, peer *netnstest.Pod) {
	tb.Helper()
	node := netnstest.NewNode(tb)
	pod, peer = node.Pod(tb, "pod"), node.Pod(tb, "peer")
	proxy(tb, pod)
	pod.Serve(tb, app(pod), "app")
	peer.Serve(tb, app(peer), "peer")
	return pod, peer
}

// app is where the application of a pod of newPair listens.
func app(p *netnstest.Pod) netip.AddrPort { return netip.AddrPortFrom(p.Addr4, 80) }

// A load is connections both ways of a pair, one after the other without pause. The
// test fails unless the proxy answers each.
type load struct {
	asked atomic.Int64
	stop  context.CancelFunc
	ends  sync.WaitGroup
}

func startLoad(t *testing.T, pod, peer *netnstest.Pod) *load {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	l := &load{stop: cancel}
	for _, way := range []struct{ from, to *netnstest.Pod }{{pod, peer}, {peer, pod}} {
		l.ends.Go(func() {
			for ctx.Err() == nil {
				c, cancel := context.WithTimeout(t.Context(), 20*time.Second)
				a, err := way.from.Ask(c, app(way.to))
				cancel()
				if err != nil || a.Name != "proxy" {
					t.Errorf("connect to %s: %+v, %v", app(way.to), a, err)
					return
				}
				l.asked.Add(1)
			}
		})
	}
	t.Cleanup(l.end)
	return l
}

// more has meanwhile done again and again until so many connections more were made.
func (l *load) more(t *testing.T, count int64, meanwhile func()) {
	t.Helper()
	want := l.asked.Load() + count
	for deadline := time.Now().Add(20 * time.Second); l.asked.Load() < want && !t.Failed(); meanwhile() {
		if time.Now().After(deadline) {
			t.Fatal("the load makes no progress")
		}
	}
}

func (l *load) end() {
	l.stop()
	l.ends.Wait()
}
