package redirecttest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/tests/netnstest"
)

// probesMap is the map of the exempt connections that a backend may have.
const probesMap = "probes"

// startHostPod starts a process that belongs to a pod on the node's network: it
// is in the node's namespace and in a cgroup that a kubelet makes for pods. The
// test's own process, in no such cgroup, is the kubelet.
func startHostPod(tb testing.TB, node *netnstest.Node) *proxy {
	tb.Helper()
	return StartDialer(tb, node.Namespace, filepath.Join(netnstest.NewCgroup(tb), "kubepods", "besteffort", "pod1")).proxy
}

func probeCases() []testCase {
	return []testCase{
		{name: "probe/node", proxy: tell, run: func(e *env) {
			probes, captured := e.count(redirect.Inbound, "bypassed", "host_probe"), e.count(redirect.Inbound, "redirected", "")
			e.wantBare(e.ask(e.node.Namespace, e.podPort(appPort)), "app")
			if got := e.count(redirect.Inbound, "bypassed", "host_probe") - probes; got != 1 {
				e.Errorf("counted %d probes, want 1", got)
			}
			if got := e.count(redirect.Inbound, "redirected", "") - captured; got != 0 {
				e.Errorf("counted %d captured connections, want none", got)
			}
		}},
		{name: "probe/pod on the node's network", proxy: tell, run: func(e *env) {
			e.wantFromHostPod()
		}},
		{name: "probe/others", proxy: tell, run: func(e *env) {
			// In no pod's cgroup, but not in the node's namespace either.
			r := e.node.Remote(e, "remote")
			e.wantInbound(e.ask(e.peer.Namespace, e.podPort(appPort)), e.podPort(appPort), e.peerAddr())
			e.wantInbound(e.ask(r.Namespace, e.podPort(appPort)), e.podPort(appPort), e.family(r.Addrs()...))
		}},
		{name: "probe/port without a server", proxy: tell, run: func(e *env) {
			c, err := e.dial(e.node.Namespace, e.podPort(9), askTimeout)
			if !errors.Is(err, unix.ECONNREFUSED) {
				e.Errorf("connect: got %v, want ECONNREFUSED from the app's side", err)
			}
			if err == nil {
				_ = c.Close()
			}
			e.wantInbound(e.ask(e.peer.Namespace, e.podPort(9)), e.podPort(9), e.peerAddr())
		}},
		{name: "probe/node's own pods only", proxy: tell, run: func(e *env) {
			e.wantBare(e.ask(e.node.Namespace, e.peerPort(appPort)), "peer")
		}},
		{
			name: "probe/excluded and health ports", proxy: tell,
			policy: func(e *env, p *redirect.Policy) { p.Inbound.ExcludePorts.List = []uint16{appPort} },
			run: func(e *env) {
				probes := e.count(redirect.Inbound, "bypassed", "host_probe")
				e.serve(e.pod.Namespace, redirect.HealthPort, "health")
				e.wantBare(e.ask(e.node.Namespace, e.podPort(redirect.HealthPort)), "health")
				e.wantBare(e.ask(e.node.Namespace, e.podPort(appPort)), "app")
				for _, reason := range []string{"excluded_port", "health_port"} {
					if got := e.count(redirect.Inbound, "bypassed", reason); got != 1 {
						e.Errorf("%s: counted %d, want 1", reason, got)
					}
				}
				if got := e.count(redirect.Inbound, "bypassed", "host_probe") - probes; got != 0 {
					e.Errorf("counted %d probes, want none", got)
				}
			},
		},
		{name: "probe/no proxy", run: func(e *env) {
			// Whether the app lives does not depend on the proxy.
			e.wantBare(e.ask(e.node.Namespace, e.podPort(appPort)), "app")
			e.wantDown(e.peer.Namespace, e.podPort(appPort))
			if a, err := e.hostPod.dial(e.podPort(appPort), netip.Addr{}); err == nil {
				e.Errorf("a pod on the node's network reached %q without the proxy", a.Name)
			}
		}},
		{name: "probe/sockets of all kinds", proxy: tell, run: func(e *env) {
			for name, s := range map[string]socket{
				"blocking":     {domain: e.domain()},
				"non-blocking": {domain: e.domain(), nonblocking: true},
				"mapped":       {domain: unix.AF_INET6},
			} {
				if s.domain == unix.AF_INET6 && e.v4 && name != "mapped" {
					continue
				}
				fd := e.rawSocket(e.node.Namespace, s)
				if err := rawConnect(e.node.Namespace, fd, sockaddr(s.domain, e.podPort(appPort))); err != nil {
					e.Fatalf("%s: connect: %v", name, err)
				}
				e.wantBare(e.answer(e.conn(fd)), "app")
			}
			fd := e.rawSocket(e.node.Namespace, socket{domain: e.domain()})
			err := e.node.Do(func() error {
				return unix.Sendto(fd, []byte("hello"), unix.MSG_FASTOPEN, sockaddr(e.domain(), e.podPort(appPort)))
			})
			if err != nil {
				e.Fatalf("send with MSG_FASTOPEN: %v", err)
			}
			e.wantBare(e.answer(e.conn(fd)), "app")

			var d net.Dialer
			d.SetMultipathTCP(true)
			ctx, cancel := context.WithTimeout(e.Context(), askTimeout)
			defer cancel()
			c, err := e.node.DialWith(ctx, d, "tcp", e.podPort(appPort).String())
			if err != nil {
				e.Fatal(err)
			}
			defer func() { _ = c.Close() }()
			e.wantBare(e.answer(c), "app")
		}},
		{name: "probe/server's TIME_WAIT", proxy: tell, run: func(e *env) {
			// The app closes first, the client uses its port again at once.
			e.closeFirst(8081)
			before := e.count(redirect.Inbound, "redirected", "")
			for i := range 5 {
				a, err := e.askFrom(e.node.Namespace, 34567, e.podPort(8081))
				if err != nil {
					e.Fatalf("connection %d: %v", i, err)
				}
				e.wantBare(a, "closes first")
			}
			if got := e.count(redirect.Inbound, "redirected", "") - before; got != 0 {
				e.Errorf("%d were captured", got)
			}
		}},
		{name: "probe/SYN cookies", proxy: tell, run: func(e *env) {
			e.pod.Sysctl(e, "net/ipv4/tcp_syncookies", "2")
			e.probeMany(200)
			e.wantFromHostPod()
		}},
		{name: "probe/a thousand, beside others", proxy: tell, run: func(e *env) {
			before := e.count(redirect.Inbound, "bypassed", "host_probe")
			e.probeMany(1000)
			if got := e.count(redirect.Inbound, "bypassed", "host_probe") - before; got < 1000 {
				e.Errorf("counted %d probes, want 1000", got)
			}
			e.wantFromHostPod()
			e.wantEmpty(probesMap)
		}},
		{
			name: "probe/lives on without redirection", byHand: true,
			skip: map[redirect.Backend]string{
				redirect.BackendIPTables: "the node's NAT ends with its last rule, unless others such as kube-proxy have some",
			},
			run: func(e *env) {
				e.add(nil)
				c, a := e.connect(e.node.Namespace, e.podPort(appPort))
				e.wantBare(a, "app")
				if err := e.r.Remove(e.Context(), e.w.ID); err != nil {
					e.Fatalf("remove: %v", err)
				}
				e.wantAlive(c)
			},
		},
		{name: "probe/last pod goes", byHand: true, run: func(e *env) {
			node := e.nodeRules()
			e.add(nil)
			other := workload(e, e.node.Pod(e, "other"))
			if err := e.r.Add(e.Context(), other); err != nil {
				e.Fatalf("add another: %v", err)
			}
			if err := e.r.Remove(e.Context(), other.ID); err != nil {
				e.Fatalf("remove it: %v", err)
			}
			e.wantBare(e.ask(e.node.Namespace, e.podPort(appPort)), "app")
			if err := e.r.Remove(e.Context(), e.w.ID); err != nil {
				e.Fatalf("remove: %v", err)
			}
			if diff := node.Diff(e.nodeRules()); diff != "" {
				e.Errorf("the node is not as before:\n%s", diff)
			}
		}},
	}
}

