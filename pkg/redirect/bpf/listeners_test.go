package bpf

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/features"
	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/pkg/redirect/netns"
	"github.com/sluicemesh/sluice/tests/netnstest"
)

// A listenersCase is a pod with an app, the peer that calls it, and what listens
// on the inbound port.
type listenersCase struct {
	*testing.T
	open      func() *Redirector
	r         *Redirector
	w         redirect.Workload
	pod, peer *netnstest.Pod
	cookie    uint64
}

// TestListeners shows which sockets become known as the proxy's listener, when,
// and what serves the pod then. Each SYN is answered with a cookie, so that a
// connection succeeds only if sk_lookup knows the listener; but for the cases that
// say otherwise.
func TestListeners(t *testing.T) {
	testListeners(t, func(*ebpf.CollectionSpec) error { return nil })
}

// TestListenersWithoutTC is TestListeners as on kernels that let no tc program
// register listeners.
func TestListenersWithoutTC(t *testing.T) { testListeners(t, withoutTC) }

func testListeners(t *testing.T, change func(*ebpf.CollectionSpec) error) {
	o := newOptions(t)
	node := netnstest.NewNode(t)
	for name, run := range listenersCases() {
		t.Run(name, func(t *testing.T) {
			c := &listenersCase{T: t, pod: node.Pod(t, "pod"), peer: node.Pod(t, "peer")}
			c.open = func() *Redirector { return openBuild(t, o, change) }
			c.r = c.open()
			defer func() { _ = c.r.Close() }()
			c.w = workload(t, c.pod)
			defer func() {
				if err := c.r.Remove(context.Background(), c.w.ID); err != nil {
					t.Error(err)
				}
			}()
			var err error
			if c.cookie, err = netns.Cookie(c.pod.Netns); err != nil {
				t.Fatal(err)
			}
			for _, addr := range c.pod.Addrs() {
				c.pod.Serve(t, netip.AddrPortFrom(addr, 80), "app")
			}
			c.pod.Sysctl(t, "net/ipv4/tcp_syncookies", "2")
			run(c)
		})
	}
}

// with returns what to pass to listen for a socket option.
func with(level, option, value int) func(fd int) error {
	return func(fd int) error { return unix.SetsockoptInt(fd, level, option, value) }
}

