package bpf

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	// pinLookup is the pin of a pod's sk_lookup link, pinTCX the start of the
	// names of its tcx links, which go on with the interface's index.
	pinLookup = "sk_lookup"
	pinTCX    = "tcx_"

	// filterName names Sluice's filter where tcx is missing (before 6.6).
	filterName     = "sluice_ingress"
	filterPriority = 1
	filterHandle   = 0x51ce
)

// attachPinned makes the link that is pinned at path run prog. Where there is
// none, or whole says that it is of no use any more, attach makes a new one.
func attachPinned(path string, prog *ebpf.Program, whole func(*link.Info) bool,
	attach func() (link.Link, error),
) error {
	old, err := link.LoadPinnedLink(path, nil)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return fmt.Errorf("open pinned link %s: %w", path, err)
	default:
		defer func() { _ = old.Close() }()
		if info, err := old.Info(); err == nil && whole(info) {
			if err := old.Update(prog); err != nil {
				return fmt.Errorf("update link %s: %w", path, err)
			}
			return nil
		}
	}
	l, err := attach()
	if err != nil {
		return err
	}
	defer func() { _ = l.Close() }()
	// The old link ends when its pin is replaced: never a moment without one.
	fresh := path + "_new"
	if err := os.Remove(fresh); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove stale pin: %w", err)
	}
	if err := l.Pin(fresh); err != nil {
		return fmt.Errorf("pin link %s: %w", fresh, err)
	}
	if err := os.Rename(fresh, path); err != nil {
		return fmt.Errorf("put link in place: %w", err)
	}
	return nil
}

// detachPinned ends the link that is pinned at path and removes the pin.
func detachPinned(path string) error {
	l, err := link.LoadPinnedLink(path, nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open pinned link %s: %w", path, err)
	}
	defer func() { _ = l.Close() }()
	// Closing would do, but not at once: the kernel frees links later. A link
	// whose namespace or interface is gone cannot be detached any more.
	err = l.Detach()
	if errors.Is(err, unix.ENOLINK) {
		err = nil
	}
	return errors.Join(err, l.Unpin())
}

// detachAll ends all links that are pinned in dir and removes dir.
func detachAll(dir string) error {
	pins, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read pins: %w", err)
	}
	var errs []error
	for _, pin := range pins {
		errs = append(errs, detachPinned(filepath.Join(dir, pin.Name())))
	}
	return errors.Join(append(errs, os.Remove(dir))...)
}

// attachLookup attaches the sk_lookup program to the namespace at path.
func (r *Redirector) attachLookup(dir, path string, inode uint64) error {
	return attachPinned(filepath.Join(dir, pinLookup), r.programs.SlLookup,
		func(i *link.Info) bool { return i.NetNs() != nil && uint64(i.NetNs().NetnsInode) == inode },
		func() (link.Link, error) {
			ns, err := os.Open(path)
			if err != nil {
				return nil, fmt.Errorf("open network namespace: %w", err)
			}
			defer func() { _ = ns.Close() }()
			l, err := link.AttachNetNs(int(ns.Fd()), r.programs.SlLookup)
			if err != nil {
				return nil, fmt.Errorf("attach sk_lookup to network namespace %s: %w", path, err)
			}
			return l, nil
		})
}

// attachIngress attaches the ingress program to an interface of the namespace
// that the thread is in.
func (r *Redirector) attachIngress(dir string, ifindex uint32) error {
	if r.forceCLS {
		return r.attachFilter(ifindex)
	}
	err := attachPinned(filepath.Join(dir, pinTCX+strconv.Itoa(int(ifindex))), r.programs.SlIngress,
		func(i *link.Info) bool { return i.TCX() != nil && i.TCX().Ifindex == ifindex },
		func() (link.Link, error) {
			l, err := link.AttachTCX(link.TCXOptions{
				Interface: int(ifindex), Program: r.programs.SlIngress, Attach: ebpf.AttachTCXIngress,
			})
			if err != nil {
				return nil, fmt.Errorf("attach tcx/ingress to interface %d: %w", ifindex, err)
			}
			return l, nil
		})
	if errors.Is(err, ebpf.ErrNotSupported) {
		return r.attachFilter(ifindex)
	}
	return err
}

// attachFilter is attachIngress for kernels before 6.6, which have no tcx. An
// older program of Sluice is replaced at once.
func (r *Redirector) attachFilter(ifindex uint32) error {
	qdisc := &netlink.GenericQdisc{QdiscType: "clsact", QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: int(ifindex), Parent: netlink.HANDLE_CLSACT, Handle: netlink.MakeHandle(0xffff, 0),
	}}
	if err := netlink.QdiscAdd(qdisc); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add clsact to interface %d: %w", ifindex, err)
	}
	filter := &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: int(ifindex), Parent: netlink.HANDLE_MIN_INGRESS,
			Handle: filterHandle, Priority: filterPriority, Protocol: unix.ETH_P_ALL,
		},
		Fd: r.programs.SlIngress.FD(), Name: filterName, DirectAction: true,
	}
	if err := netlink.FilterReplace(filter); err != nil {
		return fmt.Errorf("add filter to interface %d: %w", ifindex, err)
	}
	return nil
}