// nodeRules returns the packet filter rules of the node.
func (e *env) nodeRules() netnstest.State {
	e.Helper()
	return rules(e.node.State(e))
}

// rules returns what of a state are packet filter rules.
func rules(s netnstest.State) netnstest.State {
	return slices.DeleteFunc(s, func(line string) bool { return !strings.HasPrefix(line, "ip") })
}

// wantFromHostPod checks that a pod on the node's network is a client like any.
func (e *env) wantFromHostPod() {
	e.Helper()
	a, err := e.hostPod.dial(e.podPort(appPort), netip.Addr{})
	if err != nil {
		e.Fatalf("from a pod on the node's network: %v", err)
	}
	e.wantInbound(a, e.podPort(appPort), e.family(e.node.Addr4(), e.node.Addr6()))
}

// probeMany opens n short connections from the node, and as many from a pod on
// its network as fit beside them.
func (e *env) probeMany(n int) {
	e.Helper()
	done := make(chan struct{})
	var others sync.WaitGroup
	others.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
			}
			if a, err := e.hostPod.dial(e.podPort(appPort), netip.Addr{}); err != nil || a.Name != "proxy" {
				e.Errorf("a pod on the node's network reached %q: %v", a.Name, err)
				return
			}
		}
	})
	var probes sync.WaitGroup
	for range 20 {
		probes.Go(func() {
			for range n / 20 {
				ctx, cancel := context.WithTimeout(e.Context(), askTimeout)
				a, err := e.node.Ask(ctx, e.podPort(appPort))
				cancel()
				if err != nil || a.Name != "app" {
					e.Errorf("a probe reached %q: %v", a.Name, err)
					return
				}
			}
		})
	}
	probes.Wait()
	close(done)
	others.Wait()
}

