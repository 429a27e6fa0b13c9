package redirecttest

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/tests/netnstest"
)

// neighbourCases are pods beside pods, containers beside containers, the pod
// beside itself, and the proxy's own ports.
func neighbourCases() []testCase {
	return []testCase{
		{name: "containers/all of a pod are captured", proxy: tell, run: func(e *env) {
			// A container is a cgroup and users of its own in the pod's namespace.
			root := netnstest.NewCgroup(e)
			e.serve(e.pod.Namespace, 8081, "second")
			for i, uid := range []uint32{0, 1000, 1338} {
				app := StartDialer(e, e.pod.Namespace, filepath.Join(root, fmt.Sprintf("container%d", i)))
				other := startIn(e, e.pod.Namespace, filepath.Join(root, fmt.Sprintf("container%d", i)), uid, dialer)
				for _, p := range []*proxy{app.proxy, other} {
					a, err := p.dial(e.peerPort(appPort), netip.Addr{})
					if err != nil {
						e.Fatal(err)
					}
					e.wantProxy(a, redirect.OutboundPort, e.peerPort(appPort))
					// Containers of a pod talk over loopback without the proxy.
					if a, err = p.dial(netip.AddrPortFrom(e.loopback(), 8081), netip.Addr{}); err != nil {
						e.Fatal(err)
					}
					e.wantBare(a, "second")
				}
			}
			e.wantInbound(e.ask(e.peer.Namespace, e.podPort(8081)), e.podPort(8081), e.peerAddr())
		}},
		{name: "neighbours/the same tuples in several pods", proxy: tell, run: func(e *env) {
			e.sameTuples(4)
		}},
		{name: "neighbours/one calls another", proxy: onward, run: func(e *env) {
			// Through the proxies of both pods.
			b := e.another("b", onward)
			e.serve(b.pod.Namespace, appPort, "b")
			to := netip.AddrPortFrom(e.family(b.pod.Addrs()...), appPort)
			out := e.count(redirect.Outbound, "redirected", "captured")
			a := e.ask(e.pod.Namespace, to)
			e.wantBare(a, "b")
			if want := loopSource(to.Addr()); a.Peer.Addr() != want {
				e.Errorf("the app of b sees %s, want its own proxy's %s", a.Peer, want)
			}
			if got := e.count(redirect.Outbound, "redirected", "captured") - out; got != 1 {
				e.Errorf("counted %d connections outbound, want 1", got)
			}
		}},
		{name: "self/loopback and own address, non-blocking and connectionless", proxy: tell, run: func(e *env) {
			for _, dst := range []netip.Addr{e.loopback(), e.podAddr()} {
				fd := e.rawSocket(e.pod.Namespace, socket{domain: e.domain(), nonblocking: true})
				if err := rawConnect(e.pod.Namespace, fd, sockaddr(e.domain(), netip.AddrPortFrom(dst, appPort))); err != nil {
					e.Fatalf("connect to %s: %v", dst, err)
				}
				c := e.conn(fd)
				e.wantBare(e.answer(c), "app")
				if got := netnstest.AddrPort(c.RemoteAddr()); got != netip.AddrPortFrom(dst, appPort) {
					e.Errorf("getpeername says %s, want %s", got, dst)
				}
				e.wantBare(e.answer(e.conn(e.fastOpen(e.pod.Namespace, netip.AddrPortFrom(dst, appPort)))), "app")
			}
		}},
		{name: "self/own service by its address", run: func(e *env) {
			// The app calls its own service, and its proxy picks this pod.
			vip := netip.AddrPortFrom(e.family(netip.MustParseAddr("10.96.0.10"), netip.MustParseAddr("fd00:96::10")), 80)
			e.startProxy(asService(vip, e.podPort(appPort)))
			out, self := e.count(redirect.Outbound, "redirected", "captured"), e.count(redirect.Outbound, "redirected", "self_call")
			c, a := e.connect(e.pod.Namespace, vip)
			e.wantBare(a, "app")
			if want := loopSource(e.podAddr()); a.Peer.Addr() != want {
				e.Errorf("the app sees %s, want the proxy's %s", a.Peer, want)
			}
			if got := netnstest.AddrPort(c.RemoteAddr()); got != vip {
				e.Errorf("getpeername says %s, want %s", got, vip)
			}
			e.wantAlive(c)
			if got := e.count(redirect.Outbound, "redirected", "captured") - out; got != 1 {
				e.Errorf("counted %d connections outbound, want 1", got)
			}
			if got := e.count(redirect.Outbound, "redirected", "self_call") - self; got != 1 {
				e.Errorf("counted %d self calls, want 1", got)
			}
		}},
		{name: "proxy ports/dialled by the app", proxy: onward, run: func(e *env) {
			for _, port := range []uint16{redirect.OutboundPort, redirect.InboundPort} {
				for _, addr := range []netip.Addr{e.podAddr(), e.loopback()} {
					e.wantNoLoop(e.pod.Namespace, netip.AddrPortFrom(addr, port))
				}
			}
		}},
		{name: "proxy ports/dialled from outside", proxy: onward, run: func(e *env) {
			r := e.node.Remote(e, "remote")
			for _, port := range []uint16{redirect.OutboundPort, redirect.InboundPort} {
				for _, ns := range []netnstest.Namespace{e.peer.Namespace, r.Namespace, e.node.Namespace} {
					e.wantNoLoop(ns, e.podPort(port))
				}
			}
		}},
		{name: "proxy ports/what the proxy is told", proxy: tell, run: func(e *env) {
			for _, port := range []uint16{redirect.OutboundPort, redirect.InboundPort} {
				for _, ns := range []netnstest.Namespace{e.pod.Namespace, e.peer.Namespace, e.node.Namespace} {
					a := e.ask(ns, e.podPort(port))
					// Nothing, or itself, which a proxy takes for what it is.
					if a.Name != "proxy" || a.Port != port || a.OrigErr == "" && a.Orig != e.podPort(port) {
						e.Errorf("from %s to %d: %q on %d is told to go to %s", ns.Name, port, a.Name, a.Port, a.Orig)
					}
				}
				// The proxy's own connection to itself is not led further either.
				a, err := e.proxy.dial(e.podPort(port), netip.Addr{})
				if err != nil {
					e.Fatal(err)
				}
				if a.Name != "proxy" || a.Port != port {
					e.Errorf("the proxy dials its own %d and reaches %q on %d", port, a.Name, a.Port)
				}
			}
		}},
		{name: "proxy ports/of another pod", proxy: onward, run: func(e *env) {
			// Outbound like any destination; there they lead nowhere.
			b := e.another("b", onward)
			for _, port := range []uint16{redirect.OutboundPort, redirect.InboundPort} {
				e.wantEnds(e.pod.Namespace, netip.AddrPortFrom(e.family(b.pod.Addrs()...), port))
			}
		}},
	}
}

