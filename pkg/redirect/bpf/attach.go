package bpf

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/pkg/redirect/netns"
)

const (
	// pinLookup is the pin of a pod's sk_lookup link.
	pinLookup = "sk_lookup"
	// pinTCX begins the pins of tcx links, which earlier builds had.
	pinTCX = "tcx_"

	// filterName names Sluice's filter on the pod's interfaces.
	filterName   = "sluice_ingress"
	filterHandle = 0x51ce
	// The first priority that is free of filters of another kind.
	filterPriority     = 1
	filterLastPriority = 64

	loopbackIndex = 1
)

// freshSuffix ends the pin of a link that is about to take another's place.
const freshSuffix = "_new"

// attachPinned makes the link that is pinned at path run prog. Where there is
// none, or whole says that it is of no use any more, attach makes a new one.
// What is no link of the kind is not this build's to replace.
func attachPinned(path string, prog *ebpf.Program, kind link.Type, whole func(*link.Info) bool,
	attach func() (link.Link, error),
) error {
	fresh := path + freshSuffix
	if err := os.Remove(fresh); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove stale pin: %w", err)
	}
	old, err := link.LoadPinnedLink(path, nil)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return fmt.Errorf("open pinned link %s: %w: %w", path, err, ErrIncompatible)
	default:
		defer func() { _ = old.Close() }()
		info, err := old.Info()
		if err != nil {
			return fmt.Errorf("read pinned link %s: %w", path, err)
		}
		if info.Type != kind {
			return fmt.Errorf("pinned link %s is of another kind: %w", path, ErrIncompatible)
		}
		if whole(info) {
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
	if err := l.Pin(fresh); err != nil {
		return fmt.Errorf("pin link %s: %w", fresh, err)
	}
	if err := os.Rename(fresh, path); err != nil {
		return fmt.Errorf("put link in place: %w", err)
	}
	return nil
}

// knowPins refuses pins that no earlier build had: a later one's hooks would go
// on running beside this one's. Its maps alone do nothing, and are left for it.
func (r *Redirector) knowPins(spec *ebpf.CollectionSpec) error {
	hooks, err := r.hooks()
	if err != nil {
		return err
	}
	known := map[string]func(name string) bool{
		r.dir: func(name string) bool {
			return slices.Contains([]string{r.mapDir(), r.hookDir(), r.podsDir(), r.accelDir(), filepath.Join(r.dir, twReuseDir)}, filepath.Join(r.dir, name))
		},
		r.hookDir(): func(name string) bool {
			return slices.ContainsFunc(hooks, func(h hook) bool { return name == h.name || name == h.name+freshSuffix })
		},
	}
	pods, err := os.ReadDir(r.podsDir())
	if err != nil {
		return fmt.Errorf("read pins: %w", err)
	}
	for _, pod := range pods {
		known[filepath.Join(r.podsDir(), pod.Name())] = func(name string) bool {
			return strings.TrimSuffix(name, freshSuffix) == pinLookup || strings.HasPrefix(name, pinTCX)
		}
	}
	for dir, knows := range known {
		pins, err := os.ReadDir(dir)
		if err != nil {
			return fmt.Errorf("read pins: %w", err)
		}
		for _, pin := range pins {
			if !knows(pin.Name()) {
				return fmt.Errorf("pin %s is of no kind that this build knows: %w", filepath.Join(dir, pin.Name()), ErrIncompatible)
			}
		}
	}
	maps, err := os.ReadDir(r.mapDir())
	if err != nil {
		return fmt.Errorf("read pins: %w", err)
	}
	for _, m := range maps {
		if spec.Maps[m.Name()] == nil {
			r.log.Warn("a map of another build is left as it is", "map", m.Name())
		}
	}
	return nil
}

// detachPinned ends the link that is pinned at path and removes the pin. What
// another build has pinned there instead ends with its pin.
func detachPinned(path string) error {
	l, err := link.LoadPinnedLink(path, nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		if err := os.RemoveAll(path); err != nil {
			return fmt.Errorf("remove pin: %w", err)
		}
		return nil
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

// attachLookup attaches the sk_lookup program to the namespace that the thread
// is in, whose path may be gone by now.
func (r *Redirector) attachLookup(dir string, inode uint64) error {
	return attachPinned(filepath.Join(dir, pinLookup), r.programs.SlLookup, link.NetNsType,
		func(i *link.Info) bool { return i.NetNs() != nil && uint64(i.NetNs().NetnsInode) == inode },
		func() (link.Link, error) {
			ns, err := os.Open("/proc/thread-self/ns/net")
			if err != nil {
				return nil, fmt.Errorf("open network namespace: %w", err)
			}
			defer func() { _ = ns.Close() }()
			l, err := link.AttachNetNs(int(ns.Fd()), r.programs.SlLookup)
			if err != nil {
				return nil, fmt.Errorf("attach sk_lookup to network namespace: %w", err)
			}
			return l, nil
		})
}

// An inside is rtnetlink of the network namespace that the thread is in.
type inside struct{ *netlink.Handle }

// openInside opens rtnetlink for one operation: one socket instead of one for
// each request.
func openInside() (inside, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return inside{}, fmt.Errorf("open rtnetlink: %w", err)
	}
	return inside{h}, nil
}

// within runs fn in the network namespace at path.
func within(path string, fn func(inside) error) error {
	return netns.Do(path, func() error {
		h, err := openInside()
		if err != nil {
			return err
		}
		defer h.Close()
		return fn(h)
	})
}

// attachIngress attaches the ingress program to an interface. An older program
// of Sluice is replaced at once.
//
// It is a filter of clsact on all kernels. A tcx link (6.6) would have the
// kernel wait for an RCU grace period, 10 ms and more, each time that it is
// attached or detached, under the lock that all network configuration of the
// node takes.
func (r *Redirector) attachIngress(h inside, ifindex uint32) error {
	qdisc := clsact(int(ifindex))
	if err := h.QdiscAdd(qdisc); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add clsact to interface %d: %w", ifindex, err)
	}
	own, _, err := h.filters(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: int(ifindex)}})
	if err != nil {
		return err
	}
	first, last := uint16(filterPriority), uint16(filterLastPriority)
	if len(own) > 0 {
		first = own[0].Attrs().Priority
		last = first
	}
	for priority := first; ; priority++ {
		err := h.FilterReplace(&netlink.BpfFilter{
			FilterAttrs: netlink.FilterAttrs{
				LinkIndex: int(ifindex), Parent: netlink.HANDLE_MIN_INGRESS,
				Handle: filterHandle, Priority: priority, Protocol: unix.ETH_P_ALL,
			},
			Fd: r.programs.SlIngress.FD(), Name: filterName, DirectAction: true,
		})
		// EINVAL: filters of another kind have that priority.
		if errors.Is(err, unix.EINVAL) && priority < last {
			continue
		}
		if err != nil {
			return fmt.Errorf("add filter to interface %d: %w", ifindex, err)
		}
		return nil
	}
}

