package bpf

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/pkg/redirect/cgroup"
	"github.com/sluicemesh/sluice/pkg/redirect/netns"
)

// podDir returns the directory of a pod's pins. bpffs allows no dots in names.
func podDir(dir string, id redirect.ID) string {
	return filepath.Join(dir, strings.ReplaceAll(strings.ReplaceAll(id.String(), ".", "_"), "/", "_"))
}

// Add implements redirect.Redirector. The routes that Policy.ExcludeInterfaces
// stands for are those of the moment: outbound, what the main routing table
// sends out of an excluded interface is not captured. At most eight interfaces
// of either kind are supported.
func (r *Redirector) Add(ctx context.Context, w redirect.Workload) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	unlock, err := r.begin(w.ID)
	if err != nil {
		return err
	}
	defer unlock()
	if err := sameNamespace(w.Netns, w.ID.NetnsInode); err != nil {
		return err
	}
	return within(w.Netns, func(h inside) error { return r.ensure(h, w) })
}

// begin waits for the workload's turn and keeps other processes from what only
// one may do at a time.
func (r *Redirector) begin(id redirect.ID) (end func(), err error) {
	unlock, err := lock(r.dir, true)
	if err != nil {
		return nil, err
	}
	endTurn := r.turns.Take(id)
	return func() { endTurn(); unlock() }, nil
}

// ensure is Add inside the pod's namespace.
func (r *Redirector) ensure(h inside, w redirect.Workload) error {
	cookie, err := netns.OwnCookie()
	if err != nil {
		return err
	}
	if err := r.knowPods(false); err != nil {
		return err
	}
	old, err := r.store.pod(cookie)
	if err != nil {
		return err
	}
	meta, err := describe(w)
	if err != nil {
		return err
	}
	if err := r.ensureHooks(); err != nil {
		return err
	}
	// Not in the digest: what the node can do may be another thing since.
	if err := r.accelerate(cookie, w.Policy.Accelerate); err != nil {
		return err
	}
	if old != nil && old.Digest == uint64(w.Digest()) && r.outsideProblem(cookie, meta, old) == nil && r.insideProblem(h, meta, old) == nil {
		// A build that knew nothing of it may have kept the rest as it is.
		return errors.Join(r.setProxyCgroup(cookie, w.ProxyCgroup), r.findListeners(cookie, old))
	}
	if err := r.add(h, cookie, w, meta, old); err != nil {
		return fmt.Errorf("redirect network namespace %s: %w", w.Netns, err)
	}
	return nil
}

// describe returns what must be found again of w after a restart.
func describe(w redirect.Workload) (*redirectSlMeta, error) {
	m := &redirectSlMeta{NetnsInode: w.ID.NetnsInode}
	captured := slices.DeleteFunc(slices.Clone(w.Interfaces), func(name string) bool {
		return slices.Contains(w.Policy.ExcludeInterfaces, name)
	})
	if len(captured) > len(m.Interfaces) || len(w.Policy.ExcludeInterfaces) > len(m.Interfaces) {
		return nil, fmt.Errorf("more than %d interfaces to capture or to exclude", len(m.Interfaces))
	}
	ok := put(m.Uid[:], w.ID.PodUID) && put(m.Pod[:], w.Pod) && put(m.Netns[:], w.Netns)
	for i, name := range captured {
		ok = put(m.Interfaces[i][:], name) && ok
	}
	if !ok {
		return nil, fmt.Errorf("name of pod %q, its UID, namespace or interface is too long", w.Pod)
	}
	return m, nil
}