func listenersCases() map[string]func(*listenersCase) {
	group := with(unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
	const v4, v6, both = "0.0.0.0", "[::]", "[::]"
	return map[string]func(*listenersCase){
		"listens after Add": func(c *listenersCase) {
			mustAdd(c, c.r, c.w)
			c.listen("tcp4", v4, "proxy")
			c.wantKnown(unix.AF_INET, true)
			c.wantKnown(unix.AF_INET6, false)
			c.listen("tcp6", v6, "proxy")
			c.wantKnown(unix.AF_INET6, true)
			c.want4("proxy")
			c.want6("proxy")
		},
		"listens before Add": func(c *listenersCase) {
			c.listen("tcp4", v4, "proxy")
			c.listen("tcp6", v6, "proxy")
			mustAdd(c, c.r, c.w)
			c.want4("proxy")
			c.want6("proxy")
		},
		"both families, after Add": func(c *listenersCase) {
			mustAdd(c, c.r, c.w)
			c.listen("tcp", both, "proxy")
			c.wantKnown(unix.AF_INET6, true)
			c.want4("proxy")
			c.want6("proxy")
		},
		"both families, before Add": func(c *listenersCase) {
			c.listen("tcp", both, "proxy")
			mustAdd(c, c.r, c.w)
			c.want4("proxy")
			c.want6("proxy")
		},
		"the pod's own addresses": func(c *listenersCase) {
			c.listen("tcp4", c.pod.Addr4.String(), "proxy")
			mustAdd(c, c.r, c.w)
			c.listen("tcp6", "["+c.pod.Addr6.String()+"]", "proxy")
			c.want4("proxy")
			c.want6("proxy")
		},
		"restarts": func(c *listenersCase) {
			mustAdd(c, c.r, c.w)
			for range 3 {
				s := c.listen("tcp4", v4, "proxy")
				c.want4("proxy")
				s.Close()
				c.wantKnown(unix.AF_INET, false)
				c.want4("")
			}
		},
		"restarts while the agent does": func(c *listenersCase) {
			mustAdd(c, c.r, c.w)
			old := c.listen("tcp4", v4, "proxy")
			if err := c.r.Close(); err != nil {
				c.Fatal(err)
			}
			c.want4("proxy")
			old.Close()
			c.listen("tcp4", v4, "new proxy")
			c.want4("new proxy")
			c.r = c.open()
			c.want4("new proxy")
		},
		"shut down, not closed": func(c *listenersCase) {
			mustAdd(c, c.r, c.w)
			old := c.rawListen(&unix.SockaddrInet4{Port: int(redirect.InboundPort)})
			defer func() { _ = unix.Close(old) }()
			c.wantKnown(unix.AF_INET, true)
			if err := unix.Shutdown(old, unix.SHUT_RDWR); err != nil {
				c.Fatal(err)
			}
			c.want4("")
			c.listen("tcp4", v4, "proxy")
			c.want4("proxy")
		},
		"first of a group closes": func(c *listenersCase) {
			mustAdd(c, c.r, c.w)
			first := c.listen("tcp4", v4, "proxy", group)
			c.listen("tcp4", v4, "proxy", group)
			first.Close()
			c.wantKnown(unix.AF_INET, true)
			c.want4("proxy")
		},
		"last of a group closes": func(c *listenersCase) {
			mustAdd(c, c.r, c.w)
			c.listen("tcp4", v4, "proxy", group)
			last := c.listen("tcp4", v4, "proxy", group)
			last.Close()
			c.wantKnown(unix.AF_INET, false)
			version, err := features.LinuxVersionCode()
			if err != nil {
				c.Fatal(err)
			}
			if version >= 6<<16|6<<8 {
				// A tc program that may not register it gives it the SYN alone; before
				// 6.6, where all may, not if it is of a group.
				c.pod.Sysctl(c, "net/ipv4/tcp_syncookies", "1")
				c.want4("proxy")
				c.pod.Sysctl(c, "net/ipv4/tcp_syncookies", "2")
			}
			if list, err := c.r.List(c.Context()); err != nil || len(list) != 1 || list[0].Problem != nil {
				c.Errorf("List() = %v, %v", list, err)
			}
			c.want4("proxy")
		},
		"List keeps what is known": func(c *listenersCase) {
			c.listen("tcp4", v4, "proxy", group)
			mustAdd(c, c.r, c.w)
			c.listen("tcp4", v4, "proxy", group)
			before := c.known(unix.AF_INET)
			if _, err := c.r.List(c.Context()); err != nil {
				c.Fatal(err)
			}
			if after := c.known(unix.AF_INET); before == 0 || after != before {
				c.Errorf("socket %d was replaced by %d", before, after)
			}
		},
		"another namespace": func(c *listenersCase) {
			c.pod.Sysctl(c, "net/ipv4/tcp_syncookies", "1")
			other := &listenersCase{T: c.T, r: c.r, pod: c.peer, w: workload(c, c.peer)}
			other.listen("tcp", both, "proxy of the peer")
			mustAdd(c, c.r, c.w)
			c.want4("")
			c.wantKnown(unix.AF_INET6, false)
		},
		"an app on loopback": func(c *listenersCase) {
			c.listen("tcp4", "127.0.0.1", "app")
			mustAdd(c, c.r, c.w)
			c.listen("tcp6", "[::1]", "app")
			c.listen("tcp4", "127.0.0.7", "app")
			c.wantKnown(unix.AF_INET, false)
			c.wantKnown(unix.AF_INET6, false)
			c.want4("")
			c.want6("")
		},
		"an app on one interface": func(c *listenersCase) {
			lo := func(fd int) error { return unix.BindToDevice(fd, "lo") }
			c.listen("tcp4", v4, "app", lo)
			mustAdd(c, c.r, c.w)
			c.listen("tcp6", v6, "app", lo)
			c.wantKnown(unix.AF_INET, false)
			c.wantKnown(unix.AF_INET6, false)
			c.want4("")
			c.want6("")
		},
		"an app on a mapped address": func(c *listenersCase) {
			mapped := &unix.SockaddrInet6{Port: int(redirect.InboundPort), Addr: netip.MustParseAddr("::ffff:127.0.0.1").As16()}
			old := c.rawListen(mapped)
			mustAdd(c, c.r, c.w)
			c.wantKnown(unix.AF_INET6, false)
			if err := unix.Close(old); err != nil {
				c.Fatal(err)
			}
			fresh := c.rawListen(mapped)
			defer func() { _ = unix.Close(fresh) }()
			c.wantKnown(unix.AF_INET6, false)
			c.want4("")
		},
		"an app beside the proxy, IPv6 alone": func(c *listenersCase) {
			app := c.listen("tcp6", v6, "app")
			mustAdd(c, c.r, c.w)
			s := c.listen("tcp4", v4, "proxy")
			c.want4("proxy")
			s.Close()
			c.want4("")
			app.Close()
			c.listen("tcp6", v6, "app")
			c.want4("")
		},
		"removed": func(c *listenersCase) {
			mustAdd(c, c.r, c.w)
			c.listen("tcp4", v4, "proxy")
			if err := c.r.Remove(c.Context(), c.w.ID); err != nil {
				c.Fatal(err)
			}
			c.wantKnown(unix.AF_INET, false)
			c.listen("tcp6", v6, "proxy")
			c.wantKnown(unix.AF_INET6, false)
			c.want4("app")
		},
	}
}

// listen has a server listen on the pod's inbound port.
func (c *listenersCase) listen(network, host, name string, options ...func(fd int) error) *netnstest.Server {
	c.Helper()
	lc := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var errs []error
		errs = append(errs, raw.Control(func(fd uintptr) {
			for _, set := range options {
				errs = append(errs, set(int(fd)))
			}
		}))
		return errors.Join(errs...)
	}}
	lc.SetMultipathTCP(false)
	var l net.Listener
	err := c.pod.Do(func() (err error) {
		l, err = lc.Listen(c.Context(), network, fmt.Sprintf("%s:%d", host, redirect.InboundPort))
		return err
	})
	if err != nil {
		c.Fatal(err)
	}
	return netnstest.ServeOn(c, l, name)
}

