package netns

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/pkg/redirect"
)

// Do runs fn on a thread inside the network namespace at path, waits for it
// and returns its error unchanged. fn must not start goroutines that rely on
// the namespace: they run on other threads. Sockets and netlink handles that
// fn opens stay in the namespace and may be used after Do has returned. The
// mount namespace stays the caller's: /proc/thread-self/net is the pod's, /sys
// is not.
func Do(path string, fn func() error) error {
	fd, err := open(path)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()

	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// The main thread stays home: /proc/self is its directory, and it
			// cannot die with a goroutine.
			defer runtime.UnlockOSThread()
			done <- Do(path, fn)
			return
		}
		home, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			runtime.UnlockOSThread()
			done <- fmt.Errorf("open own network namespace: %w", err)
			return
		}
		defer func() { _ = unix.Close(home) }()
		if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
			runtime.UnlockOSThread()
			done <- fmt.Errorf("enter network namespace %s: %w", path, err)
			return
		}
		// A goroutine that ends locked takes its thread with it: that is what
		// happens when fn ends the goroutine or the way back fails.
		returned := false
		defer func() {
			if !returned {
				done <- fmt.Errorf("run in network namespace %s: function did not return", path)
			}
		}()
		err = fn()
		returned = true
		if unix.Setns(home, unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
		done <- err
	}()
	return <-done
}

// Inode returns the inode number of the network namespace at path, which is
// unique among the namespaces that live at the same time.
func Inode(path string) (uint64, error) {
	fd, err := open(path)
	if err != nil {
		return 0, err
	}
	defer func() { _ = unix.Close(fd) }()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, fmt.Errorf("stat network namespace %s: %w", path, err)
	}
	return st.Ino, nil
}

// Cookie returns the cookie of the network namespace at path: what
// bpf_get_netns_cookie answers for its sockets. Cookies are never used twice
// until the machine restarts. Needs Linux 5.14.
func Cookie(path string) (uint64, error) {
	var cookie uint64
	err := Do(path, func() (err error) {
		cookie, err = OwnCookie()
		return err
	})
	return cookie, err
}

// OwnCookie is Cookie for the namespace that the calling thread is in.
func OwnCookie() (uint64, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("open socket: %w", err)
	}
	defer func() { _ = unix.Close(fd) }()
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if errors.Is(err, unix.ENOPROTOOPT) {
		return 0, fmt.Errorf("socket option SO_NETNS_COOKIE (Linux 5.14): %w", redirect.ErrNotSupported)
	}
	if err != nil {
		return 0, fmt.Errorf("read SO_NETNS_COOKIE: %w", err)
	}
	return cookie, nil
}

// Number returns the number by which the kernel names the network namespace at
// path to the calling thread's, -1 if it has none there.
func Number(path string) (int, error) {
	fd, err := open(path)
	if err != nil {
		return 0, err
	}
	defer func() { _ = unix.Close(fd) }()
	n, err := netlink.GetNetNsIdByFd(fd)
	if err != nil {
		return 0, fmt.Errorf("read number of network namespace %s: %w", path, err)
	}
	return n, nil
}

// HasTCP says whether there are TCP sockets of a family, listening or connected,
// in the namespace that the calling thread is in: fast, where /proc/net/tcp takes
// milliseconds. Those in TIME_WAIT do not count. IPv4 connections of an IPv6
// socket are IPv6's.
func HasTCP(v4 bool) (bool, error) {
	path, label := "/proc/thread-self/net/sockstat", "TCP: inuse "
	if !v4 {
		path, label = "/proc/thread-self/net/sockstat6", "TCP6: inuse "
	}
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) && !v4 {
		return false, nil // no IPv6 here
	}
	if err != nil {
		return false, fmt.Errorf("count sockets: %w", err)
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, label); ok {
			n, _, _ := strings.Cut(strings.TrimSpace(rest), " ")
			return n != "0", nil
		}
	}
	return false, fmt.Errorf("count sockets: no %q in %s", label, path)
}

// open opens path and makes sure that it is a network namespace: an unmounted
// /run/netns/x stays behind as an empty ordinary file.
func open(path string) (int, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ESRCH), errors.Is(err, unix.ENOTDIR):
		return -1, fmt.Errorf("open network namespace %s: %w", path, redirect.ErrGone)
	case err != nil:
		return -1, fmt.Errorf("open network namespace %s: %w", path, err)
	}
	kind, err := unix.IoctlRetInt(fd, unix.NS_GET_NSTYPE)
	if err != nil || kind != unix.CLONE_NEWNET {
		_ = unix.Close(fd)
		return -1, fmt.Errorf("open network namespace %s: no network namespace there: %w", path, redirect.ErrGone)
	}
	return fd, nil
}
