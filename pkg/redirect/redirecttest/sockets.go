package redirecttest

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/tests/netnstest"
)

// socketCases are the ways in which programs make, bind, hand on and connect
// their sockets. Redirection is felt in none of them.
func socketCases() []testCase {
	return []testCase{
		{name: "socket/fast open, connect and write", proxy: tell, run: func(e *env) {
			fd := e.rawSocket(e.pod.Namespace, socket{domain: e.domain(), prepare: func(fd int) error {
				return unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_FASTOPEN_CONNECT, 1)
			}})
			if err := rawConnect(e.pod.Namespace, fd, sockaddr(e.domain(), e.peerPort(appPort))); err != nil {
				e.Fatalf("connect: %v", err)
			}
			// With a cookie in hand the SYN leaves with the first data only.
			if _, err := unix.Write(fd, []byte("hello")); err != nil {
				e.Fatalf("write: %v", err)
			}
			c := e.conn(fd)
			e.wantOutbound(c, e.answer(c), e.peerPort(appPort))
		}},
		{name: "socket/fast open with data in the SYN", proxy: tell, run: func(e *env) {
			// Every listener of the pod takes data in a SYN: 1 client, 2 server,
			// 4 without a cookie, 0x400 without a socket option.
			e.pod.Sysctl(e, "net/ipv4/tcp_fastopen", "1543")
			e.peer.Sysctl(e, "net/ipv4/tcp_fastopen", "7")
			for i := range 3 {
				to := netip.AddrPortFrom(e.peerAddr(), appPort+uint16(i))
				c := e.conn(e.fastOpen(e.pod.Namespace, to))
				e.wantOutbound(c, e.answer(c), to)
				in := e.conn(e.fastOpen(e.peer.Namespace, e.podPort(appPort)))
				e.wantInbound(e.answer(in), e.podPort(appPort), e.peerAddr())
			}
		}},
		{name: "socket/bound to the pod's address", proxy: tell, run: func(e *env) {
			for _, src := range []netip.AddrPort{e.podPort(0), e.podPort(23456), netip.AddrPortFrom(e.unspecified(), 23457)} {
				fd := e.rawSocket(e.pod.Namespace, socket{domain: e.domain(), prepare: func(fd int) error {
					return unix.Bind(fd, sockaddr(e.domain(), src))
				}})
				if err := rawConnect(e.pod.Namespace, fd, sockaddr(e.domain(), e.peerPort(appPort))); err != nil {
					e.Fatalf("connect from %s: %v", src, err)
				}
				c := e.conn(fd)
				a := e.answer(c)
				e.wantOutbound(c, a, e.peerPort(appPort))
				if src.Port() != 0 && a.Peer != e.podPort(src.Port()) {
					e.Errorf("bound to %s, the proxy sees %s", src, a.Peer)
				}
			}
		}},
		{name: "socket/port chosen at connect", proxy: tell, run: func(e *env) {
			fd := e.rawSocket(e.pod.Namespace, socket{domain: e.domain(), prepare: func(fd int) error {
				return errors.Join(unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1),
					unix.Bind(fd, sockaddr(e.domain(), e.podPort(0))))
			}})
			if err := rawConnect(e.pod.Namespace, fd, sockaddr(e.domain(), e.peerPort(appPort))); err != nil {
				e.Fatalf("connect: %v", err)
			}
			c := e.conn(fd)
			e.wantOutbound(c, e.answer(c), e.peerPort(appPort))
		}},
		{name: "socket/epoll", proxy: tell, run: func(e *env) {
			fd := e.rawSocket(e.pod.Namespace, socket{domain: e.domain(), nonblocking: true})
			if err := e.pod.Do(func() error { return epollConnect(fd, sockaddr(e.domain(), e.peerPort(appPort))) }); err != nil {
				e.Fatalf("connect: %v", err)
			}
			c := e.conn(fd)
			e.wantOutbound(c, e.answer(c), e.peerPort(appPort))
		}},
		{name: "socket/io_uring", proxy: tell, run: func(e *env) {
			fd := e.rawSocket(e.pod.Namespace, socket{domain: e.domain()})
			if err := e.pod.Do(func() error { return uringConnect(fd, e.peerPort(appPort)) }); err != nil {
				e.Fatalf("connect: %v", err)
			}
			c := e.conn(fd)
			e.wantOutbound(c, e.answer(c), e.peerPort(appPort))
		}},
		{name: "socket/inherited over exec", proxy: tell, run: func(e *env) {
			_, theirs := e.socketPair()
			fd := e.rawSocket(e.pod.Namespace, socket{domain: e.domain()})
			f := os.NewFile(uintptr(fd), "socket")
			defer func() { _ = f.Close() }()
			app := startIn(e, e.pod.Namespace, "", 1000, dialer, theirs, f)
			r, err := app.obey(order{Dial: e.peerPort(appPort), Fd: peerFd + 1})
			if err != nil {
				e.Fatal(err)
			}
			e.wantSeen(r.Answer, r.Local, r.Peer, e.peerPort(appPort))
		}},
		{name: "socket/passed to another process", proxy: tell, run: func(e *env) {
			// Before and after it is connected, in the pod and outside of it: a
			// socket is its namespace's, whoever has it.
			for _, ns := range []netnstest.Namespace{e.pod.Namespace, e.peer.Namespace} {
				for _, connected := range []bool{false, true} {
					ours, theirs := e.socketPair()
					app := startIn(e, ns, "", 1000, dialer, theirs)
					fd := e.rawSocket(e.pod.Namespace, socket{domain: e.domain()})
					o := order{Receive: true, Dial: e.peerPort(appPort)}
					if connected {
						o.Dial = netip.AddrPort{}
						if err := rawConnect(e.pod.Namespace, fd, sockaddr(e.domain(), e.peerPort(appPort))); err != nil {
							e.Fatalf("connect: %v", err)
						}
					}
					err := unix.Sendmsg(int(ours.Fd()), []byte{0}, unix.UnixRights(fd), nil, 0)
					_ = unix.Close(fd)
					if err != nil {
						e.Fatalf("pass socket: %v", err)
					}
					r, err := app.obey(o)
					if err != nil {
						e.Fatalf("process in %s, connected before: %v: %v", ns.Name, connected, err)
					}
					e.wantSeen(r.Answer, r.Local, r.Peer, e.peerPort(appPort))
				}
			}
		}},
		{
			name: "socket/made by the proxy, connected by the app", proxy: tell,
			skip: map[redirect.Backend]string{
				redirect.BackendIPTables: "a packet's owner is who made the socket, not who connected it: it passes as the proxy's",
			},
			run: func(e *env) {
				fd := -1
				err := e.pod.Do(func() (err error) {
					// Of this thread alone, which Do gives to nobody else meanwhile.
					if _, err := unix.SetfsuidRetUid(int(e.w.Policy.ProxyUID)); err != nil {
						return err
					}
					fd, err = unix.Socket(e.domain(), unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
					_, back := unix.SetfsuidRetUid(0)
					return errors.Join(err, back)
				})
				if err != nil {
					e.Fatalf("make socket: %v", err)
				}
				if err := rawConnect(e.pod.Namespace, fd, sockaddr(e.domain(), e.peerPort(appPort))); err != nil {
					e.Fatalf("connect: %v", err)
				}
				c := e.conn(fd)
				e.wantOutbound(c, e.answer(c), e.peerPort(appPort))
			},
		},
		{name: "socket/connected once more", proxy: tell, run: func(e *env) {
			fd := e.rawSocket(e.pod.Namespace, socket{domain: e.domain()})
			if err := rawConnect(e.pod.Namespace, fd, sockaddr(e.domain(), e.peerPort(appPort))); err != nil {
				e.Fatalf("connect: %v", err)
			}
			if err := rawConnect(e.pod.Namespace, fd, sockaddr(e.domain(), e.peerPort(9))); !errors.Is(err, unix.EISCONN) {
				e.Errorf("connect a connected socket: got %v, want EISCONN", err)
			}
			c := e.conn(fd)
			e.wantOutbound(c, e.answer(c), e.peerPort(appPort))
		}},
		{
			name: "socket/disconnected and used again", proxy: tell,
			policy: func(e *env, p *redirect.Policy) { p.Outbound.ExcludePorts.List = []uint16{8081} },
			run: func(e *env) {
				e.serve(e.peer.Namespace, 8081, "peer")
				keep := e.rawSocket(e.pod.Namespace, socket{domain: e.domain()})
				e.Cleanup(func() { _ = unix.Close(keep) })
				for i, to := range []netip.AddrPort{e.peerPort(appPort), e.peerPort(8081), e.peerPort(9), e.podPort(appPort), e.peerPort(appPort)} {
					if i > 0 {
						if err := e.pod.Do(func() error { return disconnect(keep) }); err != nil {
							e.Fatalf("disconnect: %v", err)
						}
					}
					if err := rawConnect(e.pod.Namespace, keep, sockaddr(e.domain(), to)); err != nil {
						e.Fatalf("connect to %s: %v", to, err)
					}
					again, err := unix.Dup(keep)
					if err != nil {
						e.Fatal(err)
					}
					c := e.conn(again)
					a := e.answer(c)
					switch to {
					case e.peerPort(8081):
						e.wantBare(a, "peer")
					case e.podPort(appPort):
						e.wantBare(a, "app")
					default:
						e.wantOutbound(c, a, to)
					}
					if got := netnstest.AddrPort(c.RemoteAddr()); got != to {
						e.Errorf("getpeername says %s, want %s", got, to)
					}
				}
			},
		},
		{name: "socket/getpeername and getsockname of both ends", proxy: tell, run: func(e *env) {
			// What is accepted keeps its real peer; the local address is where the
			// client wanted to go with eBPF, so only SO_ORIGINAL_DST says it for both.
			in, a := e.connect(e.peer.Namespace, e.podPort(appPort))
			e.wantInbound(a, e.podPort(appPort), e.peerAddr())
			if got := netnstest.AddrPort(in.LocalAddr()); got != a.Peer {
				e.Errorf("the client's socket says %s, the proxy sees %s", got, a.Peer)
			}
			if got := netnstest.AddrPort(in.RemoteAddr()); got != e.podPort(appPort) {
				e.Errorf("the client's getpeername says %s, want %s", got, e.podPort(appPort))
			}
			out, a := e.connect(e.pod.Namespace, e.peerPort(appPort))
			e.wantOutbound(out, a, e.peerPort(appPort))
			if out.LocalAddr().(*net.TCPAddr).AddrPort().Addr().Unmap() != e.podAddr() {
				e.Errorf("getsockname says %s, want the pod's %s", out.LocalAddr(), e.podAddr())
			}
		}},
	}
}