// clsact is what holds the filters of an interface.
func clsact(ifindex int) *netlink.GenericQdisc {
	return &netlink.GenericQdisc{QdiscType: "clsact", QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: ifindex, Parent: netlink.HANDLE_CLSACT, Handle: netlink.MakeHandle(0xffff, 0),
	}}
}

// filters returns Sluice's filters on an interface.
func (h inside) filters(l netlink.Link) (own []netlink.Filter, others int, err error) {
	for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
		all, err := h.FilterList(l, parent)
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

// detachFilters removes Sluice's filters from all interfaces but those in keep.
// Where the clsact holds nothing else it goes, and with it, in one step, what it
// holds. Where it holds nothing at all it is Sluice's on the interfaces that own
// names: whoever made it was killed before the filter was in.
func (h inside) detachFilters(keep func(ifindex int) bool, own []string) error {
	links, err := h.LinkList()
	if err != nil {
		return fmt.Errorf("list interfaces: %w", err)
	}
	var errs []error
	for _, l := range links {
		if keep(l.Attrs().Index) {
			continue
		}
		filters, others, err := h.filters(l)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if others == 0 && (len(filters) > 0 || slices.Contains(own, l.Attrs().Name)) {
			err := h.QdiscDel(clsact(l.Attrs().Index))
			if err == nil {
				continue
			}
			// EINVAL: none is there, or another kind that holds filters as well.
			if !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
				errs = append(errs, fmt.Errorf("delete clsact of interface %s: %w", l.Attrs().Name, err))
			}
		}
		for _, f := range filters {
			// ENOENT: the qdisc ingress shows what it holds as ingress and as egress.
			if err := h.FilterDel(f); err != nil && !errors.Is(err, unix.ENOENT) {
				errs = append(errs, fmt.Errorf("delete filter of interface %s: %w", l.Attrs().Name, err))
			}
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

// loopback is lo, which has the same index in every namespace.
func loopback() netlink.Link {
	return &netlink.Device{LinkAttrs: netlink.LinkAttrs{Name: "lo", Index: loopbackIndex}}
}

// addProxySource6 adds ::6 to lo. The kernel finishes that in the background:
// awaitProxySource6 tells when.
func (h inside) addProxySource6() error {
	addr := proxySource6()
	addr.Flags = unix.IFA_F_NODAD
	if err := h.AddrAdd(loopback(), addr); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add address ::6 to lo: %w", err)
	}
	return nil
}

const (
	// proxySourceDeadline bounds how long the kernel may take to make ::6 local,
	// which it does within some 100 us; proxySourcePoll is how often to look.
	proxySourceDeadline = 10 * time.Second
	proxySourcePoll     = 50 * time.Microsecond
)

// awaitProxySource6 returns when the kernel takes ::6 for local: until then the
// proxy's connections from it would stall.
func (h inside) awaitProxySource6() error {
	to := proxySource6().IP
	for deadline := time.Now().Add(proxySourceDeadline); ; time.Sleep(proxySourcePoll) {
		routes, err := h.RouteGet(to)
		if err == nil && len(routes) > 0 && routes[0].Type == unix.RTN_LOCAL {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("wait until address ::6 on lo is local: %w", errors.Join(unix.EADDRNOTAVAIL, err))
		}
	}
}

// hasProxySource6 reports whether lo has ::6.
func (h inside) hasProxySource6() (bool, error) {
	addrs, err := h.AddrList(loopback(), netlink.FAMILY_V6)
	if err != nil {
		return false, fmt.Errorf("list addresses of lo: %w", err)
	}
	return slices.ContainsFunc(addrs, func(a netlink.Addr) bool { return a.IP.Equal(proxySource6().IP) }), nil
}

// proxySource6Used reports whether connections from ::6 live in the thread's
// namespace: without the address they would stall.
func proxySource6Used() (bool, error) {
	// The list below takes milliseconds even where it is short: the kernel looks
	// for the namespace's sockets among those of the whole machine.
	if any, err := netns.HasTCP(false); err != nil || !any {
		return false, err
	}
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
func (h inside) removeProxySource6() error {
	err := h.AddrDel(loopback(), proxySource6())
	// Without IPv6 in the namespace there are no addresses at all.
	if err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EAFNOSUPPORT) {
		return fmt.Errorf("remove address ::6 from lo: %w", err)
	}
	return nil
}
