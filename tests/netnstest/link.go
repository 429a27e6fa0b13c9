package netnstest

import (
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// readyDeadline bounds the wait for the kernel's own background work.
const readyDeadline = 5 * time.Second

// A handle is rtnetlink inside one namespace.
type handle struct{ *netlink.Handle }

// link runs fn with an rtnetlink socket of the namespace.
func (ns Namespace) link(tb testing.TB, fn func(*handle) error) {
	tb.Helper()
	err := ns.Do(func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("open rtnetlink: %w", err)
		}
		defer h.Close()
		return fn(&handle{h})
	})
	if err != nil {
		tb.Fatalf("set up links of %s: %v", ns.Name, err)
	}
}

func (h *handle) up(name string) error {
	l, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find link %s: %w", name, err)
	}
	if err := h.LinkSetUp(l); err != nil {
		return fmt.Errorf("set up link %s: %w", name, err)
	}
	return nil
}

// addr gives link name an address that can be used at once: without duplicate
// address detection.
func (h *handle) addr(name string, p netip.Prefix) error {
	l, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find link %s: %w", name, err)
	}
	a := &netlink.Addr{IPNet: ipNet(p)}
	if p.Addr().Is6() {
		a.Flags = unix.IFA_F_NODAD
	}
	if err := h.AddrAdd(l, a); err != nil {
		return fmt.Errorf("add address %s to %s: %w", p, name, err)
	}
	if p.Addr().Is6() {
		return h.waitLocal(p.Addr())
	}
	return nil
}

// waitLocal waits until the kernel delivers to an IPv6 address: its local route
// comes from a work queue.
func (h *handle) waitLocal(a netip.Addr) error {
	local := &netlink.Route{Table: unix.RT_TABLE_LOCAL, Dst: ipNet(netip.PrefixFrom(a, a.BitLen()))}
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(readyDeadline); ; <-tick.C {
		routes, err := h.RouteListFiltered(unix.AF_INET6, local, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_DST)
		if err != nil {
			return fmt.Errorf("list local routes: %w", err)
		}
		if len(routes) > 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("wait for local route to %s: none after %v", a, readyDeadline)
		}
	}
}

func (h *handle) defaultRoute(via netip.Addr) error {
	if err := h.RouteAdd(&netlink.Route{Gw: via.AsSlice()}); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add default route via %s: %w", via, err)
	}
	return nil
}

func (h *handle) bridge(name string) error {
	off := false
	// An address of its own: a bridge without one takes the lowest of its ports',
	// another one with each port, and neighbours send to the old one for half a minute.
	mac := net.HardwareAddr{0x02, 0, 0, 0, 0, 0}
	if _, err := rand.Read(mac[1:]); err != nil {
		return fmt.Errorf("make an address for bridge %s: %w", name, err)
	}
	err := h.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name, HardwareAddr: mac}, MulticastSnooping: &off})
	if err != nil {
		return fmt.Errorf("add bridge %s: %w", name, err)
	}
	return h.up(name)
}

// veth adds a pair: local on the bridge here, peer in the namespace peerFD opens.
func (h *handle) veth(local, bridge, peer string, peerFD int) error {
	br, err := h.LinkByName(bridge)
	if err != nil {
		return fmt.Errorf("find bridge %s: %w", bridge, err)
	}
	v := &netlink.Veth{
		LinkAttrs:     netlink.LinkAttrs{Name: local, MasterIndex: br.Attrs().Index},
		PeerName:      peer,
		PeerNamespace: netlink.NsFd(peerFD),
	}
	if err := h.LinkAdd(v); err != nil {
		return fmt.Errorf("add veth pair %s: %w", local, err)
	}
	return h.up(local)
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// Unreachable makes the namespace refuse to send to a range.
func (ns Namespace) Unreachable(tb testing.TB, p netip.Prefix) {
	tb.Helper()
	ns.link(tb, func(h *handle) error { return h.dead(p, unix.RTN_UNREACHABLE) })
}

// BlackHole makes the namespace drop what is sent to a range, and say nothing,
// until tb ends.
func (ns Namespace) BlackHole(tb testing.TB, p netip.Prefix) {
	tb.Helper()
	ns.link(tb, func(h *handle) error { return h.dead(p, unix.RTN_BLACKHOLE) })
	tb.Cleanup(func() {
		ns.link(tb, func(h *handle) error {
			return h.RouteDel(&netlink.Route{Dst: ipNet(p), Type: unix.RTN_BLACKHOLE})
		})
	})
}

// dead adds a route that leads nowhere.
func (h *handle) dead(p netip.Prefix, kind int) error {
	if err := h.RouteAdd(&netlink.Route{Dst: ipNet(p), Type: kind}); err != nil {
		return fmt.Errorf("add route to %s: %w", p, err)
	}
	return nil
}
