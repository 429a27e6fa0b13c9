package redirecttest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/tests/netnstest"
)

// connectionsEnv sets how many short connections the cases of port reuse open:
// 50000 is what is promised, and takes minutes over all cases.
const connectionsEnv = "SLUICE_TEST_CONNECTIONS"

// burst is how many connections are opened at once.
const burst = 5000

// burstCases are many connections, at once or one after the other: client ports
// are used again while sockets of earlier connections are still in TIME_WAIT.
func burstCases() []testCase {
	return []testCase{
		{name: "burst/outbound", proxy: tell, run: func(e *env) { e.burst(outward, burst) }},
		{name: "burst/inbound", proxy: tell, run: func(e *env) { e.burst(inward, burst) }},
		{name: "burst/outbound with SYN cookies", proxy: tell, run: func(e *env) {
			e.pod.Sysctl(e, "net/ipv4/tcp_syncookies", "2")
			e.burst(outward, 500)
		}},
		{name: "ports again/outbound, client closes first", proxy: tell, run: func(e *env) { e.portsAgain(outward, true) }},
		{name: "ports again/outbound, server closes first", proxy: brief, run: func(e *env) { e.portsAgain(outward, false) }},
		{name: "ports again/inbound, client closes first", proxy: tell, run: func(e *env) { e.portsAgain(inward, true) }},
		{name: "ports again/inbound, server closes first", proxy: brief, run: func(e *env) { e.portsAgain(inward, false) }},
		{name: "ports again/for other destinations", proxy: tell, run: func(e *env) {
			// Fewer ports than connections, but more than to any one destination:
			// without redirection none would have to wait for a port. With eBPF they
			// wait for a second, as long as a port stays in TIME_WAIT; not a minute.
			e.pod.Sysctl(e, "net/ipv4/ip_local_port_range", "20000 20099")
			var to []netip.AddrPort
			for i := range 4 {
				to = append(to, e.peerPort(appPort+uint16(i)))
			}
			e.short(shortRun{from: e.pod.Namespace, to: to, port: redirect.OutboundPort, n: 4 * 40, clientFirst: true, anyPort: true})
		}},
		{
			name: "ports again/one port for two destinations at once", proxy: tell,
			skip: map[redirect.Backend]string{
				redirect.BackendEBPF: "all connections of a pod lead to one address of the proxy, so a client port serves one of them at a time: connect fails with EADDRNOTAVAIL",
			},
			run: func(e *env) {
				for _, dst := range []netip.AddrPort{e.peerPort(appPort), e.peerPort(8081)} {
					fd := e.rawSocket(e.pod.Namespace, socket{domain: e.domain(), prepare: func(fd int) error {
						return errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1),
							unix.Bind(fd, sockaddr(e.domain(), e.podPort(23458))))
					}})
					if err := rawConnect(e.pod.Namespace, fd, sockaddr(e.domain(), dst)); err != nil {
						e.Fatalf("connect to %s: %v", dst, err)
					}
					// NAT gives the second another port on its way to the proxy.
					e.wantProxy(e.answer(e.conn(fd)), redirect.OutboundPort, dst)
				}
			},
		},
	}
}

// connections is how many short connections to open.
func connections(tb testing.TB) int {
	tb.Helper()
	s, ok := os.LookupEnv(connectionsEnv)
	if !ok {
		return 2000
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 {
		tb.Fatalf("%s: want a number, got %q", connectionsEnv, s)
	}
	return n
}

// way returns from where to where, and which port of the proxy, connections of
// a way go.
func (e *env) way(way int) (from netnstest.Namespace, to netip.AddrPort, port uint16) {
	e.Helper()
	if way == outward {
		return e.pod.Namespace, e.peerPort(appPort), redirect.OutboundPort
	}
	return e.peer.Namespace, e.podPort(appPort), redirect.InboundPort
}

// portsAgain opens so many short connections to one destination that each client
// port is used at least twice.
func (e *env) portsAgain(way int, clientFirst bool) {
	e.Helper()
	from, to, port := e.way(way)
	n := connections(e)
	ports := min(n/2, 28000)
	from.Sysctl(e, "net/ipv4/ip_local_port_range", fmt.Sprintf("20000 %d", 20000+ports-1))
	// A client's TIME_WAIT gives its port back after a second, not a minute.
	from.Sysctl(e, "net/ipv4/tcp_tw_reuse", "1")
	e.short(shortRun{from: from, to: []netip.AddrPort{to}, port: port, n: n, clientFirst: clientFirst})
}

// A shortRun is a number of connections, to one destination after the other, that
// the proxy gets on port.
type shortRun struct {
	from        netnstest.Namespace
	to          []netip.AddrPort
	port        uint16
	n           int
	clientFirst bool
	// anyPort is set where NAT may have to give the proxy another client port.
	anyPort bool
}

// short opens the connections, a few at a time, and checks that the proxy knows
// of each where it was to go and where it comes from.
func (e *env) short(r shortRun) {
	e.Helper()
	const workers = 4
	var next, waited, slow atomic.Int64
	var wg sync.WaitGroup
	errs := make(chan error, workers)
	for range workers {
		wg.Go(func() {
			errs <- r.from.Do(func() error {
				for i := next.Add(1) - 1; i < int64(r.n); i = next.Add(1) - 1 {
					began := time.Now()
					w, err := e.shortOne(r, r.to[int(i)*len(r.to)/r.n])
					if err != nil {
						next.Store(int64(r.n)) // the others end, too
						return fmt.Errorf("connection %d: %w", i, err)
					}
					waited.Add(w)
					if w == 0 && time.Since(began) > 900*time.Millisecond {
						slow.Add(1)
					}
				}
				return nil
			})
		})
	}
	began := time.Now()
	wg.Wait()
	close(errs)
	for err := range errs {
		if err != nil {
			e.Error(err)
		}
	}
	e.Logf("%d connections in %s, %d waits for a port, %d took a second or more",
		r.n, time.Since(began).Round(time.Millisecond), waited.Load(), slow.Load())
}

// shortOne is one connection of short, on the calling thread.
func (e *env) shortOne(r shortRun, to netip.AddrPort) (waits int64, err error) {
	timeout := unix.NsecToTimeval(askTimeout.Nanoseconds())
	var fd int
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(askTimeout); ; waits++ {
		fd, err = unix.Socket(e.domain(), unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
		if err != nil {
			return waits, err
		}
		err = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout)
		if err == nil {
			err = connect(fd, sockaddr(e.domain(), to))
		}
		if !errors.Is(err, unix.EADDRNOTAVAIL) || time.Now().After(deadline) {
			break
		}
		_ = unix.Close(fd)
		<-tick.C
	}
	defer func() { _ = unix.Close(fd) }()
	if err != nil {
		return waits, fmt.Errorf("connect to %s: %w", to, err)
	}
	buf := make([]byte, 1024)
	n := 0
	for end := r.clientFirst; ; {
		got, err := unix.Read(fd, buf[n:])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return waits, fmt.Errorf("read from %s: %w", to, err)
		}
		n += got
		if got == 0 || end && bytes.IndexByte(buf[:n], '\n') >= 0 {
			break
		}
	}
	return waits, checkAnswer(fd, buf[:n], r.port, to, r.anyPort)
}

