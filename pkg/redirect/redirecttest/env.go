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
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/pkg/redirect/cgroup"
	"github.com/sluicemesh/sluice/tests/netnstest"
)

const (
	// appPort is what servers of the suite listen on.
	appPort uint16 = 8080
	// downTimeout bounds a connection that should not succeed: refused at once
	// or, where the SYN is dropped, never answered.
	downTimeout = 1500 * time.Millisecond
	// agentMark is the socket mark by which the agent reaches Envoy's admin port.
	agentMark = 0x51ce
)

// An env is what one case has: a pod that is redirected, its proxy, and another
// pod with a server, all new, on a node that the whole run shares.
type env struct {
	*testing.T
	open Open
	r    redirect.Redirector
	// v4 is the family of the case.
	v4   bool
	node *netnstest.Node
	// pod is the redirected pod, w what it was added as.
	pod   *netnstest.Pod
	w     redirect.Workload
	proxy *proxy
	// hostPod is a process of a pod on the node's network.
	hostPod *proxy
	// peer is another pod of the node, without redirection; "peer" answers there.
	peer *netnstest.Pod
}

// family returns the one address of addrs that is of the case's family.
func (e *env) family(addrs ...netip.Addr) netip.Addr {
	e.Helper()
	for _, a := range addrs {
		if a.Is4() == e.v4 {
			return a
		}
	}
	e.Fatalf("no address of the family in %v", addrs)
	return netip.Addr{}
}

func (e *env) podAddr() netip.Addr  { e.Helper(); return e.family(e.pod.Addrs()...) }
func (e *env) peerAddr() netip.Addr { e.Helper(); return e.family(e.peer.Addrs()...) }
func (e *env) podPort(port uint16) netip.AddrPort {
	return netip.AddrPortFrom(e.podAddr(), port)
}

func (e *env) peerPort(port uint16) netip.AddrPort {
	return netip.AddrPortFrom(e.peerAddr(), port)
}

func (e *env) loopback() netip.Addr {
	return e.family(netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback())
}

func (e *env) unspecified() netip.Addr {
	return e.family(netip.IPv4Unspecified(), netip.IPv6Unspecified())
}