// rawListen returns a socket that listens in the pod, where net would not do.
func (c *listenersCase) rawListen(at unix.Sockaddr) (fd int) {
	c.Helper()
	domain := unix.AF_INET
	if _, ok := at.(*unix.SockaddrInet6); ok {
		domain = unix.AF_INET6
	}
	err := c.pod.Do(func() (err error) {
		if fd, err = unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP); err != nil {
			return err
		}
		return errors.Join(with(unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)(fd), unix.Bind(fd, at), unix.Listen(fd, 1))
	})
	if err != nil {
		c.Fatal(err)
	}
	return fd
}

// known returns the cookie of the socket that is known for a family, 0: none.
func (c *listenersCase) known(family uint32) (socket uint64) {
	c.Helper()
	err := c.r.store.Listeners.Lookup(&redirectSlListenerKey{Netns: c.cookie, Family: family}, &socket)
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		c.Fatal(err)
	}
	return socket
}

func (c *listenersCase) wantKnown(family uint32, want bool) {
	c.Helper()
	if got := c.known(family) != 0; got != want {
		c.Errorf("a listener of family %d is known: %v, want %v", family, got, want)
	}
}

func (c *listenersCase) want4(name string) { c.Helper(); c.want(c.pod.Addr4, name) }
func (c *listenersCase) want6(name string) { c.Helper(); c.want(c.pod.Addr6, name) }

// want checks who answers the peer at the app's port; "": nobody.
func (c *listenersCase) want(addr netip.Addr, name string) {
	c.Helper()
	to := netip.AddrPortFrom(addr, 80)
	if name != "" {
		wantName(c, c.peer.Namespace, to, name)
		return
	}
	ctx, cancel := context.WithTimeout(c.Context(), 300*time.Millisecond)
	defer cancel()
	if a, err := c.peer.Ask(ctx, to); err == nil {
		c.Errorf("%q answers at %s, want nobody", a.Name, to)
	}
}
