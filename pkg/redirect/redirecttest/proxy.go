package redirecttest

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/tests/netnstest"
)

// Main is for TestMain of packages that call Run: it is the proxy if this
// process was started as one, else it runs the tests and verifies that they
// leak nothing. It returns the exit code.
func Main(m *testing.M) int {
	config, ok := os.LookupEnv(proxyEnv)
	if !ok {
		return netnstest.VerifyNoLeaks(m)
	}
	if err := runProxy(config, os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "proxy:", err)
		return 1
	}
	return 0
}

const (
	// proxyEnv holds the mode of the proxy in the process that is to be one.
	proxyEnv = "SLUICE_TEST_PROXY"
	// tell: answer every connection with what the proxy sees of it.
	tell = "tell"
	// onward: do what Envoy does, connect to where the client wanted to go.
	onward = "onward"
	// dialer: do not listen, only obey; an app's process with a UID of its own.
	dialer = "dialer"
	// brief: tell, and close at once.
	brief = "brief"

	// soOriginalDst is SO_ORIGINAL_DST and IP6T_SO_ORIGINAL_DST.
	soOriginalDst = 80
)

// loopSource is what an inbound connection to a comes from when Envoy hands it
// on to the app.
func loopSource(a netip.Addr) netip.Addr {
	if a.Is4() {
		return netip.MustParseAddr("127.0.0.6")
	}
	return netip.MustParseAddr("::6")
}

// An answer is the line that a proxy in mode tell or a netnstest.Server sends.
type answer struct {
	netnstest.Answer
	// Port is the proxy's listener: 15001 or 15006; 0 from a bare server.
	Port uint16 `json:"port,omitempty"`
	// Orig is what SO_ORIGINAL_DST says, OrigErr why it says nothing.
	Orig    netip.AddrPort `json:"orig"`
	OrigErr string         `json:"orig_err,omitempty"`
}

// An order tells the proxy's process to dial, as Envoy would of its own accord.
type order struct {
	Dial netip.AddrPort
	// Bind is the source address; zero leaves it to the kernel.
	Bind netip.Addr
	// Begin, if not 0, is how many connections to begin without a look at what
	// becomes of them. They are closed at once unless Keep is set.
	Begin int
	Keep  bool
	// Fd, if not 0, is an open socket of the process to connect in place of a
	// new one; Receive takes one that is passed over peerFd first.
	Fd      int
	Receive bool
}

// peerFd is the end of a socket pair that a process is started with if it is to
// be passed sockets; what else it inherits follows.
const peerFd = 3

// A report is the answer to an order, and with neither field set the sign that
// the proxy listens.
type report struct {
	Answer answer
	Err    string
	// Local and Peer are what getsockname and getpeername say of a socket that
	// was given.
	Local, Peer netip.AddrPort
}

// A proxy is a running child process.
type proxy struct {
	cmd    *netnstest.Cmd
	orders io.WriteCloser
	mu     sync.Mutex
	lines  *bufio.Reader
}

// startProxy starts a proxy inside ns and returns when it listens.
func startProxy(tb testing.TB, ns netnstest.Namespace, uid uint32, mode string) *proxy {
	tb.Helper()
	return startIn(tb, ns, "", uid, mode)
}

// startIn is startProxy in a cgroup; "" leaves it in that of the test. The
// process inherits files as its descriptors from peerFd on.
func startIn(tb testing.TB, ns netnstest.Namespace, cgroup string, uid uint32, mode string, files ...*os.File) *proxy {
	tb.Helper()
	// The link is followed by the kernel without a look at the directories on
	// the way, which the user may not enter.
	cmd := ns.Command(tb, uid, "/proc/self/exe")
	cmd.In(cgroup)
	cmd.Env = []string{proxyEnv + "=" + mode}
	cmd.Stderr = os.Stderr
	cmd.ExtraFiles = files
	ordersR, ordersW := pipe(tb)
	reportsR, reportsW := pipe(tb)
	cmd.Stdin, cmd.Stdout = ordersR, reportsW
	if err := cmd.Start(); err != nil {
		tb.Fatalf("start proxy: %v", err)
	}
	_ = ordersR.Close()
	_ = reportsW.Close()
	p := &proxy{cmd: cmd, orders: ordersW, lines: bufio.NewReader(reportsR)}
	if _, err := p.report(); err != nil {
		tb.Fatalf("wait for proxy: %v", err)
	}
	return p
}

func pipe(tb testing.TB) (r, w *os.File) {
	tb.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		tb.Fatalf("make pipe: %v", err)
	}
	tb.Cleanup(func() { _ = r.Close(); _ = w.Close() })
	return r, w
}