// host returns the prefix that holds a alone.
func host(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// serve starts a server on all addresses of ns.
func (e *env) serve(ns netnstest.Namespace, port uint16, name string) {
	e.Helper()
	ns.Serve(e, netip.AddrPortFrom(e.unspecified(), port), name)
}

// add adds the workload after change has had its way with the policy.
func (e *env) add(change func(*redirect.Policy)) {
	e.Helper()
	if change != nil {
		change(&e.w.Policy)
	}
	if err := e.r.Add(e.Context(), e.w); err != nil {
		e.Fatalf("add workload: %v", err)
	}
}

// cgroupPath is what a Workload calls the cgroup at dir.
func (e *env) cgroupPath(dir string) string {
	e.Helper()
	root, err := cgroup.Root()
	if err != nil {
		e.Fatal(err)
	}
	rel, err := filepath.Rel(root, dir)
	if err != nil {
		e.Fatal(err)
	}
	return "/" + rel
}

// startProxy starts the pod's proxy in place of one that may run.
func (e *env) startProxy(mode string) {
	e.Helper()
	if e.proxy != nil {
		e.proxy.stop()
	}
	e.proxy = startProxy(e, e.pod.Namespace, e.w.Policy.ProxyUID, mode)
}

func (e *env) dial(from netnstest.Namespace, to netip.AddrPort, timeout time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(e.Context(), timeout)
	defer cancel()
	return from.Dial(ctx, "tcp", to.String())
}

// connect opens a connection that stays open for the rest of the case, and
// returns it with the answer to it.
func (e *env) connect(from netnstest.Namespace, to netip.AddrPort) (net.Conn, answer) {
	e.Helper()
	c, err := e.dial(from, to, askTimeout)
	if err != nil {
		e.Fatalf("connect from %s to %s: %v", from.Name, to, err)
	}
	e.Cleanup(func() { _ = c.Close() })
	return c, e.answer(c)
}

func (e *env) answer(c net.Conn) answer {
	e.Helper()
	ctx, cancel := context.WithTimeout(e.Context(), askTimeout)
	defer cancel()
	a, err := readAnswer(ctx, c)
	if err != nil {
		e.Fatalf("connection to %s: %v", c.RemoteAddr(), err)
	}
	return a
}

func (e *env) ask(from netnstest.Namespace, to netip.AddrPort) answer {
	e.Helper()
	c, a := e.connect(from, to)
	_ = c.Close()
	return a
}

// wantOutbound checks that c, which the pod's app opened to dst, is captured
// and sees nothing of it.
func (e *env) wantOutbound(c net.Conn, a answer, dst netip.AddrPort) {
	e.Helper()
	e.wantSeen(a, netnstest.AddrPort(c.LocalAddr()), netnstest.AddrPort(c.RemoteAddr()), dst)
}

// wantSeen is wantOutbound for a socket of another process: local and remote are
// what getsockname and getpeername say of it.
func (e *env) wantSeen(a answer, local, remote, dst netip.AddrPort) {
	e.Helper()
	e.wantProxy(a, redirect.OutboundPort, dst)
	if a.Peer != local {
		e.Errorf("the proxy sees %s as source, the app's socket says %s", a.Peer, local)
	}
	if remote != dst {
		e.Errorf("getpeername says %s, want %s", remote, dst)
	}
}

// wantProxy checks that the proxy answered on port and knows dst.
func (e *env) wantProxy(a answer, port uint16, dst netip.AddrPort) {
	e.Helper()
	switch {
	case a.Name != "proxy":
		e.Errorf("connection to %s reached %q, want the proxy", dst, a.Name)
	case a.Port != port:
		e.Errorf("connection to %s reached the proxy on %d, want %d", dst, a.Port, port)
	case a.OrigErr != "":
		e.Errorf("original destination: %s", a.OrigErr)
	case a.Orig != dst:
		e.Errorf("original destination is %s, want %s", a.Orig, dst)
	}
}

// wantBare checks that the named server answered, without a proxy between.
func (e *env) wantBare(a answer, name string) {
	e.Helper()
	if a.Name != name {
		e.Errorf("connection reached %q, want %q", a.Name, name)
	}
}

// wantDown checks that nobody answers a connection.
func (e *env) wantDown(from netnstest.Namespace, to netip.AddrPort) {
	e.Helper()
	c, err := e.dial(from, to, downTimeout)
	if err != nil {
		return
	}
	defer func() { _ = c.Close() }()
	ctx, cancel := context.WithTimeout(e.Context(), downTimeout)
	defer cancel()
	if a, err := readAnswer(ctx, c); err == nil {
		e.Errorf("connection to %s reached %q without the proxy", to, a.Name)
	}
}

// count returns the sum of the pod's counters with a verdict, and a reason
// unless that is "".
func (e *env) count(d redirect.Direction, verdict, reason string) uint64 {
	e.Helper()
	m, ok := e.r.(redirect.Meter)
	if !ok {
		e.Fatalf("%T is no Meter", e.r)
	}
	counters, err := m.Counters(e.Context())
	if err != nil {
		e.Fatalf("read counters: %v", err)
	}
	var sum uint64
	for _, c := range counters {
		if c.ID == e.w.ID && c.Direction == d && c.Verdict == verdict && (reason == "" || c.Reason == reason) {
			sum += c.Value
		}
	}
	return sum
}

// installed returns what List says of the case's workload.
func (e *env) installed(r redirect.Redirector) (redirect.Installed, bool) {
	e.Helper()
	all, err := r.List(e.Context())
	if err != nil {
		e.Fatalf("list workloads: %v", err)
	}
	i := slices.IndexFunc(all, func(i redirect.Installed) bool { return i.ID == e.w.ID })
	if i < 0 {
		return redirect.Installed{}, false
	}
	return all[i], true
}

// wantWhole checks that the workload is listed as it was added.
func (e *env) wantWhole(r redirect.Redirector) {
	e.Helper()
	i, ok := e.installed(r)
	switch {
	case !ok:
		e.Error("the workload is not listed")
	case i.Problem != nil:
		e.Errorf("the workload is listed with a problem: %v", i.Problem)
	case i.Digest != e.w.Digest():
		e.Errorf("digest is %x, want %x", i.Digest, e.w.Digest())
	case i.Pod != e.w.Pod:
		e.Errorf("pod is %q, want %q", i.Pod, e.w.Pod)
	}
}

// A socket is how rawConnect makes its socket.
type socket struct {
	domain      int
	nonblocking bool
	prepare     func(fd int) error
}

// rawSocket makes a socket inside ns.
func (e *env) rawSocket(ns netnstest.Namespace, s socket) int {
	e.Helper()
	fd := -1
	err := ns.Do(func() (err error) {
		flags := unix.SOCK_STREAM | unix.SOCK_CLOEXEC
		if s.nonblocking {
			flags |= unix.SOCK_NONBLOCK
		}
		if fd, err = unix.Socket(s.domain, flags, unix.IPPROTO_TCP); err != nil {
			return err
		}
		if s.prepare != nil {
			return s.prepare(fd)
		}
		return nil
	})
	if err != nil {
		e.Fatalf("make socket in %s: %v", ns.Name, err)
	}
	return fd
}

// rawConnect connects fd the way a C program does, blocking or not, and waits
// for the result. In ns, because hooks look at the calling process.
func rawConnect(ns netnstest.Namespace, fd int, to unix.Sockaddr) error {
	return ns.Do(func() error { return connect(fd, to) })
}

// connect is rawConnect on the calling thread.
func connect(fd int, to unix.Sockaddr) error {
	timeout := unix.NsecToTimeval(askTimeout.Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &timeout); err != nil {
		return err
	}
	err := unix.Connect(fd, to)
	// A connect with a timeout that a signal interrupts, as Go's own do, goes on.
	if !errors.Is(err, unix.EINPROGRESS) && !errors.Is(err, unix.EINTR) {
		return err
	}
	poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
	for {
		n, err := unix.Poll(poll, int(askTimeout.Milliseconds()))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		if n == 0 {
			return unix.ETIMEDOUT
		}
		break
	}
	errno, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err == nil && errno != 0 {
		err = syscall.Errno(errno)
	}
	return err
}

// conn turns a connected socket into a net.Conn that closes with the case.
func (e *env) conn(fd int) net.Conn {
	e.Helper()
	f := os.NewFile(uintptr(fd), "socket")
	defer func() { _ = f.Close() }()
	c, err := net.FileConn(f)
	if err != nil {
		e.Fatalf("take over socket: %v", err)
	}
	e.Cleanup(func() { _ = c.Close() })
	return c
}

// sockaddr returns what connect(2) takes for a socket of the domain; an IPv4
// address becomes a mapped one for AF_INET6.
func sockaddr(domain int, to netip.AddrPort) unix.Sockaddr {
	if domain == unix.AF_INET {
		return &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}
}

// domain returns the case's address family.
func (e *env) domain() int {
	if e.v4 {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// workload returns what describes pod to a Redirector.
func workload(tb testing.TB, pod *netnstest.Pod) redirect.Workload {
	tb.Helper()
	ino := pod.Inode(tb)
	return redirect.Workload{
		ID:         redirect.ID{PodUID: fmt.Sprintf("00000000-0000-0000-0000-%012d", ino%1e12), NetnsInode: ino},
		Pod:        "redirecttest/" + pod.Name,
		Netns:      pod.Netns,
		Addrs:      pod.Addrs(),
		Interfaces: []string{"eth0"},
		Policy:     redirect.DefaultPolicy(),
	}
}
