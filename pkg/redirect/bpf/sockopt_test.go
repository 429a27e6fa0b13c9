package bpf

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/tests/netnstest"
)

const soOriginalDst = 80

// getsockopt asks with a buffer of size bytes and returns what was written.
func getsockopt(t *testing.T, c net.Conn, level, name, size int) ([]byte, error) {
	t.Helper()
	raw, err := c.(syscall.Conn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	b, n := make([]byte, 64), uint32(size)
	var errno syscall.Errno
	if err := raw.Control(func(fd uintptr) {
		_, _, errno = unix.Syscall6(unix.SYS_GETSOCKOPT, fd, uintptr(level), uintptr(name),
			uintptr(unsafe.Pointer(&b[0])), uintptr(unsafe.Pointer(&n)), 0)
	}); err != nil {
		t.Fatal(err)
	}
	if errno != 0 {
		return nil, errno
	}
	return b[:n], nil
}

// sockaddr is what a getsockopt for the original destination answers.
func sockaddr(a netip.Addr, port uint16) []byte {
	if a.Is4() {
		b := binary.NativeEndian.AppendUint16(nil, unix.AF_INET)
		b = append(binary.BigEndian.AppendUint16(b, port), a.AsSlice()...)
		return append(b, make([]byte, 8)...)
	}
	b := binary.NativeEndian.AppendUint16(nil, unix.AF_INET6)
	b = append(binary.BigEndian.AppendUint16(b, port), make([]byte, 4)...)
	return append(append(b, a.AsSlice()...), make([]byte, 4)...)
}

// TestOriginalDestination asks at both levels, of sockets of both families.
func TestOriginalDestination(t *testing.T) {
	o := newOptions(t)
	node := netnstest.NewNode(t)
	pod, peer := node.Pod(t, "pod"), node.Pod(t, "peer")
	r := open(t, o)
	defer func() { _ = r.Close() }()
	w := workload(t, pod)
	for _, tc := range []struct {
		name    string
		listen  string // the proxy's address
		from    *netnstest.Pod
		inbound bool
		to      netip.Addr
	}{
		{"outbound v4, socket v4", "0.0.0.0", pod, false, netip.MustParseAddr("192.0.2.1")},
		{"outbound v4, socket v6", "::", pod, false, netip.MustParseAddr("192.0.2.1")},
		{"outbound v6", "::", pod, false, netip.MustParseAddr("2001:db8::1")},
		{"inbound v4, socket v4", "0.0.0.0", peer, true, pod.Addr4},
		{"inbound v4, socket v6", "::", peer, true, pod.Addr4},
		{"inbound v6", "::", peer, true, pod.Addr6},
	} {
		t.Run(tc.name, func(t *testing.T) {
			// This process is client and proxy alike.
			port := redirect.OutboundPort
			w.Policy.ProxyUID = anyUID
			if tc.inbound {
				port, w.Policy.ProxyUID = redirect.InboundPort, 0
			}
			mustAdd(t, r, w)
			l, err := pod.Listen(t.Context(), "tcp", netip.AddrPortFrom(netip.MustParseAddr(tc.listen), port).String())
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = l.Close() }()
			if err := l.(*net.TCPListener).SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			client, err := tc.from.Dial(ctx, "tcp", netip.AddrPortFrom(tc.to, 8080).String())
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = client.Close() }()
			c, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = c.Close() }()

			b, err := getsockopt(t, c, unix.SOL_IP, soOriginalDst, 16)
			if tc.to.Is4() {
				if want := string(sockaddr(tc.to, 8080)); err != nil || string(b) != want {
					t.Errorf("level SOL_IP: got %x, %v; want %x", b, err, want)
				}
				if _, err := getsockopt(t, c, unix.SOL_IP, soOriginalDst, 15); !errors.Is(err, unix.EINVAL) {
					t.Errorf("level SOL_IP, buffer too small: %v, want EINVAL", err)
				}
			} else if err == nil {
				t.Errorf("level SOL_IP: got %x for an IPv6 destination", b)
			}
			b, err = getsockopt(t, c, unix.SOL_IPV6, soOriginalDst, 28)
			if want := string(sockaddr(netip.AddrFrom16(tc.to.As16()), 8080)); err != nil || string(b) != want {
				t.Errorf("level SOL_IPV6: got %x, %v; want %x", b, err, want)
			}
			if _, err := getsockopt(t, c, unix.SOL_IPV6, soOriginalDst, 27); !errors.Is(err, unix.EINVAL) {
				t.Errorf("level SOL_IPV6, buffer too small: %v, want EINVAL", err)
			}

			// Other options are the kernel's.
			if b, err := getsockopt(t, c, unix.SOL_IP, unix.IP_TTL, 4); err != nil || len(b) != 4 || b[0] != 64 {
				t.Errorf("IP_TTL: got %x, %v", b, err)
			}
			if _, err := getsockopt(t, c, unix.SOL_TCP, soOriginalDst, 16); !errors.Is(err, unix.ENOPROTOOPT) {
				t.Errorf("option 80 of TCP: %v, want ENOPROTOOPT", err)
			}
		})
	}
}