// stop ends the proxy and its connections.
func (p *proxy) stop() { p.cmd.Kill() }

// dial connects from the proxy's process and returns what answers.
func (p *proxy) dial(to netip.AddrPort, bind netip.Addr) (answer, error) {
	return p.order(order{Dial: to, Bind: bind})
}

func (p *proxy) order(o order) (answer, error) {
	r, err := p.obey(o)
	return r.Answer, err
}

func (p *proxy) obey(o order) (report, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := json.NewEncoder(p.orders).Encode(o); err != nil {
		return report{}, fmt.Errorf("order a connection: %w", err)
	}
	r, err := p.report()
	if err == nil && r.Err != "" {
		err = errors.New(r.Err)
	}
	return r, err
}

func (p *proxy) report() (report, error) {
	var r report
	line, err := p.lines.ReadBytes('\n')
	if err != nil {
		return r, fmt.Errorf("read report of proxy: %w", err)
	}
	return r, json.Unmarshal(line, &r)
}

// runProxy is the proxy's process. It ends when orders ends.
func runProxy(mode string, orders io.Reader, reports io.Writer) error {
	ctx := context.Background()
	lc := net.ListenConfig{}
	lc.SetMultipathTCP(false) // as Envoy
	var ports []uint16
	if mode != dialer {
		ports = []uint16{redirect.OutboundPort, redirect.InboundPort}
	}
	for _, port := range ports {
		for _, network := range []string{"tcp4", "tcp6"} {
			l, err := lc.Listen(ctx, network, ":"+strconv.Itoa(int(port)))
			if err != nil {
				return fmt.Errorf("listen: %w", err)
			}
			go accept(l, port, mode)
		}
	}
	out := json.NewEncoder(reports)
	if err := out.Encode(report{}); err != nil {
		return fmt.Errorf("report: %w", err)
	}
	in := json.NewDecoder(orders)
	for {
		var o order
		if err := in.Decode(&o); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("read order: %w", err)
		}
		var r report
		var err error
		switch {
		case o.Begin > 0:
			err = begin(o)
		case o.Fd != 0 || o.Receive:
			r, err = useSocket(ctx, o)
		default:
			r.Answer, err = obey(ctx, o)
		}
		if err != nil {
			r.Err = err.Error()
		}
		if err := out.Encode(r); err != nil {
			return fmt.Errorf("report: %w", err)
		}
	}
}

func obey(ctx context.Context, o order) (answer, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	c, err := dialFrom(ctx, o.Bind, o.Dial)
	if err != nil {
		return answer{}, err
	}
	defer func() { _ = c.Close() }()
	return readAnswer(ctx, c)
}