// add installs w over old, which is nil if the pod is new.
func (r *Redirector) add(h inside, cookie uint64, w redirect.Workload, meta *redirectSlMeta, old *redirectSlPod) (err error) {
	pod := &redirectSlPod{Digest: uint64(w.Digest()), ProxyUid: proxyUID(w)}
	for _, a := range w.Addrs {
		pod.setAddr(a.Unmap())
	}
	routes, err := h.resolve(w, meta, pod)
	if err != nil {
		return err
	}

	t := compile(w.Policy, routes)
	pod.OutPort, pod.OutAddr4, pod.OutAddr6, pod.InPort = t.outPort, t.outAddr4, t.outAddr6, t.inPort
	pod.Entries = uint32(t.entries())
	if pod.Policy, err = r.store.writePolicy(t); err != nil {
		return err
	}
	live := false
	defer func() {
		if !live {
			err = errors.Join(err, r.store.deletePolicy(pod.Policy, t.entries()))
		}
	}()
	if err := r.store.addMeta(cookie, meta); err != nil {
		return err
	}
	if err := r.addStats(cookie); err != nil {
		return err
	}
	if err := r.attachPod(h, meta, pod); err != nil {
		return err
	}
	for _, a := range pod.addrs() {
		if err := r.store.addAddr(cookie, a); err != nil {
			return err
		}
	}
	if err := r.setProxyCgroup(cookie, w.ProxyCgroup); err != nil {
		return err
	}
	// After this line the pod's traffic is redirected as w says.
	if err := write(r.store.Pods, redirectMapPods, cookie, pod, ebpf.UpdateAny); err != nil {
		return err
	}
	live = true
	// A listener that sockops did not see before that line is seen here.
	return errors.Join(r.findListeners(cookie, pod), r.trim(h, cookie, pod, old))
}

// setProxyCgroup says which cgroup the proxy's processes are in; "" is not known.
func (r *Redirector) setProxyCgroup(cookie uint64, path string) error {
	if path == "" {
		return deleteKey(r.store.ProxyCgroups, cookie)
	}
	root, err := r.root()
	if err != nil {
		return err
	}
	proxy, err := cgroup.Get(filepath.Join(root, path))
	if err != nil {
		return fmt.Errorf("find cgroup of the proxy: %w", err)
	}
	return write(r.store.ProxyCgroups, redirectMapProxyCgroups, cookie, proxy.ID, ebpf.UpdateAny)
}

// addStats makes the counters of a pod, unless it has them.
func (r *Redirector) addStats(cookie uint64) error {
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return fmt.Errorf("count CPUs: %w", err)
	}
	err = write(r.store.Stats, redirectMapStats, cookie, make([]redirectSlStats, cpus), ebpf.UpdateNoExist)
	if errors.Is(err, ebpf.ErrKeyExist) {
		return nil
	}
	return err
}

// trim removes what old had and pod has no more.
func (r *Redirector) trim(h inside, cookie uint64, pod, old *redirectSlPod) error {
	if old == nil {
		return nil
	}
	errs := []error{r.store.deletePolicy(old.Policy, int(old.Entries))}
	for _, a := range old.addrs() {
		if !slices.Contains(pod.addrs(), a) {
			errs = append(errs, r.store.deleteAddr(cookie, redirectSlAddr{Byte: a.As16()}))
		}
	}
	return errors.Join(append(errs, h.detachFilters(func(ifindex int) bool {
		return slices.Contains(pod.CapturedIf[:], uint32(ifindex))
	}, nil))...)
}

// resolve fills in the interfaces of pod and returns the pod's routes if one
// leads out of an excluded interface.
func (h inside) resolve(w redirect.Workload, meta *redirectSlMeta, pod *redirectSlPod) ([]route, error) {
	for i, name := range meta.interfaces() {
		l, err := h.LinkByName(name)
		if err != nil {
			return nil, fmt.Errorf("find interface %s: %w", name, err)
		}
		pod.CapturedIf[i] = uint32(l.Attrs().Index)
	}
	for i, name := range w.Policy.ExcludeInterfaces {
		l, err := h.LinkByName(name)
		if errors.As(err, &netlink.LinkNotFoundError{}) {
			continue // there is nothing to exclude
		}
		if err != nil {
			return nil, fmt.Errorf("find interface %s: %w", name, err)
		}
		pod.ExcludedIf[i] = uint32(l.Attrs().Index)
	}
	if len(w.Policy.ExcludeInterfaces) == 0 {
		return nil, nil
	}
	return h.routes(pod.ExcludedIf[:])
}