// filters returns Sluice's filters on an interface of the thread's namespace.
func filters(l netlink.Link) (own []netlink.Filter, others int, err error) {
	for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
		all, err := netlink.FilterList(l, parent)
		if err != nil {
			return nil, 0, fmt.Errorf("list filters of interface %s: %w", l.Attrs().Name, err)
		}
		for _, f := range all {
			if b, ok := f.(*netlink.BpfFilter); ok && strings.HasPrefix(b.Name, filterName) {
				own = append(own, f)
			} else {
				others++
			}
		}
	}
	return own, others, nil
}

// detachFilters removes Sluice's filters from all interfaces of the thread's
// namespace but those in keep, and the clsact that held nothing else.
func detachFilters(keep func(ifindex int) bool) error {
	links, err := netlink.LinkList()
	if err != nil {
		return fmt.Errorf("list interfaces: %w", err)
	}
	var errs []error
	for _, l := range links {
		if keep(l.Attrs().Index) {
			continue
		}
		own, others, err := filters(l)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		for _, f := range own {
			if err := netlink.FilterDel(f); err != nil {
				errs = append(errs, fmt.Errorf("delete filter of interface %s: %w", l.Attrs().Name, err))
			}
		}
		if len(own) == 0 || others > 0 {
			continue
		}
		qdisc := &netlink.GenericQdisc{QdiscType: "clsact", QdiscAttrs: netlink.QdiscAttrs{
			LinkIndex: l.Attrs().Index, Parent: netlink.HANDLE_CLSACT, Handle: netlink.MakeHandle(0xffff, 0),
		}}
		if err := netlink.QdiscDel(qdisc); err != nil {
			errs = append(errs, fmt.Errorf("delete clsact of interface %s: %w", l.Attrs().Name, err))
		}
	}
	return errors.Join(errs...)
}

// proxySource6 is the IPv6 address that the proxy reaches its application from.
// Unlike 127.0.0.6 it is not on loopback by itself.
func proxySource6() *netlink.Addr {
	ip := make(net.IP, net.IPv6len)
	ip[net.IPv6len-1] = 6
	return &netlink.Addr{IPNet: &net.IPNet{IP: ip, Mask: net.CIDRMask(128, 128)}}
}

// proxySourceDeadline bounds how long the kernel may take to make ::6 local.
const proxySourceDeadline = 2 * time.Second

// addProxySource6 adds ::6 to lo in the thread's namespace and returns when
// the kernel, which finishes in the background, takes it for local: until then
// the proxy could not bind to it.
func addProxySource6() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find interface lo: %w", err)
	}
	addr := proxySource6()
	addr.Flags = unix.IFA_F_NODAD
	if err := netlink.AddrAdd(lo, addr); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add address ::6 to lo: %w", err)
	}
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(proxySourceDeadline); ; <-tick.C {
		routes, err := netlink.RouteGet(addr.IP)
		if err == nil && len(routes) > 0 && routes[0].Type == unix.RTN_LOCAL {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("wait until address ::6 on lo is local: %w", errors.Join(unix.EADDRNOTAVAIL, err))
		}
	}
}

// hasProxySource6 reports whether lo in the thread's namespace has ::6.
func hasProxySource6() (bool, error) {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return false, fmt.Errorf("find interface lo: %w", err)
	}
	addrs, err := netlink.AddrList(lo, netlink.FAMILY_V6)
	if err != nil {
		return false, fmt.Errorf("list addresses of lo: %w", err)
	}
	for _, a := range addrs {
		if a.IP.Equal(proxySource6().IP) {
			return true, nil
		}
	}
	return false, nil
}

// proxySource6Used reports whether connections from ::6 live in the thread's
// namespace: without the address they would stall.
func proxySource6Used() (bool, error) {
	const path = "/proc/thread-self/net/tcp6"
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil // no IPv6 here
	}
	if err != nil {
		return false, fmt.Errorf("list connections: %w", err)
	}
	// The address as the kernel prints it: four words in host byte order.
	addr := fmt.Sprintf("%024d%08X:", 0, binary.NativeEndian.Uint32([]byte{0, 0, 0, 6}))
	for line := range strings.Lines(string(b)) {
		// number, local address, remote address, state
		f := strings.Fields(line)
		if len(f) < 4 || !strings.HasPrefix(f[1], addr) && !strings.HasPrefix(f[2], addr) {
			continue
		}
		const timeWait, closed = "06", "07"
		if f[3] != timeWait && f[3] != closed {
			return true, nil
		}
	}
	return false, nil
}

// removeProxySource6 undoes addProxySource6.
func removeProxySource6() error {
	has, err := hasProxySource6()
	if err != nil || !has {
		return err
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find interface lo: %w", err)
	}
	if err := netlink.AddrDel(lo, proxySource6()); err != nil {
		return fmt.Errorf("remove address ::6 from lo: %w", err)
	}
	return nil
}