// useSocket is obey with a socket that others have made.
func useSocket(ctx context.Context, o order) (r report, err error) {
	if o.Receive {
		if o.Fd, err = receiveFd(peerFd); err != nil {
			return r, err
		}
	}
	domain, err := unix.GetsockoptInt(o.Fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	if err != nil {
		return r, fmt.Errorf("look at socket: %w", err)
	}
	if o.Dial.IsValid() { // else it is connected
		if err := connect(o.Fd, sockaddr(domain, o.Dial)); err != nil {
			return r, fmt.Errorf("connect to %s: %w", o.Dial, err)
		}
	}
	f := os.NewFile(uintptr(o.Fd), "socket")
	defer func() { _ = f.Close() }()
	c, err := net.FileConn(f)
	if err != nil {
		return r, fmt.Errorf("take over socket: %w", err)
	}
	defer func() { _ = c.Close() }()
	r.Local, r.Peer = netnstest.AddrPort(c.LocalAddr()), netnstest.AddrPort(c.RemoteAddr())
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	r.Answer, err = readAnswer(ctx, c)
	return r, err
}

// receiveFd takes a descriptor that was passed over a unix socket.
func receiveFd(from int) (int, error) {
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(from, make([]byte, 1), oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return 0, fmt.Errorf("receive descriptor: %w", err)
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(msgs) != 1 {
		return 0, fmt.Errorf("receive descriptor: got %d messages: %w", len(msgs), err)
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		return 0, fmt.Errorf("receive descriptor: got %d: %w", len(fds), err)
	}
	return fds[0], nil
}

// begin is the part of obey that waits for nothing.
func begin(o order) error {
	domain := unix.AF_INET6
	if o.Dial.Addr().Is4() {
		domain = unix.AF_INET
	}
	for range o.Begin {
		fd, err := unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
		if err != nil {
			return fmt.Errorf("make socket: %w", err)
		}
		if err := unix.Connect(fd, sockaddr(domain, o.Dial)); err != nil && !errors.Is(err, unix.EINPROGRESS) {
			return fmt.Errorf("connect to %s: %w", o.Dial, err)
		}
		if o.Keep {
			continue
		}
		if err := unix.Close(fd); err != nil {
			return fmt.Errorf("close socket: %w", err)
		}
	}
	return nil
}

func dialFrom(ctx context.Context, bind netip.Addr, to netip.AddrPort) (net.Conn, error) {
	var d net.Dialer
	if bind.IsValid() {
		d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(bind, 0))
	}
	return d.DialContext(ctx, "tcp", to.String())
}

func accept(l net.Listener, port uint16, mode string) {
	for {
		c, err := l.Accept()
		if err != nil {
			continue // a client that left before it was accepted
		}
		go func() {
			defer func() { _ = c.Close() }()
			if rest, ok := strings.CutPrefix(mode, onward); ok {
				passOn(c, port, rest)
				return
			}
			a := answer{Port: port}
			a.Name, a.Peer, a.Local = "proxy", netnstest.AddrPort(c.RemoteAddr()), netnstest.AddrPort(c.LocalAddr())
			if a.Orig, err = originalDst(c); err != nil {
				a.OrigErr = err.Error()
			}
			if json.NewEncoder(c).Encode(a) == nil && mode != brief {
				// Not with splice(2), which takes urgent data for the end.
				_, _ = io.Copy(c, struct{ io.Reader }{c})
			}
		}()
	}
}

// asService is the mode onward of a proxy that knows a service with one endpoint.
func asService(vip, endpoint netip.AddrPort) string {
	return onward + vip.String() + "=" + endpoint.String()
}

// passOn connects to where the client wanted to go: from 127.0.0.6 or ::6 if
// that is the app, and if it is the service, to its endpoint. A half that is
// closed or reset at one end is so at the other.
func passOn(c net.Conn, port uint16, service string) {
	orig, err := originalDst(c)
	if err != nil || orig.Port() == port { // dialled itself: never on to itself
		return
	}
	if vip, endpoint, _ := strings.Cut(service, "="); vip == orig.String() {
		orig = netip.MustParseAddrPort(endpoint)
	}
	var bind netip.Addr
	if port == redirect.InboundPort {
		bind = loopSource(orig.Addr())
	}
	ctx, cancel := context.WithTimeout(context.Background(), askTimeout)
	defer cancel()
	up, err := dialFrom(ctx, bind, orig)
	if err != nil {
		return
	}
	defer func() { _ = up.Close() }()
	done := make(chan struct{})
	go func() {
		defer close(done)
		carry(up.(*net.TCPConn), c.(*net.TCPConn))
	}()
	carry(c.(*net.TCPConn), up.(*net.TCPConn))
	<-done
}

// carry copies until from ends, and ends that half of to in the same way. Like
// Envoy without splice(2), which does not see what came the short way.
func carry(to, from *net.TCPConn) {
	if _, err := io.Copy(to, struct{ io.Reader }{from}); errors.Is(err, unix.ECONNRESET) {
		_ = to.SetLinger(0) // Close sends a RST
		_ = to.Close()
		return
	}
	_ = to.CloseWrite()
}

// originalDst asks at the option level of the socket's family, as Envoy does.
func originalDst(c net.Conn) (netip.AddrPort, error) {
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		return netip.AddrPort{}, err
	}
	var orig netip.AddrPort
	var optErr error
	err = raw.Control(func(fd uintptr) {
		if netnstest.AddrPort(c.LocalAddr()).Addr().Is4() {
			var m *unix.IPv6Mreq // its 20 bytes hold a struct sockaddr_in
			if m, optErr = unix.GetsockoptIPv6Mreq(int(fd), unix.SOL_IP, soOriginalDst); optErr == nil {
				b := m.Multiaddr
				orig = netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), binary.BigEndian.Uint16(b[2:4]))
			}
			return
		}
		var i *unix.IPv6MTUInfo // begins with a struct sockaddr_in6
		if i, optErr = unix.GetsockoptIPv6MTUInfo(int(fd), unix.SOL_IPV6, soOriginalDst); optErr == nil {
			be := (*[2]byte)(unsafe.Pointer(&i.Addr.Port))
			orig = netip.AddrPortFrom(netip.AddrFrom16(i.Addr.Addr), binary.BigEndian.Uint16(be[:]))
		}
	})
	return orig, errors.Join(err, optErr)
}

func readAnswer(ctx context.Context, c net.Conn) (answer, error) {
	var a answer
	line, err := netnstest.ReadLine(ctx, c)
	if err != nil {
		return a, fmt.Errorf("read answer: %w", err)
	}
	return a, json.Unmarshal(line, &a)
}

// askTimeout bounds one connection that should succeed.
const askTimeout = 20 * time.Second