// fastOpen sends data with MSG_FASTOPEN on a new socket.
func (e *env) fastOpen(from netnstest.Namespace, to netip.AddrPort) int {
	e.Helper()
	fd := e.rawSocket(from, socket{domain: e.domain()})
	if err := from.Do(func() error { return unix.Sendto(fd, []byte("hello"), unix.MSG_FASTOPEN, sockaddr(e.domain(), to)) }); err != nil {
		e.Fatalf("send with MSG_FASTOPEN: %v", err)
	}
	return fd
}

// socketPair returns both ends of a pair over which descriptors can be passed.
func (e *env) socketPair() (ours, theirs *os.File) {
	e.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		e.Fatalf("make socket pair: %v", err)
	}
	ours, theirs = os.NewFile(uintptr(fds[0]), "ours"), os.NewFile(uintptr(fds[1]), "theirs")
	e.Cleanup(func() { _, _ = ours.Close(), theirs.Close() })
	return ours, theirs
}

// epollConnect connects a non-blocking socket and waits with epoll, edge-triggered.
func epollConnect(fd int, to unix.Sockaddr) error {
	ep, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return fmt.Errorf("make epoll: %w", err)
	}
	defer func() { _ = unix.Close(ep) }()
	if err := unix.Connect(fd, to); !errors.Is(err, unix.EINPROGRESS) {
		return fmt.Errorf("begin to connect: got %w, want EINPROGRESS", err)
	}
	ev := unix.EpollEvent{Events: unix.EPOLLOUT | unix.EPOLLET, Fd: int32(fd)}
	if err := unix.EpollCtl(ep, unix.EPOLL_CTL_ADD, fd, &ev); err != nil {
		return fmt.Errorf("add to epoll: %w", err)
	}
	var evs [1]unix.EpollEvent
	for deadline := time.Now().Add(askTimeout); ; {
		n, err := unix.EpollWait(ep, evs[:], int(time.Until(deadline).Milliseconds()))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n == 0 {
			return fmt.Errorf("wait: %d events, %w", n, errors.Join(err, unix.ETIMEDOUT))
		}
		break
	}
	errno, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err == nil && errno != 0 {
		err = syscall.Errno(errno)
	}
	return err
}

// disconnect makes a connected socket one that may connect again. x/sys cannot
// name AF_UNSPEC to connect(2).
func disconnect(fd int) error {
	addr := make([]byte, unix.SizeofSockaddrInet6) // sa_family 0
	_, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&addr[0])), uintptr(len(addr)))
	if errno != 0 {
		return errno
	}
	return nil
}