// checkAnswer checks what the proxy says of the connection of fd to dst.
func checkAnswer(fd int, line []byte, port uint16, dst netip.AddrPort, anyPort bool) error {
	var a answer
	if err := json.Unmarshal(line, &a); err != nil {
		return fmt.Errorf("answer %q: %w", line, err)
	}
	local, err := sockname(fd)
	if err != nil {
		return err
	}
	if anyPort && a.Peer.Addr() == local.Addr() {
		local = a.Peer
	}
	if a.Name != "proxy" || a.Port != port || a.Orig != dst || a.Peer != local {
		return fmt.Errorf("%q on %d answers, to go to %s from %s (%s); want the proxy on %d, %s and %s",
			a.Name, a.Port, a.Orig, a.Peer, a.OrigErr, port, dst, local)
	}
	return nil
}

// sockname is getsockname(2).
func sockname(fd int) (netip.AddrPort, error) {
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("getsockname: %w", err)
	}
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port)), nil
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port)), nil
	}
	return netip.AddrPort{}, fmt.Errorf("getsockname: unexpected %T", sa)
}

// burst begins n connections before it looks at any, and then wants each to be
// answered with what is true of it.
func (e *env) burst(way, n int) {
	e.Helper()
	from, to, port := e.way(way)
	if err := from.Do(func() error { return burstOf(e.domain(), to, port, n) }); err != nil {
		e.Error(err)
	}
	e.wantEmpty("handover")
}

func burstOf(domain int, to netip.AddrPort, port uint16, n int) (err error) {
	ep, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return fmt.Errorf("make epoll: %w", err)
	}
	defer func() { err = errors.Join(err, unix.Close(ep)) }()
	lines := make(map[int][]byte, n)
	defer func() {
		for fd := range lines {
			_ = unix.Close(fd)
		}
	}()
	for range n {
		fd, err := unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
		if err != nil {
			return fmt.Errorf("make socket: %w", err)
		}
		lines[fd] = nil
		if err := unix.Connect(fd, sockaddr(domain, to)); !errors.Is(err, unix.EINPROGRESS) {
			return fmt.Errorf("begin to connect: got %w, want EINPROGRESS", err)
		}
		if err := unix.EpollCtl(ep, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)}); err != nil {
			return fmt.Errorf("add to epoll: %w", err)
		}
	}
	evs := make([]unix.EpollEvent, 256)
	buf := make([]byte, 1024)
	// A SYN that finds the listener's queue full is sent again: after 1, 3, 7, 15 s.
	for deadline := time.Now().Add(60 * time.Second); len(lines) > 0; {
		if time.Now().After(deadline) {
			return fmt.Errorf("%d of %d connections have no answer", len(lines), n)
		}
		ready, err := unix.EpollWait(ep, evs, 1000)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("wait: %w", err)
		}
		for _, ev := range evs[:max(ready, 0)] {
			fd := int(ev.Fd)
			got, err := unix.Read(fd, buf)
			if err != nil || got == 0 {
				return fmt.Errorf("read: %d bytes, %w; %d of %d connections are left", got, err, len(lines), n)
			}
			if lines[fd] = append(lines[fd], buf[:got]...); lines[fd][len(lines[fd])-1] != '\n' {
				continue
			}
			if err := checkAnswer(fd, lines[fd], port, to, false); err != nil {
				return err
			}
			delete(lines, fd)
			if err := unix.Close(fd); err != nil {
				return fmt.Errorf("close: %w", err)
			}
		}
	}
	return nil
}