// routes returns the main routing table's routes, nil if none of them leads
// out of one of the interfaces.
func (h inside) routes(interfaces []uint32) ([]route, error) {
	var found []route
	any := false
	metric := make(map[netip.Prefix]int)
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		list, err := h.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
		if err != nil {
			return nil, fmt.Errorf("list routes: %w", err)
		}
		for _, n := range list {
			to, ok := destination(family, n.Dst)
			if !ok {
				continue
			}
			ifindex := n.LinkIndex
			if len(n.MultiPath) > 0 {
				ifindex = n.MultiPath[0].LinkIndex
			}
			r := route{to: to, excluded: slices.Contains(interfaces, uint32(ifindex))}
			// Of several routes to the same place the lowest metric counts.
			i := slices.IndexFunc(found, func(f route) bool { return f.to == to })
			switch {
			case i < 0:
				found = append(found, r)
			case n.Priority < metric[to]:
				found[i] = r
			default:
				continue
			}
			metric[to] = n.Priority
			any = any || r.excluded
		}
	}
	if !any {
		return nil, nil
	}
	return found, nil
}

// destination returns the prefix that a route leads to.
func destination(family int, dst *net.IPNet) (netip.Prefix, bool) {
	if dst == nil {
		if family == netlink.FAMILY_V4 {
			return netip.PrefixFrom(netip.IPv4Unspecified(), 0), true
		}
		return netip.PrefixFrom(netip.IPv6Unspecified(), 0), true
	}
	a, ok := netip.AddrFromSlice(dst.IP)
	ones, _ := dst.Mask.Size()
	if family == netlink.FAMILY_V4 {
		a = a.Unmap()
	}
	return netip.PrefixFrom(a, ones).Masked(), ok
}

// attachPod attaches the pod's own hooks, or updates them, and sees to ::6.
// They do nothing until the pod is in the maps.
func (r *Redirector) attachPod(h inside, meta *redirectSlMeta, pod *redirectSlPod) error {
	if pod.has6() {
		// First, because the kernel takes its time: see below.
		if err := h.addProxySource6(); err != nil {
			return err
		}
	}
	dir := r.podDir(meta.id())
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make pin directory: %w", err)
	}
	if err := r.attachLookup(dir, meta.NetnsInode); err != nil {
		return err
	}
	for _, ifindex := range pod.CapturedIf {
		if ifindex == 0 {
			break
		}
		if err := r.attachIngress(h, ifindex); err != nil {
			return err
		}
	}
	if err := reusePorts(r.dir, meta.NetnsInode); err != nil {
		// A limit, no reason to leave the pod without redirection.
		r.log.Warn("ports of a pod's clients are used again only after a minute", "pod", text(meta.Pod[:]), "pod_uid", text(meta.Uid[:]), "err", err)
	}
	if pod.has6() {
		return h.awaitProxySource6()
	}
	return nil
}

// has6 reports whether the pod has an IPv6 address.
func (p *redirectSlPod) has6() bool {
	return slices.ContainsFunc(p.addrs(), netip.Addr.Is6)
}

// Remove implements redirect.Redirector. While the proxy has connections to the
// app from ::6, that address stays; List takes it away when they have ended.
func (r *Redirector) Remove(_ context.Context, id redirect.ID) error {
	return r.end(id, whenIdle)
}

// Yield implements redirect.Yielder. It leaves nothing but ::6.
func (r *Redirector) Yield(_ context.Context, id redirect.ID) error {
	return r.end(id, yielded)
}