// wantEmpty waits until a backend has nothing left in a map, if it has that map.
func (e *env) wantEmpty(name string) {
	e.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(askTimeout); ; <-tick.C {
		usage, err := e.r.(redirect.Meter).MapUsage(e.Context())
		if err != nil {
			e.Fatal(err)
		}
		left := 0
		for _, u := range usage {
			if u.Name == name {
				left = u.Entries
			}
		}
		if left == 0 {
			return
		}
		if time.Now().After(deadline) {
			e.Fatalf("%d entries are left in map %s", left, name)
		}
	}
}

// closeFirst serves a port of the pod and closes each connection before the
// client does.
func (e *env) closeFirst(port uint16) {
	e.Helper()
	l, err := e.pod.Listen(e.Context(), "tcp", netip.AddrPortFrom(e.unspecified(), port).String())
	if err != nil {
		e.Fatal(err)
	}
	e.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_ = json.NewEncoder(c).Encode(answer{Answer: netnstest.Answer{Name: "closes first"}})
			_ = c.Close()
		}
	}()
}

// askFrom connects from a fixed port and closes after the server has.
func (e *env) askFrom(from netnstest.Namespace, port uint16, to netip.AddrPort) (a answer, err error) {
	ctx, cancel := context.WithTimeout(e.Context(), askTimeout)
	defer cancel()
	d := net.Dialer{
		LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(e.unspecified(), port)),
		Control:   reuseAddr,
	}
	c, err := from.DialWith(ctx, d, "tcp", to.String())
	if err != nil {
		return a, err
	}
	defer func() { _ = c.Close() }()
	if a, err = readAnswer(ctx, c); err != nil {
		return a, err
	}
	// The end of what the server sends: its FIN came before ours.
	if _, err := netnstest.ReadLine(ctx, c); err == nil {
		return a, fmt.Errorf("connection to %s: the server did not close", to)
	}
	return a, nil
}

// reuseAddr sets SO_REUSEADDR.
func reuseAddr(_, _ string, c syscall.RawConn) error {
	var err error
	ctrl := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
	return errors.Join(ctrl, err)
}