// another is one more redirected pod, with a proxy.
func (e *env) another(name, mode string) *env {
	e.Helper()
	pod := e.node.Pod(e, name)
	other := &env{T: e.T, open: e.open, r: e.r, v4: e.v4, node: e.node, pod: pod, w: workload(e, pod), peer: e.peer}
	e.Cleanup(func() { remove(e, other.w.ID) })
	other.add(nil)
	other.startProxy(mode)
	return other
}

// sameTuples opens connections that look the same in each of n pods but for what
// they were to reach: the same client port, the same loopback addresses.
func (e *env) sameTuples(n int) {
	e.Helper()
	const clientPort = 34567
	pods := []*env{e}
	for i := 1; i < n; i++ {
		o := e.another(fmt.Sprintf("pod%d", i), tell)
		o.serve(o.pod.Namespace, appPort, "app")
		pods = append(pods, o)
	}
	from := func(o *env, addr netip.Addr, port uint16, to netip.AddrPort) net.Conn {
		fd := e.rawSocket(o.pod.Namespace, socket{domain: e.domain(), prepare: func(fd int) error {
			return unix.Bind(fd, sockaddr(e.domain(), netip.AddrPortFrom(addr, port)))
		}})
		if err := rawConnect(o.pod.Namespace, fd, sockaddr(e.domain(), to)); err != nil {
			e.Fatalf("connect from %s to %s: %v", o.pod.Name, to, err)
		}
		return e.conn(fd)
	}
	var open []net.Conn
	for i, o := range pods {
		dst := netip.AddrPortFrom(e.peerAddr(), 7000+uint16(i))
		c := from(o, e.unspecified(), clientPort, dst)
		a := e.answer(c)
		e.wantOutbound(c, a, dst)
		if a.Peer != o.podPort(clientPort) {
			e.Errorf("%s: the proxy sees %s, want %s", o.pod.Name, a.Peer, o.podPort(clientPort))
		}
		lo := from(o, e.loopback(), clientPort+1, netip.AddrPortFrom(e.loopback(), appPort))
		e.wantBare(e.answer(lo), "app")
		open = append(open, c, lo)
	}
	e.wantAlive(open...)
}

// wantNoLoop dials a port of the proxy itself. It must not be led to itself again
// and again: the connection ends, and the proxy has no more sockets than before.
func (e *env) wantNoLoop(from netnstest.Namespace, to netip.AddrPort) {
	e.Helper()
	captured := e.count(redirect.Outbound, "redirected", "") + e.count(redirect.Inbound, "redirected", "")
	before := e.proxySockets()
	e.wantEnds(from, to)
	if got := e.count(redirect.Outbound, "redirected", "") + e.count(redirect.Inbound, "redirected", "") - captured; got != 0 {
		e.Errorf("%s to %s: %d connections were captured, want none", from.Name, to, got)
	}
	if now := e.proxySockets(); now > before+1 { // what just ended may still be there
		e.Errorf("%s to %s: the proxy has %d sockets, %d before", from.Name, to, now, before)
	}
}

// proxySockets counts the open descriptors of the proxy.
func (e *env) proxySockets() int {
	e.Helper()
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", e.proxy.cmd.Process.Pid))
	if err != nil {
		e.Fatalf("count the proxy's descriptors: %v", err)
	}
	return len(fds)
}