// An ending says what becomes of ::6, which connections may still need.
type ending int

const (
	atOnce   ending = iota // it goes, and the connections end
	whenIdle               // it stays as long as they do
	yielded                // it is the next backend's
)

func (r *Redirector) end(id redirect.ID, how ending) error {
	unlock, err := r.begin(id)
	if err != nil {
		return err
	}
	defer unlock()
	if _, err := r.remove(id, how); err != nil {
		return fmt.Errorf("end redirection of %s: %w", id, err)
	}
	return nil
}

// remove ends a redirection, in its turn, and says whether ::6 has to stay.
func (r *Redirector) remove(id redirect.ID, how ending) (left bool, err error) {
	cookie, meta, err := r.store.find(id)
	if err != nil {
		return false, err
	}
	if meta == nil {
		return false, detachAll(r.podDir(id))
	}
	err = errors.Join(r.store.release(cookie), detachAll(r.podDir(id)))
	left, inside := cleanNamespace(r.dir, meta, how)
	if err = errors.Join(err, inside); err != nil || left {
		return left, err // meta stays, so that the rest is found
	}
	return false, r.store.deleteMeta(cookie, id)
}

// cleanNamespace removes what a pod has inside its namespace, if that is still
// there, and says whether ::6 has to stay.
func cleanNamespace(dir string, meta *redirectSlMeta, how ending) (left bool, err error) {
	path := text(meta.Netns[:])
	err = sameNamespace(path, meta.NetnsInode)
	if err == nil {
		err = within(path, func(h inside) error {
			err := errors.Join(h.detachFilters(func(int) bool { return false }, meta.interfaces()), restorePorts(dir, meta.NetnsInode))
			if how == whenIdle {
				var used error
				left, used = proxySource6Used()
				err = errors.Join(err, used)
			}
			if how == yielded || left {
				return err
			}
			return errors.Join(err, h.removeProxySource6())
		})
	}
	if errors.Is(err, redirect.ErrGone) {
		return false, forgetReuse(dir, meta.NetnsInode)
	}
	return left, err
}

// sameNamespace returns an error wrapping redirect.ErrGone unless path leads to
// the namespace with this inode.
func sameNamespace(path string, inode uint64) error {
	got, err := netns.Inode(path)
	if err != nil {
		return err
	}
	if got != inode {
		return fmt.Errorf("network namespace %s: another one is there now: %w", path, redirect.ErrGone)
	}
	return nil
}

// List implements redirect.Redirector. A workload whose namespace has vanished
// has a Problem that wraps redirect.ErrGone.
func (r *Redirector) List(ctx context.Context) ([]redirect.Installed, error) {
	unlock, err := lock(r.dir, true)
	if err != nil {
		return nil, err
	}
	defer unlock()
	// First what there is, then each workload in its turn.
	found := make(map[redirect.ID]uint64)
	err = r.store.each(func(cookie uint64, meta *redirectSlMeta) error {
		found[meta.id()] = cookie
		return ctx.Err()
	})
	node := errors.Join(r.hookProblem(), r.knowPods(true))
	var all []redirect.Installed
	for id, cookie := range found {
		i, ok, lookErr := r.look(id, cookie, node)
		if lookErr != nil || ctx.Err() != nil {
			err = errors.Join(err, lookErr, ctx.Err())
			break
		}
		if ok {
			all = append(all, i)
		}
	}
	slices.SortFunc(all, func(a, b redirect.Installed) int { return strings.Compare(a.ID.String(), b.ID.String()) })
	return all, err
}

