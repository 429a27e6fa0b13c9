package redirecttest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/tests/netnstest"
)

const (
	// talkPort is where servers of these cases listen, beside appPort.
	talkPort uint16 = 8090
	// bufferMax is what a socket may hold each way where memory is measured.
	bufferMax = 1 << 20
)

// streamCases are what becomes of a connection once it is open: ends, halves,
// silence, more than the other end reads. They run through a proxy that passes
// bytes on, as Envoy does, outbound to a peer and inbound to the app.
func streamCases() []testCase {
	return []testCase{
		{name: "stream/half close by the client", proxy: onward, run: func(e *env) {
			e.eachWay(func(client, server *net.TCPConn) {
				e.wantHalfClose(client, server)
			})
		}},
		{name: "stream/half close by the server", proxy: onward, run: func(e *env) {
			e.eachWay(func(client, server *net.TCPConn) {
				e.wantHalfClose(server, client)
			})
		}},
		{name: "stream/reset by the client", proxy: onward, run: func(e *env) {
			e.eachWay(func(client, server *net.TCPConn) { e.wantReset(client, server) })
		}},
		{name: "stream/reset by the server", proxy: onward, run: func(e *env) {
			e.eachWay(func(client, server *net.TCPConn) { e.wantReset(server, client) })
		}},
		{name: "stream/urgent data", proxy: tell, run: func(e *env) {
			// A proxy has no urgent data to pass on; what matters is that the
			// connection is as with a server that does not ask for it either.
			out, _ := e.connect(e.pod.Namespace, e.peerPort(talkPort))
			in, _ := e.connect(e.peer.Namespace, e.podPort(appPort))
			self, _ := e.connect(e.pod.Namespace, e.podPort(appPort))
			bare := e.withUrgent(self)
			for name, c := range map[string]net.Conn{"outbound": out, "inbound": in} {
				if got := e.withUrgent(c); got != bare {
					e.Errorf("%s: %q comes back, %q without a proxy", name, got, bare)
				}
			}
		}},
		{name: "stream/long idle", proxy: onward, run: func(e *env) {
			e.wantAliveAfter(1500 * time.Millisecond)
		}},
		{
			name: "stream/idle for longer than the kernel tracks", proxy: onward,
			skip: map[redirect.Backend]string{
				redirect.BackendIPTables: "the kernel forgets a connection that is silent for longer than net.netfilter.nf_conntrack_tcp_timeout_established, 5 days, and its NAT with it",
			},
			run: func(e *env) {
				e.pod.Sysctl(e, "net/netfilter/nf_conntrack_tcp_timeout_established", "1")
				e.wantAliveAfter(1500 * time.Millisecond)
			},
		},
		{name: "stream/nobody reads", proxy: onward, run: func(e *env) {
			for _, ns := range []netnstest.Namespace{e.pod.Namespace, e.peer.Namespace} {
				for _, v := range []string{"tcp_rmem", "tcp_wmem"} {
					ns.Sysctl(e, "net/ipv4/"+v, fmt.Sprintf("4096 131072 %d", bufferMax))
				}
			}
			// The proxy's listeners took what was set before.
			e.startProxy(onward)
			e.eachWay(func(client, server *net.TCPConn) {
				e.wantBounded(client, server)
			})
		}},
		{name: "destination/refuses", proxy: onward, run: func(e *env) {
			e.wantEnds(e.pod.Namespace, e.peerPort(9))
			e.wantEnds(e.peer.Namespace, e.podPort(9))
		}},
		{
			name: "destination/refuses, not captured", proxy: tell,
			policy: func(e *env, p *redirect.Policy) {
				p.Outbound.ExcludePorts.List, p.Inbound.ExcludePorts.List = []uint16{9}, []uint16{9}
			},
			run: func(e *env) {
				for from, to := range map[netnstest.Namespace]netip.AddrPort{e.pod.Namespace: e.peerPort(9), e.peer.Namespace: e.podPort(9)} {
					if _, err := e.dial(from, to, askTimeout); !errors.Is(err, unix.ECONNREFUSED) {
						e.Errorf("connect to %s: got %v, want ECONNREFUSED", to, err)
					}
				}
			},
		},
		{name: "destination/unreachable", proxy: onward, run: func(e *env) {
			// The node has no way to it and says so: to the proxy.
			dst := netip.AddrPortFrom(e.family(netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")), 443)
			e.wantEnds(e.pod.Namespace, dst)
		}},
		{
			name: "destination/unreachable, not captured", proxy: tell,
			policy: func(e *env, p *redirect.Policy) { p.Outbound.ExcludePorts.List = []uint16{443} },
			run: func(e *env) {
				dst := netip.AddrPortFrom(e.family(netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")), 443)
				_, err := e.dial(e.pod.Namespace, dst, askTimeout)
				if !errors.Is(err, unix.ENETUNREACH) && !errors.Is(err, unix.EHOSTUNREACH) {
					e.Errorf("connect: got %v, want the node's own answer", err)
				}
			},
		},
		{
			name: "destination/the pod has no route to it", proxy: tell,
			skip: map[redirect.Backend]string{
				redirect.BackendIPTables: "the kernel looks for a route before nat OUTPUT: connect fails, as without redirection",
			},
			run: func(e *env) {
				e.pod.Unreachable(e, e.documentationRange())
				dst := netip.AddrPortFrom(e.documentationRange().Addr().Next(), 443)
				c, a := e.connect(e.pod.Namespace, dst)
				e.wantOutbound(c, a, dst)
			},
		},
		{name: "destination/black hole", proxy: onward, run: func(e *env) {
			e.node.BlackHole(e, e.documentationRange())
			dst := netip.AddrPortFrom(e.documentationRange().Addr().Next(), 443)
			c, err := e.dial(e.pod.Namespace, dst, askTimeout)
			if err != nil {
				e.Fatalf("connect: %v", err) // the proxy takes it
			}
			if got := netnstest.AddrPort(c.RemoteAddr()); got != dst {
				e.Errorf("getpeername says %s, want %s", got, dst)
			}
			if err := c.SetReadDeadline(time.Now().Add(300 * time.Millisecond)); err != nil {
				e.Fatal(err)
			}
			if n, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
				e.Errorf("read: %d, %v; nobody is there to answer or to close", n, err)
			}
			if err := c.Close(); err != nil {
				e.Errorf("close: %v", err)
			}
			// Others are not held up, and nothing is left of it.
			e.wantBare(e.ask(e.pod.Namespace, e.peerPort(appPort)), "peer")
			e.wantEmpty("handover")
		}},
		{
			name: "destination/black hole, not captured", proxy: tell,
			policy: func(e *env, p *redirect.Policy) { p.Outbound.ExcludePorts.List = []uint16{443} },
			run: func(e *env) {
				e.node.BlackHole(e, e.documentationRange())
				dst := netip.AddrPortFrom(e.documentationRange().Addr().Next(), 443)
				_, err := e.dial(e.pod.Namespace, dst, 300*time.Millisecond)
				if late := net.Error(nil); !errors.As(err, &late) || !late.Timeout() {
					e.Errorf("connect: got %v, want no answer within its time", err)
				}
			},
		},
	}
}

// documentationRange is the case's range in which nobody lives.
func (e *env) documentationRange() netip.Prefix {
	e.Helper()
	for _, p := range documentation() {
		if p.Addr().Is4() == e.v4 {
			return p
		}
	}
	e.Fatal("no range of the family")
	return netip.Prefix{}
}

// ways are the two that a connection may take through the proxy.
const (
	outward = iota
	inward
	ways
)

// eachWay hands over both ends of a connection of either way.
func (e *env) eachWay(do func(client, server *net.TCPConn)) {
	e.Helper()
	for way := range ways {
		do(e.openWay(way))
	}
}

// openWay opens a connection through the proxy to a server that says nothing.
func (e *env) openWay(way int) (client, server *net.TCPConn) {
	e.Helper()
	from, to, addr := e.pod.Namespace, e.peer.Namespace, e.peerPort(talkPort)
	if way == inward {
		from, to, addr = to, from, e.podPort(talkPort)
	}
	l, err := to.Listen(e.Context(), "tcp", netip.AddrPortFrom(e.unspecified(), talkPort).String())
	if err != nil {
		e.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	c, err := e.dial(from, addr, askTimeout)
	if err != nil {
		e.Fatalf("connect to %s: %v", addr, err)
	}
	e.Cleanup(func() { _ = c.Close() })
	if err := l.(*net.TCPListener).SetDeadline(time.Now().Add(askTimeout)); err != nil {
		e.Error(err)
	}
	s, err := l.Accept()
	if err != nil {
		e.Fatalf("the server of %s: %v", addr, err)
	}
	e.Cleanup(func() { _ = s.Close() })
	deadline := time.Now().Add(2 * askTimeout)
	if err := errors.Join(c.SetDeadline(deadline), s.SetDeadline(deadline)); err != nil {
		e.Error(err)
	}
	return c.(*net.TCPConn), s.(*net.TCPConn)
}

// wantAliveAfter lets a connection of either way be silent for as long, and then
// talks over it.
func (e *env) wantAliveAfter(silence time.Duration) {
	e.Helper()
	var clients, servers [ways]*net.TCPConn
	for way := range ways {
		clients[way], servers[way] = e.openWay(way)
		e.wantTalk(clients[way], servers[way])
	}
	for way := range ways {
		e.waitIdle(clients[way], silence)
		e.wantTalk(clients[way], servers[way])
	}
}

// wantTalk checks that bytes go both ways.
func (e *env) wantTalk(a, b net.Conn) {
	e.Helper()
	for _, c := range [][2]net.Conn{{a, b}, {b, a}} {
		if _, err := c[0].Write([]byte("word")); err != nil {
			e.Fatalf("write: %v", err)
		}
		got := make([]byte, 4)
		if _, err := io.ReadFull(c[1], got); err != nil || string(got) != "word" {
			e.Fatalf("read: %q, %v", got, err)
		}
	}
}

// wantHalfClose closes first's half; second sees that, and can still send.
func (e *env) wantHalfClose(first, second *net.TCPConn) {
	e.Helper()
	e.wantTalk(first, second)
	if _, err := first.Write([]byte("last")); err != nil {
		e.Fatalf("write: %v", err)
	}
	if err := first.CloseWrite(); err != nil {
		e.Fatalf("close half: %v", err)
	}
	if got, err := io.ReadAll(second); err != nil || string(got) != "last" {
		e.Errorf("after one half is closed the other end reads %q, %v", got, err)
	}
	sent := bytes.Repeat([]byte("0123456789abcdef"), 64<<10/16)
	go func() {
		_, err := second.Write(sent)
		if err = errors.Join(err, second.CloseWrite()); err != nil {
			e.Errorf("send on the half that is open: %v", err)
		}
	}()
	if got, err := io.ReadAll(first); err != nil || !bytes.Equal(got, sent) {
		e.Errorf("on the half that is open %d of %d bytes arrive, %v", len(got), len(sent), err)
	}
}

// wantReset resets the connection at first; second learns that it was reset.
func (e *env) wantReset(first, second *net.TCPConn) {
	e.Helper()
	e.wantTalk(first, second)
	if err := errors.Join(first.SetLinger(0), first.Close()); err != nil {
		e.Fatalf("reset: %v", err)
	}
	if n, err := second.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		e.Errorf("after a reset at the other end: read %d, %v; want ECONNRESET", n, err)
	}
}

// withUrgent sends a line with one urgent byte in it to an echo and returns what
// comes back up to the line's end.
func (e *env) withUrgent(c net.Conn) string {
	e.Helper()
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		e.Fatal(err)
	}
	if _, err := c.Write([]byte("before ")); err != nil {
		e.Fatal(err)
	}
	var sent error
	err = raw.Write(func(fd uintptr) bool {
		sent = unix.Sendto(int(fd), []byte("!"), unix.MSG_OOB, nil)
		return !errors.Is(sent, unix.EAGAIN)
	})
	if err = errors.Join(err, sent); err != nil {
		e.Fatalf("send urgent data: %v", err)
	}
	if _, err := c.Write([]byte("after\n")); err != nil {
		e.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(e.Context(), askTimeout)
	defer cancel()
	line, err := netnstest.ReadLine(ctx, c)
	if err != nil {
		e.Fatalf("read echo: %v", err)
	}
	return string(line)
}

// waitIdle waits until nothing was sent or received on c for as long.
func (e *env) waitIdle(c *net.TCPConn, long time.Duration) {
	e.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		e.Fatal(err)
	}
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(askTimeout); ; <-tick.C {
		var info *unix.TCPInfo
		var asked error
		err := raw.Control(func(fd uintptr) { info, asked = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) })
		if err = errors.Join(err, asked); err != nil {
			e.Fatalf("ask for the state of a connection: %v", err)
		}
		if idle := time.Duration(min(info.Last_data_sent, info.Last_data_recv)) * time.Millisecond; idle >= long {
			return
		}
		if time.Now().After(deadline) {
			e.Fatal("the connection is not silent")
		}
	}
}

// wantBounded sends to a server that does not read until nothing more is taken:
// no more than the sockets on the way may hold. Then all of it arrives.
func (e *env) wantBounded(client, server *net.TCPConn) {
	e.Helper()
	// Four sockets, sender and receiver on either side of the proxy, each with
	// as much again for what the kernel counts beside the data; and the proxy's
	// own buffer.
	const most = 4*2*bufferMax + bufferMax
	random := rand.NewChaCha8([32]byte{1})
	var sent bytes.Buffer
	block := make([]byte, 64<<10)
	for sent.Len() < 4*most {
		_, _ = random.Read(block)
		// Silence for as long is taken for the end: others have the processor, too.
		if err := client.SetWriteDeadline(time.Now().Add(500 * time.Millisecond)); err != nil {
			e.Fatal(err)
		}
		n, err := client.Write(block)
		sent.Write(block[:n])
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
		if err != nil {
			e.Fatalf("write: %v", err)
		}
	}
	if sent.Len() > most {
		e.Errorf("%d bytes were taken while nobody read, more than %d", sent.Len(), most)
	}
	if err := errors.Join(client.SetWriteDeadline(time.Time{}), client.CloseWrite()); err != nil {
		e.Fatal(err)
	}
	if got, err := io.ReadAll(server); err != nil || !bytes.Equal(got, sent.Bytes()) {
		e.Errorf("%d of %d bytes arrive as they were sent, %v", len(got), sent.Len(), err)
	}
}

// wantEnds checks that a connection whose proxy finds nobody ends, and that no
// byte comes before.
func (e *env) wantEnds(from netnstest.Namespace, to netip.AddrPort) {
	e.Helper()
	c, err := e.dial(from, to, askTimeout)
	if err != nil {
		e.Errorf("connect to %s: %v; the proxy should have taken it", to, err)
		return
	}
	defer func() { _ = c.Close() }()
	if err := c.SetDeadline(time.Now().Add(askTimeout)); err != nil {
		e.Fatal(err)
	}
	if got, err := io.ReadAll(c); len(got) > 0 || err != nil && !errors.Is(err, unix.ECONNRESET) {
		e.Errorf("connection to %s: read %q, %v", to, got, err)
	}
}
