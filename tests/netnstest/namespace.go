package netnstest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/pkg/redirect/netns"
)

// runDir is where named namespaces are bound, as "ip netns" does.
const runDir = "/run/netns"

// prefix begins the names of all that process pid has made. A number names a
// process in its PID namespace alone: what tests in another one have made, with
// the same cgroups and temporary files to be seen, is not this one's to judge.
func prefix(pid int) string { return fmt.Sprintf("slt%d-%d-", pid, pidNamespace()) }

// pidNamespace is the inode of this process's PID namespace, 0 if it cannot be
// read.
var pidNamespace = sync.OnceValue(func() uint64 {
	var st unix.Stat_t
	if err := unix.Stat("/proc/self/ns/pid", &st); err != nil {
		return 0
	}
	return st.Ino
})

// A Namespace is a network namespace of the test.
type Namespace struct {
	// Name is what the test calls it.
	Name string
	// Netns is a path that opens it.
	Netns string
}

// newNamespace makes a namespace with lo up and IPv6 addresses usable at once.
func newNamespace(tb testing.TB, name string) Namespace {
	tb.Helper()
	if err := os.MkdirAll(runDir, 0o755); err != nil {
		tb.Fatalf("make directory of namespaces: %v", err)
	}
	f, err := os.CreateTemp(runDir, prefix(os.Getpid())+name+"-*")
	if err != nil {
		tb.Fatalf("make mount point of namespace: %v", err)
	}
	_ = f.Close()
	tb.Cleanup(func() {
		if err := remove(f.Name()); err != nil {
			tb.Errorf("remove namespace %s: %v", f.Name(), err)
		}
	})
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("make network namespace: %w", err)
			return
		}
		done <- unix.Mount("/proc/thread-self/ns/net", f.Name(), "", unix.MS_BIND, "")
	}()
	if err := <-done; err != nil {
		tb.Fatalf("bind namespace at %s: %v", f.Name(), err)
	}
	ns := Namespace{Name: name, Netns: f.Name()}
	ns.Sysctl(tb, "net/ipv6/conf/all/disable_ipv6", "0")
	ns.Sysctl(tb, "net/ipv6/conf/default/disable_ipv6", "0")
	ns.Sysctl(tb, "net/ipv6/conf/all/accept_dad", "0")
	ns.Sysctl(tb, "net/ipv6/conf/default/accept_dad", "0")
	ns.link(tb, func(h *handle) error { return h.up("lo") })
	return ns
}

func remove(path string) error {
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount: %w", err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// Remove takes the namespace's name away before the test ends, as a runtime
// does with a sandbox that died. The namespace itself goes with its last
// process and socket.
func (ns Namespace) Remove(tb testing.TB) {
	tb.Helper()
	if err := remove(ns.Netns); err != nil {
		tb.Fatalf("remove namespace %s: %v", ns.Name, err)
	}
}

// Do runs fn on a thread inside the namespace and returns its error.
func (ns Namespace) Do(fn func() error) error { return netns.Do(ns.Netns, fn) }

// Sysctl sets a value of the namespace; name is a path below /proc/sys.
func (ns Namespace) Sysctl(tb testing.TB, name, value string) {
	tb.Helper()
	err := ns.Do(func() error {
		return os.WriteFile(filepath.Join("/proc/sys", name), []byte(value), 0)
	})
	if err != nil {
		tb.Fatalf("set %s in %s: %v", name, ns.Name, err)
	}
}

// Inode returns the inode number that a redirect.ID names the namespace by.
func (ns Namespace) Inode(tb testing.TB) uint64 {
	tb.Helper()
	ino, err := netns.Inode(ns.Netns)
	if err != nil {
		tb.Fatalf("find inode of %s: %v", ns.Name, err)
	}
	return ino
}

// Dial connects from inside the namespace; addr holds an IP address, not a name.
func (ns Namespace) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	return ns.DialWith(ctx, net.Dialer{}, network, addr)
}

// DialWith is Dial with a Dialer of the caller's. Happy Eyeballs and the
// resolver would leave the namespace and are not used.
func (ns Namespace) DialWith(ctx context.Context, d net.Dialer, network, addr string) (net.Conn, error) {
	if ap, err := netip.ParseAddrPort(addr); err != nil {
		return nil, fmt.Errorf("dial from %s: %w", ns.Name, err)
	} else if ap.Addr().IsUnspecified() {
		return nil, fmt.Errorf("dial from %s: package net would try several addresses for %s", ns.Name, addr)
	}
	var c net.Conn
	err := ns.Do(func() (err error) {
		c, err = d.DialContext(ctx, network, addr)
		return err
	})
	return c, err
}

// Listen listens inside the namespace with a plain TCP socket: Go's default of
// MPTCP is not what most servers use.
func (ns Namespace) Listen(ctx context.Context, network, addr string) (net.Listener, error) {
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		ctrl := c.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
		})
		return errors.Join(ctrl, err)
	}}
	lc.SetMultipathTCP(false)
	var l net.Listener
	err := ns.Do(func() (err error) {
		l, err = lc.Listen(ctx, network, addr)
		return err
	})
	return l, err
}