// look returns what is installed of a workload, and takes away what Remove has
// left. node is what is wrong with the node's hooks.
func (r *Redirector) look(id redirect.ID, cookie uint64, node error) (i redirect.Installed, ok bool, err error) {
	defer r.turns.Take(id)()
	meta, err := r.store.meta(cookie)
	if err != nil || meta == nil || meta.id() != id {
		return i, false, err // removed since
	}
	pod, err := r.store.pod(cookie)
	if err != nil {
		return i, false, err
	}
	i = redirect.Installed{ID: id, Pod: text(meta.Pod[:]), Netns: text(meta.Netns[:])}
	switch {
	case pod == nil && !isDir(r.podDir(id)): // Remove came as far as ::6
		_, i.Problem = r.remove(id, whenIdle)
		return i, i.Problem != nil, nil
	case pod == nil:
		i.Problem = errors.New("installed or removed only in part")
	default:
		i.Digest = redirect.Digest(pod.Digest)
		if i.Problem = node; node == nil {
			i.Problem = r.podProblem(cookie, meta, pod)
		}
	}
	return i, true, nil
}

// podProblem names what is missing of a pod's redirection.
func (r *Redirector) podProblem(cookie uint64, meta *redirectSlMeta, pod *redirectSlPod) error {
	path := text(meta.Netns[:])
	if err := sameNamespace(path, meta.NetnsInode); err != nil {
		return err
	}
	if err := r.outsideProblem(cookie, meta, pod); err != nil {
		return err
	}
	return within(path, func(h inside) error {
		if err := r.insideProblem(h, meta, pod); err != nil {
			return err
		}
		return r.findListeners(cookie, pod)
	})
}

// outsideProblem names what is missing in the maps and of the pins.
func (r *Redirector) outsideProblem(cookie uint64, meta *redirectSlMeta, pod *redirectSlPod) error {
	for _, a := range pod.addrs() {
		var owner uint64
		if err := r.store.PodIps.Lookup(&redirectSlAddr{Byte: a.As16()}, &owner); err != nil {
			return fmt.Errorf("address %s in map %s: %w", a, redirectMapPodIps, err)
		}
		if owner != cookie {
			return fmt.Errorf("address %s in map %s belongs to another pod", a, redirectMapPodIps)
		}
	}
	info, err := pinnedInfo(filepath.Join(r.podDir(meta.id()), pinLookup))
	if err != nil {
		return err
	}
	if info.NetNs() == nil || uint64(info.NetNs().NetnsInode) != meta.NetnsInode {
		return errors.New("sk_lookup link is not attached to the pod's network namespace")
	}
	return nil
}

// insideProblem names what is missing inside the pod's namespace.
func (r *Redirector) insideProblem(h inside, meta *redirectSlMeta, pod *redirectSlPod) error {
	for i, name := range meta.interfaces() {
		l, err := h.LinkByName(name)
		if err != nil {
			return fmt.Errorf("find interface %s: %w", name, err)
		}
		if uint32(l.Attrs().Index) != pod.CapturedIf[i] {
			return fmt.Errorf("interface %s was made anew", name)
		}
		own, _, err := h.filters(l)
		if err != nil {
			return err
		}
		if len(own) == 0 {
			return fmt.Errorf("the filter on interface %s is gone", name)
		}
	}
	if !pod.has6() {
		return nil
	}
	has, err := h.hasProxySource6()
	if err == nil && !has {
		err = errors.New("address ::6 is missing on lo")
	}
	return err
}

// pinnedInfo returns what the kernel says of a pinned link.
func pinnedInfo(path string) (*link.Info, error) {
	l, err := link.LoadPinnedLink(path, nil)
	if err != nil {
		return nil, fmt.Errorf("open pinned link %s: %w", path, err)
	}
	defer func() { _ = l.Close() }()
	info, err := l.Info()
	if err != nil {
		return nil, fmt.Errorf("read pinned link %s: %w", path, err)
	}
	return info, nil
}

// proxyUID is the proxy's user ID as bpf_get_current_uid_gid tells it: that of
// the initial user namespace.
func proxyUID(w redirect.Workload) uint32 {
	if w.HostProxyUID != 0 {
		return w.HostProxyUID
	}
	return w.Policy.ProxyUID
}
