package redirecttest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/tests/netnstest"
)

// cases is the table.
func cases() []testCase {
	return slices.Concat(outboundCases(), socketCases(), inboundCases(), streamCases(), burstCases(), neighbourCases(), probeCases(), failClosedCases(), lifecycleCases())
}

func outboundCases() []testCase {
	return []testCase{
		{name: "outbound/captured", proxy: tell, run: func(e *env) {
			before := e.count(redirect.Outbound, "redirected", "captured")
			c, a := e.connect(e.pod.Namespace, e.peerPort(appPort))
			e.wantOutbound(c, a, e.peerPort(appPort))
			if a.Peer.Addr() != e.podAddr() {
				e.Errorf("source is %s, want the pod's %s", a.Peer, e.podAddr())
			}
			if got := e.count(redirect.Outbound, "redirected", "captured") - before; got != 1 {
				e.Errorf("counted %d connections, want 1", got)
			}
		}},
		{name: "outbound/to another network", proxy: tell, run: func(e *env) {
			dst := netip.AddrPortFrom(e.family(netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")), 443)
			c, a := e.connect(e.pod.Namespace, dst)
			e.wantOutbound(c, a, dst)
		}},
		{name: "outbound/end to end", proxy: onward, run: func(e *env) {
			a := e.ask(e.pod.Namespace, e.peerPort(appPort))
			e.wantBare(a, "peer")
			if a.Peer.Addr() != e.podAddr() {
				e.Errorf("the peer sees %s, want the pod's %s", a.Peer, e.podAddr())
			}
		}},
		{name: "outbound/blocking connect", proxy: tell, run: func(e *env) {
			e.rawOutbound(e.domain(), false)
		}},
		{name: "outbound/non-blocking connect", proxy: tell, run: func(e *env) {
			e.rawOutbound(e.domain(), true)
		}},
		{name: "outbound/v4-mapped", proxy: tell, v4only: true, run: func(e *env) {
			e.rawOutbound(unix.AF_INET6, false)
		}},
		{name: "outbound/MPTCP socket", proxy: tell, run: func(e *env) {
			var d net.Dialer
			d.SetMultipathTCP(true)
			ctx, cancel := context.WithTimeout(e.Context(), askTimeout)
			defer cancel()
			c, err := e.pod.DialWith(ctx, d, "tcp", e.peerPort(appPort).String())
			if err != nil {
				e.Fatal(err)
			}
			defer func() { _ = c.Close() }()
			e.wantOutbound(c, e.answer(c), e.peerPort(appPort))
		}},
		{name: "outbound/fast open", proxy: tell, run: func(e *env) {
			// A connection without a call of connect(2).
			fd := e.rawSocket(e.pod.Namespace, socket{domain: e.domain()})
			err := e.pod.Do(func() error {
				return unix.Sendto(fd, []byte("hello"), unix.MSG_FASTOPEN, sockaddr(e.domain(), e.peerPort(appPort)))
			})
			if err != nil {
				e.Fatalf("send with MSG_FASTOPEN: %v", err)
			}
			c := e.conn(fd)
			e.wantOutbound(c, e.answer(c), e.peerPort(appPort))
		}},
		{
			name: "outbound/bound to a device", proxy: tell,
			skip: map[redirect.Backend]string{
				redirect.BackendIPTables: "REDIRECT leads to lo, which a socket bound to eth0 does not reach: the connection fails",
			},
			run: func(e *env) {
				fd := e.rawSocket(e.pod.Namespace, socket{domain: e.domain(), prepare: func(fd int) error {
					return unix.BindToDevice(fd, "eth0")
				}})
				if err := rawConnect(e.pod.Namespace, fd, sockaddr(e.domain(), e.peerPort(appPort))); err != nil {
					e.Fatalf("connect: %v", err)
				}
				c := e.conn(fd)
				e.wantOutbound(c, e.answer(c), e.peerPort(appPort))
			},
		},
		{name: "outbound/same socket after a refusal", run: func(e *env) {
			fd := e.rawSocket(e.pod.Namespace, socket{domain: e.domain()})
			if err := rawConnect(e.pod.Namespace, fd, sockaddr(e.domain(), e.peerPort(1))); !errors.Is(err, unix.ECONNREFUSED) {
				e.Fatalf("connect without a proxy: got %v, want ECONNREFUSED", err)
			}
			e.startProxy(tell)
			if err := rawConnect(e.pod.Namespace, fd, sockaddr(e.domain(), e.peerPort(appPort))); err != nil {
				e.Fatalf("connect again: %v", err)
			}
			c := e.conn(fd)
			e.wantOutbound(c, e.answer(c), e.peerPort(appPort))
		}},
		{
			name: "outbound/excluded port", proxy: tell,
			policy: func(e *env, p *redirect.Policy) { p.Outbound.ExcludePorts.List = []uint16{22, appPort} },
			run: func(e *env) {
				before := e.count(redirect.Outbound, "bypassed", "excluded_port")
				e.serve(e.peer.Namespace, 8081, "peer")
				e.wantBare(e.ask(e.pod.Namespace, e.peerPort(appPort)), "peer")
				if got := e.count(redirect.Outbound, "bypassed", "excluded_port") - before; got != 1 {
					e.Errorf("counted %d connections, want 1", got)
				}
				e.wantProxy(e.ask(e.pod.Namespace, e.peerPort(8081)), redirect.OutboundPort, e.peerPort(8081))
			},
		},
		{
			name: "outbound/excluded port wins over included", proxy: tell,
			policy: func(e *env, p *redirect.Policy) {
				p.Outbound.IncludePorts.List = []uint16{appPort}
				p.Outbound.ExcludePorts.List = []uint16{appPort}
			},
			run: func(e *env) { e.wantBare(e.ask(e.pod.Namespace, e.peerPort(appPort)), "peer") },
		},
		{
			name: "outbound/included port alone", proxy: tell,
			policy: func(e *env, p *redirect.Policy) {
				p.Outbound = redirect.OutboundPolicy{IncludePorts: redirect.Ports{List: []uint16{8081}}}
			},
			run: func(e *env) {
				e.wantBare(e.ask(e.pod.Namespace, e.peerPort(appPort)), "peer")
				e.wantProxy(e.ask(e.pod.Namespace, e.peerPort(8081)), redirect.OutboundPort, e.peerPort(8081))
			},
		},
		{
			name: "outbound/included port beside included address", proxy: tell,
			policy: func(e *env, p *redirect.Policy) {
				p.Outbound = redirect.OutboundPolicy{
					IncludePorts: redirect.Ports{List: []uint16{8081}},
					IncludeCIDRs: redirect.CIDRs{List: documentation()},
				}
			},
			run: func(e *env) {
				e.wantBare(e.ask(e.pod.Namespace, e.peerPort(appPort)), "peer")
				e.wantProxy(e.ask(e.pod.Namespace, e.peerPort(8081)), redirect.OutboundPort, e.peerPort(8081))
				for _, p := range documentation() {
					if p.Addr().Is4() == e.v4 {
						dst := netip.AddrPortFrom(p.Addr().Next(), appPort)
						e.wantProxy(e.ask(e.pod.Namespace, dst), redirect.OutboundPort, dst)
					}
				}
			},
		},
		{
			name: "outbound/excluded address", proxy: tell,
			policy: func(e *env, p *redirect.Policy) { p.Outbound.ExcludeCIDRs.List = []netip.Prefix{host(e.peerAddr())} },
			run: func(e *env) {
				other := e.node.Pod(e, "other")
				dst := netip.AddrPortFrom(e.family(other.Addrs()...), appPort)
				e.wantBare(e.ask(e.pod.Namespace, e.peerPort(appPort)), "peer")
				e.wantProxy(e.ask(e.pod.Namespace, dst), redirect.OutboundPort, dst)
			},
		},
		{
			name: "outbound/excluded address wins over included port", proxy: tell,
			policy: func(e *env, p *redirect.Policy) {
				p.Outbound.IncludePorts.List = []uint16{appPort}
				p.Outbound.IncludeCIDRs = redirect.CIDRs{List: []netip.Prefix{host(e.peerAddr())}}
				p.Outbound.ExcludeCIDRs.List = []netip.Prefix{netip.PrefixFrom(e.peerAddr(), 16).Masked()}
			},
			run: func(e *env) { e.wantBare(e.ask(e.pod.Namespace, e.peerPort(appPort)), "peer") },
		},
		{
			name: "outbound/included address alone", proxy: tell,
			policy: func(e *env, p *redirect.Policy) {
				p.Outbound.IncludeCIDRs = redirect.CIDRs{List: []netip.Prefix{host(e.peerAddr())}}
			},
			run: func(e *env) {
				other := e.node.Pod(e, "other")
				e.serve(other.Namespace, appPort, "other")
				e.wantProxy(e.ask(e.pod.Namespace, e.peerPort(appPort)), redirect.OutboundPort, e.peerPort(appPort))
				e.wantBare(e.ask(e.pod.Namespace, netip.AddrPortFrom(e.family(other.Addrs()...), appPort)), "other")
			},
		},
		{
			name: "outbound/every port included, no address", proxy: tell,
			policy: func(e *env, p *redirect.Policy) {
				p.Outbound = redirect.OutboundPolicy{IncludePorts: redirect.Ports{All: true}}
			},
			run: func(e *env) {
				c, a := e.connect(e.pod.Namespace, e.peerPort(appPort))
				e.wantOutbound(c, a, e.peerPort(appPort))
			},
		},
		{
			name: "outbound/every port and address excluded", proxy: tell,
			policy: func(e *env, p *redirect.Policy) {
				if e.v4 {
					p.Outbound.ExcludePorts = redirect.Ports{All: true}
				} else {
					p.Outbound.ExcludeCIDRs = redirect.CIDRs{All: true}
				}
				p.Inbound.ExcludePorts = redirect.Ports{All: true}
			},
			run: func(e *env) {
				e.wantBare(e.ask(e.pod.Namespace, e.peerPort(appPort)), "peer")
				e.wantBare(e.ask(e.peer.Namespace, e.podPort(appPort)), "app")
			},
		},
		{
			name: "outbound/addresses of one family included", proxy: tell,
			policy: func(e *env, p *redirect.Policy) {
				all4, all6 := netip.PrefixFrom(netip.IPv4Unspecified(), 0), netip.PrefixFrom(netip.IPv6Unspecified(), 0)
				p.Outbound.IncludeCIDRs = redirect.CIDRs{List: []netip.Prefix{all4}}
				p.Outbound.ExcludeCIDRs = redirect.CIDRs{List: []netip.Prefix{all6}}
			},
			run: func(e *env) {
				a := e.ask(e.pod.Namespace, e.peerPort(appPort))
				if e.v4 {
					e.wantProxy(a, redirect.OutboundPort, e.peerPort(appPort))
				} else {
					e.wantBare(a, "peer")
				}
			},
		},
		{
			name: "outbound/nothing included", proxy: tell,
			policy: func(e *env, p *redirect.Policy) { p.Outbound = redirect.OutboundPolicy{} },
			run:    func(e *env) { e.wantBare(e.ask(e.pod.Namespace, e.peerPort(appPort)), "peer") },
		},
		{name: "outbound/excluded interface", byHand: true, proxy: tell, run: func(e *env) {
			e.pod.Attach(e, "storage")
			other := e.peer.Attach(e, "storage")
			e.add(func(p *redirect.Policy) { p.ExcludeInterfaces = []string{"net1"} })
			dst := netip.AddrPortFrom(e.family(other.Addr4, other.Addr6), appPort)
			e.wantBare(e.ask(e.pod.Namespace, dst), "peer")
			e.wantProxy(e.ask(e.pod.Namespace, e.peerPort(appPort)), redirect.OutboundPort, e.peerPort(appPort))
		}},
		{name: "outbound/loopback and own address", proxy: tell, run: func(e *env) {
			for _, dst := range []netip.Addr{e.loopback(), e.podAddr(), e.unspecified()} {
				fd := e.rawSocket(e.pod.Namespace, socket{domain: e.domain()})
				if err := rawConnect(e.pod.Namespace, fd, sockaddr(e.domain(), netip.AddrPortFrom(dst, appPort))); err != nil {
					e.Fatalf("connect to %s: %v", dst, err)
				}
				e.wantBare(e.answer(e.conn(fd)), "app")
			}
		}},
		{
			name: "outbound/large sets", proxy: tell,
			policy: func(e *env, p *redirect.Policy) {
				p.Outbound.ExcludeCIDRs.List, p.Outbound.ExcludePorts.List = manyCIDRs(), manyPorts()
				p.Inbound.ExcludePorts.List = manyPorts()
			},
			run: func(e *env) {
				// Excluded ports reach the app, all others the proxy: first, last, between.
				e.serve(e.pod.Namespace, manyPorts()[0], "app")
				e.serve(e.pod.Namespace, manyPorts()[199], "app")
				e.wantBare(e.ask(e.peer.Namespace, e.podPort(manyPorts()[0])), "app")
				e.wantBare(e.ask(e.peer.Namespace, e.podPort(manyPorts()[199])), "app")
				e.wantProxy(e.ask(e.peer.Namespace, e.podPort(manyPorts()[100]+1)), redirect.InboundPort, e.podPort(manyPorts()[100]+1))
				e.serve(e.peer.Namespace, manyPorts()[99], "peer")
				e.wantBare(e.ask(e.pod.Namespace, e.peerPort(manyPorts()[99])), "peer")
				e.wantProxy(e.ask(e.pod.Namespace, e.peerPort(manyPorts()[99]+1)), redirect.OutboundPort, e.peerPort(manyPorts()[99]+1))
				// Every excluded range: no proxy answers there. Their neighbours: it does.
				dst := e.family(netip.MustParseAddr("198.51.100.77"), netip.MustParseAddr("2001:db8:ffff::77"))
				e.wantProxy(e.ask(e.pod.Namespace, netip.AddrPortFrom(dst, 80)), redirect.OutboundPort, netip.AddrPortFrom(dst, 80))
				before := e.count(redirect.Outbound, "bypassed", "excluded_cidr")
				tried := e.tryAll(manyCIDRs())
				if got := e.count(redirect.Outbound, "bypassed", "excluded_cidr") - before; got != tried {
					e.Errorf("%d of %d connections to excluded ranges were counted", got, tried)
				}
			},
		},
		{name: "proxy/own connections pass", proxy: tell, run: func(e *env) {
			a, err := e.proxy.dial(e.peerPort(appPort), netip.Addr{})
			if err != nil {
				e.Fatal(err)
			}
			e.wantBare(a, "peer")
		}},
		{
			name: "proxy/own pod's captured port", proxy: tell,
			policy: func(e *env, p *redirect.Policy) { p.Inbound.ExcludePorts.List = []uint16{8081} },
			run: func(e *env) {
				e.serve(e.pod.Namespace, 8081, "app")
				a, err := e.proxy.dial(e.podPort(appPort), netip.Addr{})
				if err != nil {
					e.Fatal(err)
				}
				e.wantProxy(a, redirect.InboundPort, e.podPort(appPort))
				for _, to := range []struct {
					addr netip.AddrPort
					bind netip.Addr
				}{
					{addr: e.podPort(8081)},                                           // excluded inbound
					{addr: e.podPort(appPort), bind: loopSource(e.podAddr())},         // handed to the app
					{addr: netip.AddrPortFrom(e.loopback(), appPort)},                 // loopback
					{addr: netip.AddrPortFrom(e.loopback(), 8081), bind: e.podAddr()}, // loopback, bound
				} {
					a, err := e.proxy.dial(to.addr, to.bind)
					if err != nil {
						e.Errorf("proxy dials %s from %s: %v", to.addr, to.bind, err)
						continue
					}
					e.wantBare(a, "app")
				}
			},
		},
		{
			name: "proxy/another UID", proxy: tell,
			policy: func(e *env, p *redirect.Policy) { p.ProxyUID = 4242 },
			run: func(e *env) {
				a, err := e.proxy.dial(e.peerPort(appPort), netip.Addr{})
				if err != nil {
					e.Fatal(err)
				}
				e.wantBare(a, "peer")
				e.proxy.stop()
				// An app with the usual UID of proxies is an app here.
				e.proxy = nil
				app := startProxy(e, e.pod.Namespace, redirect.DefaultProxyUID, dialer)
				if a, err := app.dial(e.peerPort(appPort), netip.Addr{}); err == nil {
					e.Errorf("a process with UID %d reached %q without the proxy", redirect.DefaultProxyUID, a.Name)
				}
			},
		},
		{name: "proxy/only in its container", byHand: true, run: func(e *env) {
			dirs := make(map[string]string)
			root := netnstest.NewCgroup(e)
			for _, name := range []string{"proxy", "proxy/below", "app"} {
				dirs[name] = filepath.Join(root, name)
				if err := os.MkdirAll(dirs[name], 0o755); err != nil {
					e.Fatal(err)
				}
			}
			path := func(name string) string { return e.cgroupPath(dirs[name]) }
			e.w.ProxyCgroup = path("proxy")
			e.add(nil)
			uid := e.w.Policy.ProxyUID
			e.proxy = startIn(e, e.pod.Namespace, dirs["proxy"], uid, tell)
			below := startIn(e, e.pod.Namespace, dirs["proxy/below"], uid, dialer)
			app := startIn(e, e.pod.Namespace, dirs["app"], uid, dialer)
			admin := netip.AddrPortFrom(e.loopback(), redirect.AdminPort)
			e.pod.Serve(e, admin, "admin")
			for name, p := range map[string]*proxy{"the proxy": e.proxy, "a cgroup below": below} {
				for want, to := range map[string]netip.AddrPort{"peer": e.peerPort(appPort), "admin": admin} {
					if a, err := p.dial(to, netip.Addr{}); err != nil || a.Name != want {
						e.Errorf("%s dials %s and reaches %q, %v; want %q", name, to, a.Name, err, want)
					}
				}
			}
			wantApp := func() {
				a, err := app.dial(e.peerPort(appPort), netip.Addr{})
				if err != nil {
					e.Fatal(err)
				}
				e.wantProxy(a, redirect.OutboundPort, e.peerPort(appPort))
				if a, err := app.dial(admin, netip.Addr{}); err == nil {
					e.Errorf("an app with the proxy's user reaches %q on the admin port", a.Name)
				}
				// Its own address is the app's, as for any app.
				if a, err = app.dial(e.podPort(appPort), netip.Addr{}); err != nil {
					e.Fatal(err)
				}
				e.wantBare(a, "app")
			}
			wantApp()
			// The container may change: until that is known the user alone counts.
			e.w.ProxyCgroup = ""
			e.add(nil)
			e.wantWhole(e.r)
			if a, err := app.dial(e.peerPort(appPort), netip.Addr{}); err != nil || a.Name != "peer" {
				e.Errorf("while no container is known the proxy's user reaches %q, %v", a.Name, err)
			}
			e.w.ProxyCgroup = path("proxy")
			e.add(nil)
			e.wantWhole(e.r)
			wantApp()
			gone := filepath.Join(e.w.ProxyCgroup, "gone")
			e.w.ProxyCgroup = gone
			if err := e.r.Add(e.Context(), e.w); err == nil {
				e.Error("added with a cgroup that is not there")
			}
			wantApp()
		}},
		{name: "proxy/admin port", proxy: tell, run: func(e *env) {
			admin := netip.AddrPortFrom(e.loopback(), redirect.AdminPort)
			e.pod.Serve(e, admin, "admin")
			e.wantDown(e.pod.Namespace, admin)
			a, err := e.proxy.dial(admin, netip.Addr{})
			if err != nil {
				e.Fatalf("the proxy itself: %v", err)
			}
			e.wantBare(a, "admin")
			ctx, cancel := context.WithTimeout(e.Context(), askTimeout)
			defer cancel()
			c, err := e.pod.DialWith(ctx, net.Dialer{Control: mark(agentMark)}, "tcp", admin.String())
			if err != nil {
				e.Fatalf("with the agent's mark: %v", err)
			}
			defer func() { _ = c.Close() }()
			e.wantBare(e.answer(c), "admin")
		}},
		{name: "others/untouched", proxy: tell, run: func(e *env) {
			other := e.node.Pod(e, "other")
			e.wantBare(e.ask(other.Namespace, e.peerPort(appPort)), "peer")
			e.wantBare(e.ask(e.node.Namespace, e.peerPort(appPort)), "peer")
		}},
	}
}

func inboundCases() []testCase {
	return []testCase{
		{name: "inbound/same node", proxy: tell, run: func(e *env) {
			before := e.count(redirect.Inbound, "redirected", "captured")
			a := e.ask(e.peer.Namespace, e.podPort(appPort))
			e.wantInbound(a, e.podPort(appPort), e.peerAddr())
			if got := e.count(redirect.Inbound, "redirected", "captured") - before; got != 1 {
				e.Errorf("counted %d connections, want 1", got)
			}
		}},
		{name: "inbound/other network", proxy: tell, run: func(e *env) {
			r := e.node.Remote(e, "remote")
			e.wantInbound(e.ask(r.Namespace, e.podPort(appPort)), e.podPort(appPort), e.family(r.Addrs()...))
		}},
		{name: "inbound/port without a server", proxy: tell, run: func(e *env) {
			e.wantInbound(e.ask(e.peer.Namespace, e.podPort(9)), e.podPort(9), e.peerAddr())
		}},
		{name: "inbound/MPTCP socket", proxy: tell, run: func(e *env) {
			var d net.Dialer
			d.SetMultipathTCP(true)
			ctx, cancel := context.WithTimeout(e.Context(), askTimeout)
			defer cancel()
			c, err := e.peer.DialWith(ctx, d, "tcp", e.podPort(appPort).String())
			if err != nil {
				e.Fatal(err)
			}
			defer func() { _ = c.Close() }()
			e.wantInbound(e.answer(c), e.podPort(appPort), e.peerAddr())
		}},
		{name: "inbound/end to end", proxy: onward, run: func(e *env) {
			a := e.ask(e.peer.Namespace, e.podPort(appPort))
			e.wantBare(a, "app")
			if want := loopSource(e.podAddr()); a.Peer.Addr() != want {
				e.Errorf("the app sees %s, want the proxy's %s", a.Peer, want)
			}
		}},
		{name: "inbound/own service", proxy: onward, run: func(e *env) {
			// What Envoy does when the app calls its own service and this pod is picked.
			a, err := e.proxy.dial(e.podPort(appPort), netip.Addr{})
			if err != nil {
				e.Fatal(err)
			}
			e.wantBare(a, "app")
			if want := loopSource(e.podAddr()); a.Peer.Addr() != want {
				e.Errorf("the app sees %s, want the proxy's %s", a.Peer, want)
			}
		}},
		{
			name: "inbound/excluded port", proxy: tell,
			policy: func(e *env, p *redirect.Policy) { p.Inbound.ExcludePorts.List = []uint16{appPort} },
			run: func(e *env) {
				before := e.count(redirect.Inbound, "bypassed", "excluded_port")
				e.wantBare(e.ask(e.peer.Namespace, e.podPort(appPort)), "app")
				if got := e.count(redirect.Inbound, "bypassed", "excluded_port") - before; got != 1 {
					e.Errorf("counted %d connections, want 1", got)
				}
				e.wantInbound(e.ask(e.peer.Namespace, e.podPort(8081)), e.podPort(8081), e.peerAddr())
			},
		},
		{
			name: "inbound/included port", proxy: tell,
			policy: func(e *env, p *redirect.Policy) {
				p.Inbound.IncludePorts = redirect.Ports{List: []uint16{81, 8081}}
				p.Inbound.ExcludePorts.List = []uint16{81}
			},
			run: func(e *env) {
				e.serve(e.pod.Namespace, 81, "app")
				e.wantInbound(e.ask(e.peer.Namespace, e.podPort(8081)), e.podPort(8081), e.peerAddr())
				e.wantBare(e.ask(e.peer.Namespace, e.podPort(appPort)), "app")
				e.wantBare(e.ask(e.peer.Namespace, e.podPort(81)), "app")
			},
		},
		{
			name: "inbound/nothing included", proxy: tell,
			policy: func(e *env, p *redirect.Policy) { p.Inbound = redirect.InboundPolicy{} },
			run:    func(e *env) { e.wantBare(e.ask(e.peer.Namespace, e.podPort(appPort)), "app") },
		},
		{name: "inbound/health port", proxy: tell, run: func(e *env) {
			e.serve(e.pod.Namespace, redirect.HealthPort, "health")
			e.wantBare(e.ask(e.peer.Namespace, e.podPort(redirect.HealthPort)), "health")
		}},
		{
			name: "inbound/excluded interface", proxy: tell,
			policy: func(e *env, p *redirect.Policy) { p.ExcludeInterfaces = []string{"eth0"} },
			run: func(e *env) {
				e.wantBare(e.ask(e.peer.Namespace, e.podPort(appPort)), "app")
				e.wantBare(e.ask(e.pod.Namespace, e.peerPort(appPort)), "peer")
			},
		},
		{name: "inbound/interface without pod address", byHand: true, proxy: tell, run: func(e *env) {
			net1 := e.pod.Attach(e, "storage")
			e.peer.Attach(e, "storage")
			e.add(nil)
			dst := netip.AddrPortFrom(e.family(net1.Addr4, net1.Addr6), appPort)
			e.wantBare(e.ask(e.peer.Namespace, dst), "app")
			e.wantInbound(e.ask(e.peer.Namespace, e.podPort(appPort)), e.podPort(appPort), e.peerAddr())
		}},
		{name: "inbound/many at once", proxy: onward, run: func(e *env) { e.manyAtOnce(500) }},
		{name: "inbound/SYN cookies", proxy: onward, run: func(e *env) {
			e.pod.Sysctl(e, "net/ipv4/tcp_syncookies", "2")
			e.manyAtOnce(500)
		}},
	}
}

func failClosedCases() []testCase {
	return []testCase{
		{name: "no proxy/outbound", run: func(e *env) {
			before := e.count(redirect.Outbound, "denied", "proxy_down")
			e.wantDown(e.pod.Namespace, e.peerPort(appPort))
			if e.count(redirect.Outbound, "denied", "proxy_down") == before {
				e.Error("it was not counted")
			}
			e.startProxy(tell)
			e.wantProxy(e.ask(e.pod.Namespace, e.peerPort(appPort)), redirect.OutboundPort, e.peerPort(appPort))
			e.proxy.stop()
			e.wantDown(e.pod.Namespace, e.peerPort(appPort))
		}},
		{name: "no proxy/inbound", run: func(e *env) {
			before := e.count(redirect.Inbound, "denied", "proxy_down")
			e.wantDown(e.peer.Namespace, e.podPort(appPort))
			if e.count(redirect.Inbound, "denied", "proxy_down") == before {
				e.Error("it was not counted")
			}
			e.startProxy(tell)
			e.wantInbound(e.ask(e.peer.Namespace, e.podPort(appPort)), e.podPort(appPort), e.peerAddr())
			e.proxy.stop()
			e.wantDown(e.peer.Namespace, e.podPort(appPort))
		}},
		{
			name: "no proxy/excluded ports still work",
			policy: func(e *env, p *redirect.Policy) {
				p.Inbound.ExcludePorts.List, p.Outbound.ExcludePorts.List = []uint16{appPort}, []uint16{appPort}
			},
			run: func(e *env) {
				e.wantBare(e.ask(e.peer.Namespace, e.podPort(appPort)), "app")
				e.wantBare(e.ask(e.pod.Namespace, e.peerPort(appPort)), "peer")
			},
		},
	}
}

func lifecycleCases() []testCase {
	return []testCase{
		{name: "lifecycle/add, add again, remove, remove again", byHand: true, proxy: tell, run: func(e *env) {
			clean := e.pod.State(e)
			for range 2 {
				e.add(nil)
				e.wantWhole(e.r)
				e.wantInbound(e.ask(e.peer.Namespace, e.podPort(appPort)), e.podPort(appPort), e.peerAddr())
				e.wantProxy(e.ask(e.pod.Namespace, e.peerPort(appPort)), redirect.OutboundPort, e.peerPort(appPort))
			}
			for range 2 {
				if err := e.r.Remove(e.Context(), e.w.ID); err != nil {
					e.Fatalf("remove: %v", err)
				}
				if i, ok := e.installed(e.r); ok {
					e.Errorf("still listed: %+v", i)
				}
				e.wantBare(e.ask(e.peer.Namespace, e.podPort(appPort)), "app")
				e.wantBare(e.ask(e.pod.Namespace, e.peerPort(appPort)), "peer")
			}
			e.wantClean(clean)
		}},
		{name: "lifecycle/connections from before", byHand: true, run: func(e *env) {
			out, a := e.connect(e.pod.Namespace, e.peerPort(appPort))
			e.wantBare(a, "peer")
			in, a := e.connect(e.peer.Namespace, e.podPort(appPort))
			e.wantBare(a, "app")
			e.add(nil)
			e.wantAlive(out, in)
			e.wantDown(e.pod.Namespace, e.peerPort(appPort))
		}},
		{name: "lifecycle/policy changes live", proxy: tell, run: func(e *env) {
			out, a := e.connect(e.pod.Namespace, e.peerPort(appPort))
			e.wantProxy(a, redirect.OutboundPort, e.peerPort(appPort))
			in, a := e.connect(e.peer.Namespace, e.podPort(appPort))
			e.wantInbound(a, e.podPort(appPort), e.peerAddr())
			captured := e.count(redirect.Outbound, "redirected", "")

			e.add(func(p *redirect.Policy) {
				p.Inbound.ExcludePorts.List, p.Outbound.ExcludePorts.List = []uint16{appPort}, []uint16{appPort}
			})
			e.wantWhole(e.r)
			e.wantAlive(out, in)
			bareOut, a := e.connect(e.pod.Namespace, e.peerPort(appPort))
			e.wantBare(a, "peer")
			bareIn, a := e.connect(e.peer.Namespace, e.podPort(appPort))
			e.wantBare(a, "app")

			e.add(func(p *redirect.Policy) { *p = redirect.DefaultPolicy() })
			e.wantAlive(out, in, bareOut, bareIn)
			e.wantProxy(e.ask(e.pod.Namespace, e.peerPort(appPort)), redirect.OutboundPort, e.peerPort(appPort))
			e.wantInbound(e.ask(e.peer.Namespace, e.podPort(appPort)), e.podPort(appPort), e.peerAddr())
			if now := e.count(redirect.Outbound, "redirected", ""); now != captured+1 {
				e.Errorf("%d connections counted before, %d after one more", captured, now)
			}
		}},
		{name: "lifecycle/policy changes under load", proxy: onward, run: func(e *env) {
			// Every connection must be served, and none without the proxy.
			ctx, cancel := context.WithCancel(e.Context())
			defer cancel()
			served := make(chan error, 1)
			go func() { served <- e.load(ctx) }()
			for i := range 10 {
				e.add(func(p *redirect.Policy) { p.Outbound.ExcludePorts.List = []uint16{uint16(20000 + i)} })
			}
			cancel()
			if err := <-served; err != nil {
				e.Error(err)
			}
		}},
		{name: "lifecycle/connections outlive removal", byHand: true, run: func(e *env) {
			clean := e.pod.State(e)
			e.add(nil)
			e.startProxy(tell)
			out, _ := e.connect(e.pod.Namespace, e.peerPort(appPort))
			in, _ := e.connect(e.peer.Namespace, e.podPort(appPort))
			if err := e.r.Remove(e.Context(), e.w.ID); err != nil {
				e.Fatalf("remove: %v", err)
			}
			e.wantAlive(out, in)
			e.wantBare(e.ask(e.peer.Namespace, e.podPort(appPort)), "app")
			e.wantBare(e.ask(e.pod.Namespace, e.peerPort(appPort)), "peer")
			if i, ok := e.installed(e.r); ok {
				e.Errorf("still listed: %+v", i)
			}
			e.wantAlive(out, in)
			_, _ = out.Close(), in.Close()
			e.proxy.stop()
			e.wantClean(clean)
		}},
		{name: "lifecycle/connections to the app outlive removal", byHand: true, run: func(e *env) {
			// The proxy has a connection of its own to the app, from a source that
			// redirection may have put there.
			clean := e.pod.State(e)
			e.add(nil)
			e.startProxy(onward)
			in, a := e.connect(e.peer.Namespace, e.podPort(appPort))
			e.wantBare(a, "app")
			if a.Peer.Addr() != loopSource(e.podAddr()) {
				e.Errorf("the app sees client %s, want the proxy's %s", a.Peer, loopSource(e.podAddr()))
			}
			if err := e.r.Remove(e.Context(), e.w.ID); err != nil {
				e.Fatalf("remove: %v", err)
			}
			e.wantAlive(in)
			if i, ok := e.installed(e.r); ok {
				e.Errorf("still listed: %+v", i)
			}
			e.wantAlive(in)
			// Redirected again, with what is left of before.
			e.add(nil)
			e.wantWhole(e.r)
			e.wantAlive(in)
			if err := e.r.Remove(e.Context(), e.w.ID); err != nil {
				e.Fatalf("remove again: %v", err)
			}
			e.wantAlive(in)
			_ = in.Close()
			e.proxy.stop()
			e.wantClean(clean)
		}},
		{name: "lifecycle/restart", proxy: tell, run: func(e *env) {
			out, _ := e.connect(e.pod.Namespace, e.peerPort(appPort))
			in, _ := e.connect(e.peer.Namespace, e.podPort(appPort))
			first := e.open(e, e.node.Netns)
			e.wantWhole(first)
			if err := first.Close(); err != nil {
				e.Fatalf("close: %v", err)
			}
			e.wantAlive(out, in)
			e.wantProxy(e.ask(e.pod.Namespace, e.peerPort(appPort)), redirect.OutboundPort, e.peerPort(appPort))
			second := e.open(e, e.node.Netns)
			defer func() { _ = second.Close() }()
			e.wantWhole(second)
			if err := second.Add(e.Context(), e.w); err != nil {
				e.Fatalf("add what is there: %v", err)
			}
			e.wantAlive(out, in)
			if err := second.Remove(e.Context(), e.w.ID); err != nil {
				e.Fatalf("remove: %v", err)
			}
			e.wantBare(e.ask(e.pod.Namespace, e.peerPort(appPort)), "peer")
		}},
		{name: "lifecycle/namespace gone", byHand: true, run: func(e *env) {
			gone := e.node.Pod(e, "gone")
			w := workload(e, gone)
			if err := e.r.Add(e.Context(), w); err != nil {
				e.Fatalf("add: %v", err)
			}
			gone.Remove(e)
			if err := e.r.Remove(e.Context(), w.ID); err != nil {
				e.Errorf("remove: %v", err)
			}
			if err := e.r.Add(e.Context(), w); !errors.Is(err, redirect.ErrGone) {
				e.Errorf("add: got %v, want ErrGone", err)
			}
			all, err := e.r.List(e.Context())
			if err != nil || slices.ContainsFunc(all, func(i redirect.Installed) bool { return i.ID == w.ID }) {
				e.Errorf("List() = %v, %v", all, err)
			}
		}},
		{name: "lifecycle/one family", byHand: true, run: func(e *env) {
			pod := e.node.PodWith(e, "single", netnstest.PodOptions{NoIPv4: !e.v4, NoIPv6: e.v4})
			e.pod, e.w = pod, workload(e, pod)
			clean := pod.State(e)
			e.add(nil)
			e.wantWhole(e.r)
			e.startProxy(tell)
			e.wantInbound(e.ask(e.peer.Namespace, e.podPort(appPort)), e.podPort(appPort), e.peerAddr())
			e.wantProxy(e.ask(pod.Namespace, e.peerPort(appPort)), redirect.OutboundPort, e.peerPort(appPort))
			e.proxy.stop()
			if err := e.r.Remove(e.Context(), e.w.ID); err != nil {
				e.Fatalf("remove: %v", err)
			}
			e.wantClean(clean)
		}},
	}
}

// rawOutbound connects a plain socket of the domain to the peer.
func (e *env) rawOutbound(domain int, nonblocking bool) {
	e.Helper()
	fd := e.rawSocket(e.pod.Namespace, socket{domain: domain, nonblocking: nonblocking})
	if err := rawConnect(e.pod.Namespace, fd, sockaddr(domain, e.peerPort(appPort))); err != nil {
		e.Fatalf("connect: %v", err)
	}
	c := e.conn(fd)
	e.wantOutbound(c, e.answer(c), e.peerPort(appPort))
}

// wantInbound checks that the proxy got a connection to dst and sees the client.
func (e *env) wantInbound(a answer, dst netip.AddrPort, client netip.Addr) {
	e.Helper()
	e.wantProxy(a, redirect.InboundPort, dst)
	if a.Peer.Addr() != client {
		e.Errorf("the proxy sees client %s, want %s", a.Peer, client)
	}
}

// wantClean waits until the pod's namespace is as it was: what connections need
// may stay as long as they do, and goes when the workloads are listed.
func (e *env) wantClean(before netnstest.State) {
	e.Helper()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(askTimeout); ; <-tick.C {
		e.installed(e.r)
		diff := before.Diff(e.pod.State(e))
		if diff == "" {
			return
		}
		if time.Now().After(deadline) {
			e.Errorf("the namespace is not as before:\n%s", diff)
			return
		}
	}
}

// wantAlive checks that connections still carry data both ways.
func (e *env) wantAlive(conns ...net.Conn) {
	e.Helper()
	for i, c := range conns {
		ctx, cancel := context.WithTimeout(e.Context(), askTimeout)
		if err := netnstest.Echo(ctx, c, "still there?"); err != nil {
			e.Errorf("connection %d to %s: %v", i, c.RemoteAddr(), err)
		}
		cancel()
	}
}

// manyAtOnce opens n connections to the app at once. All must be served, all
// through the proxy: the app sees its loopback source.
func (e *env) manyAtOnce(n int) {
	e.Helper()
	want := loopSource(e.podAddr())
	var wg sync.WaitGroup
	errs := make(chan error, n)
	for range n {
		wg.Add(1)
		go func() {
			defer wg.Done()
			errs <- e.askThrough(e.peer.Namespace, e.podPort(appPort), 20*time.Second, "app", want)
		}()
	}
	wg.Wait()
	close(errs)
	failed := 0
	for err := range errs {
		if err == nil {
			continue
		}
		if failed == 0 {
			e.Error(err)
		}
		failed++
	}
	if failed > 0 {
		e.Errorf("%d of %d connections failed", failed, n)
	}
}

// askThrough connects and checks who answers and whom it sees.
func (e *env) askThrough(from netnstest.Namespace, to netip.AddrPort, timeout time.Duration, name string, peer netip.Addr) error {
	ctx, cancel := context.WithTimeout(e.Context(), timeout)
	defer cancel()
	a, err := from.Ask(ctx, to)
	if err != nil {
		return err
	}
	if a.Name != name || a.Peer.Addr() != peer {
		return fmt.Errorf("connection to %s reached %q, which sees %s; want %q and %s", to, a.Name, a.Peer, name, peer)
	}
	return nil
}

// load opens inbound connections one after the other until ctx ends.
func (e *env) load(ctx context.Context) error {
	for i := 0; ctx.Err() == nil; i++ {
		if err := e.askThrough(e.peer.Namespace, e.podPort(appPort), askTimeout, "app", loopSource(e.podAddr())); err != nil {
			return fmt.Errorf("connection %d: %w", i, err)
		}
	}
	return nil
}

// tryAll begins a connection into each prefix of the case's family and returns
// how many it began. Nobody is there to answer.
func (e *env) tryAll(prefixes []netip.Prefix) uint64 {
	e.Helper()
	var n uint64
	for _, p := range prefixes {
		if p.Addr().Is4() != e.v4 {
			continue
		}
		fd := e.rawSocket(e.pod.Namespace, socket{domain: e.domain(), nonblocking: true})
		err := e.pod.Do(func() error { return unix.Connect(fd, sockaddr(e.domain(), netip.AddrPortFrom(p.Addr(), 80))) })
		_ = unix.Close(fd)
		if err != nil && !errors.Is(err, unix.EINPROGRESS) {
			e.Errorf("connect into %s: %v", p, err)
		}
		n++
	}
	return n
}

// mark sets SO_MARK.
func mark(m int) func(network, address string, c syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) error {
		var err error
		ctrl := c.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, m)
		})
		return errors.Join(ctrl, err)
	}
}

// documentation returns a range of each family in which nobody lives.
func documentation() []netip.Prefix {
	return []netip.Prefix{netip.MustParsePrefix("203.0.113.0/24"), netip.MustParsePrefix("2001:db8:1::/48")}
}

// manyCIDRs returns 500 ranges, half of each family, of several lengths.
func manyCIDRs() []netip.Prefix {
	var ps []netip.Prefix
	for i := range 250 {
		p4 := netip.PrefixFrom(netip.AddrFrom4([4]byte{100, byte(64 + i/16), byte(i % 16 * 16), 0}), 20+i%5)
		p6 := netip.PrefixFrom(netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 0, 2, 0, byte(i)}), 64+i%64)
		ps = append(ps, p4.Masked(), p6.Masked())
	}
	slices.SortFunc(ps, func(a, b netip.Prefix) int { return a.Compare(b) })
	return ps
}

// manyPorts returns 200 ports, no two of which are neighbours.
func manyPorts() []uint16 {
	var ports []uint16
	for i := range 200 {
		ports = append(ports, uint16(20000+2*i))
	}
	return ports
}
