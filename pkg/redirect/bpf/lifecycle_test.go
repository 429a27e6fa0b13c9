package bpf

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/link"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/pkg/redirect/netns"
	"github.com/sluicemesh/sluice/pkg/redirect/redirecttest"
	"github.com/sluicemesh/sluice/tests/need"
	"github.com/sluicemesh/sluice/tests/netnstest"
)

// anyUID is no proxy's: the tests themselves run as root.
const anyUID = redirect.DefaultProxyUID

func workload(tb testing.TB, pod *netnstest.Pod) redirect.Workload {
	tb.Helper()
	p := redirect.DefaultPolicy()
	p.ProxyUID = anyUID
	return redirect.Workload{
		ID:  redirect.ID{PodUID: "uid." + pod.Name, NetnsInode: pod.Inode(tb)},
		Pod: "bpf/" + pod.Name, Netns: pod.Netns, Addrs: pod.Addrs(), Interfaces: []string{"eth0"}, Policy: p,
	}
}

func mustAdd(tb testing.TB, r *Redirector, w redirect.Workload) {
	tb.Helper()
	if err := r.Add(tb.Context(), w); err != nil {
		tb.Fatal(err)
	}
}

func wantName(tb testing.TB, from netnstest.Namespace, to netip.AddrPort, name string) {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), 10*time.Second)
	defer cancel()
	a, err := from.Ask(ctx, to)
	if err != nil {
		tb.Fatalf("connect to %s: %v", to, err)
	}
	if a.Name != name {
		tb.Fatalf("connect to %s: %q answers, want %q", to, a.Name, name)
	}
}

// proxy stands for Envoy in pod: it listens on both of its ports.
func proxy(tb testing.TB, pod *netnstest.Pod) {
	tb.Helper()
	for _, port := range []uint16{redirect.OutboundPort, redirect.InboundPort} {
		pod.Serve(tb, netip.AddrPortFrom(netip.IPv6Unspecified(), port), "proxy")
	}
}

// TestTakeOver replaces the Redirector again and again, as an agent that is
// killed and started does, while both directions are under load.
func TestTakeOver(t *testing.T) {
	o := newOptions(t)
	pod, peer := newPair(t)
	r := open(t, o)
	w := workload(t, pod)
	mustAdd(t, r, w)
	before, err := r.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	open1, err := pod.Dial(t.Context(), "tcp", app(peer).String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = open1.Close() }()
	if _, err := netnstest.ReadAnswer(t.Context(), open1); err != nil {
		t.Fatal(err)
	}
	load := startLoad(t, pod, peer)
	for range 8 {
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		load.more(t, 20, func() {
			if err := netnstest.Echo(t.Context(), open1, "still there"); err != nil {
				t.Fatal(err)
			}
		})
		r = open(t, o)
	}
	load.end()
	after, err := r.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(before, after); diff != "" {
		t.Errorf("list has changed (-before +after):\n%s", diff)
	}
	if err := r.Remove(t.Context(), w.ID); err != nil {
		t.Fatal(err)
	}
	wantName(t, pod.Namespace, app(peer), "peer")
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestTakeOverOtherPrograms shows that a new process replaces the programs of
// all links and filters, and ends the tcx links of earlier builds.
func TestTakeOverOtherPrograms(t *testing.T) {
	o := newOptions(t)
	pod := netnstest.NewNode(t).Pod(t, "pod")
	r := open(t, o)
	w := workload(t, pod)
	mustAdd(t, r, w)
	tcx := pinOldTCX(t, r, w)
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}

	links := func() (ids []ebpf.ProgramID) {
		t.Helper()
		if err := filepath.WalkDir(o.PinDir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || strings.HasPrefix(path, filepath.Join(o.PinDir, "maps")) {
				return err
			}
			info, err := pinnedInfo(path)
			if err == nil {
				ids = append(ids, info.Program)
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
		return ids
	}
	old := links()
	r = open(t, o)
	defer func() { _ = r.Close() }()
	fresh := links()
	const want = 9
	if len(old) != want+tcx || len(fresh) != want {
		t.Errorf("%d links before, %d after, want %d and %d", len(old), len(fresh), want+tcx, want)
	}
	for _, id := range fresh {
		if slices.Contains(old, id) {
			t.Errorf("program %d is still attached", id)
		}
	}
	// The kernel frees programs a moment later.
	for deadline := time.Now().Add(5 * time.Second); len(old) > 0; {
		p, err := ebpf.NewProgramFromID(old[0])
		if err != nil {
			old = old[1:]
			continue
		}
		_ = p.Close()
		if time.Now().After(deadline) {
			t.Fatalf("program %d is still loaded", old[0])
		}
	}
}

func TestIncompatibleMap(t *testing.T) {
	for name, spoil := range map[string]func(t *testing.T, dir string){
		"other value size": func(t *testing.T, dir string) {
			replaceMap(t, filepath.Join(dir, redirectMapPods), &ebpf.MapSpec{
				Type: ebpf.Hash, KeySize: 8, ValueSize: 8, MaxEntries: 1, Flags: unix.BPF_F_NO_PREALLOC,
			})
		},
		"other layout": func(t *testing.T, dir string) {
			m, err := ebpf.LoadPinnedMap(filepath.Join(dir, redirectMapLayouts), nil)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = m.Close() }()
			if err := m.Put(mapName(redirectMapPods), uint64(1)); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			o := newOptions(t)
			if err := open(t, o).Close(); err != nil {
				t.Fatal(err)
			}
			dir := filepath.Join(o.PinDir, "maps")
			spoil(t, dir)
			before := mapID(t, filepath.Join(dir, redirectMapPods))
			_, err := New(o)
			if !errors.Is(err, ErrIncompatible) || !strings.Contains(err.Error(), strconv.Quote(redirectMapPods)) {
				t.Errorf("got %v, want ErrIncompatible that names map %q", err, redirectMapPods)
			}
			if after := mapID(t, filepath.Join(dir, redirectMapPods)); after != before {
				t.Errorf("map %d was replaced by %d", before, after)
			}
		})
	}
}

func replaceMap(t *testing.T, path string, spec *ebpf.MapSpec) {
	t.Helper()
	m, err := ebpf.NewMap(spec)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = m.Close() }()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := m.Pin(path); err != nil {
		t.Fatal(err)
	}
}

func mapID(t *testing.T, path string) ebpf.MapID {
	t.Helper()
	m, err := ebpf.LoadPinnedMap(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = m.Close() }()
	info, err := m.Info()
	if err != nil {
		t.Fatal(err)
	}
	id, _ := info.ID()
	return id
}

// TestMapsKeepTheirSize: a new default must not keep a process from taking over.
func TestMapsKeepTheirSize(t *testing.T) {
	o := newOptions(t)
	o.Sizes = Sizes{Pods: 3, Ports: 30, CIDRs: 31, Handover: 32, Probes: 33}
	if err := open(t, o).Close(); err != nil {
		t.Fatal(err)
	}
	o.Sizes = Sizes{}
	r := open(t, o)
	defer func() { _ = r.Close() }()
	usage, err := r.MapUsage(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := []redirect.MapUsage{
		{Name: "pods", Capacity: 3},
		{Name: "pod_ips", Capacity: 6},
		{Name: "ports", Capacity: 30},
		{Name: "cidrs", Capacity: 31},
		{Name: "handover", Capacity: 32},
		{Name: "listeners", Capacity: 6},
		{Name: "probes", Capacity: 33},
		{Name: "proxy_cgroups", Capacity: 3},
	}
	if diff := cmp.Diff(want, usage); diff != "" {
		t.Errorf("usage (-want +got):\n%s", diff)
	}
}

// TestUninstall compares what the kernel has before and after, without a
// Redirector at work and with a namespace that is gone.
func TestUninstall(t *testing.T) {
	o := newOptions(t)
	node := netnstest.NewNode(t)
	pod, gone := node.Pod(t, "pod"), node.Pod(t, "gone")
	state := pod.State(t)
	r := open(t, o)
	w := workload(t, pod)
	w.Policy.Outbound.ExcludePorts.List = []uint16{25}
	mustAdd(t, r, w)
	mustAdd(t, r, workload(t, gone))
	own := objects(t, o.PinDir)
	if len(own) < 8 {
		t.Fatalf("only %d objects are pinned", len(own))
	}
	if pod.State(t).Diff(state) == "" {
		t.Error("Add has changed nothing in the namespace")
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	gone.Remove(t)
	for range 2 {
		if err := Uninstall(t.Context(), o); err != nil {
			t.Fatal(err)
		}
	}
	if diff := pod.State(t).Diff(state); diff != "" {
		t.Errorf("left in the namespace:\n%s", diff)
	}
	// The kernel frees maps and programs a moment later.
	deadline := time.Now().Add(5 * time.Second)
	for exist(own) != "" && time.Now().Before(deadline) {
		if _, err := os.ReadDir("/proc"); err != nil {
			t.Fatal(err)
		}
	}
	if left := exist(own); left != "" {
		t.Errorf("left in the kernel: %s", left)
	}
	if _, err := os.Stat(o.PinDir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("pin directory: %v", err)
	}
}

// An object is a map, a program or a link of the kernel.
type object struct {
	kind string
	id   uint32
}

// objects returns what is pinned below dir and the programs that it runs.
func objects(t *testing.T, dir string) (all []object) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		if m, err := ebpf.LoadPinnedMap(path, nil); err == nil {
			_ = m.Close()
			all = append(all, object{"map", uint32(mapID(t, path))})
			return nil
		}
		info, err := pinnedInfo(path)
		if err == nil {
			all = append(all, object{"link", uint32(info.ID)}, object{"program", uint32(info.Program)})
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// exist names those of all that the kernel still has.
func exist(all []object) string {
	var left []string
	for _, o := range all {
		var err error
		var c interface{ Close() error }
		switch o.kind {
		case "map":
			c, err = ebpf.NewMapFromID(ebpf.MapID(o.id))
		case "link":
			c, err = link.NewFromID(link.ID(o.id))
		case "program":
			c, err = ebpf.NewProgramFromID(ebpf.ProgramID(o.id))
		}
		if err == nil {
			_ = c.Close()
			left = append(left, fmt.Sprintf("%s %d", o.kind, o.id))
		}
	}
	return strings.Join(left, ", ")
}

// pinOldTCX pins what earlier builds had on a pod's interface where the kernel has
// tcx (6.6), and says how many links those are.
func pinOldTCX(t *testing.T, r *Redirector, w redirect.Workload) (n int) {
	t.Helper()
	version, err := features.LinuxVersionCode()
	if err != nil {
		t.Fatal(err)
	}
	if version < 6<<16|6<<8 {
		return 0
	}
	err = within(w.Netns, func(h inside) error {
		eth0, err := h.LinkByName("eth0")
		if err != nil {
			return err
		}
		l, err := link.AttachTCX(link.TCXOptions{
			Interface: eth0.Attrs().Index, Program: r.programs.SlIngress, Attach: ebpf.AttachTCXIngress,
		})
		if err != nil {
			return err
		}
		return errors.Join(l.Pin(filepath.Join(r.podDir(w.ID), pinTCX+strconv.Itoa(eth0.Attrs().Index))), l.Close())
	})
	if err != nil {
		t.Fatal(err)
	}
	return 1
}

// TestMend takes parts of the redirection away and has Add put them back.
func TestMend(t *testing.T) {
	o := newOptions(t)
	node := netnstest.NewNode(t)
	pod, peer := node.Pod(t, "pod"), node.Pod(t, "peer")
	proxy(t, pod)
	pod.Serve(t, netip.AddrPortFrom(pod.Addr6, 80), "app")
	peer.Serve(t, netip.AddrPortFrom(peer.Addr6, 80), "peer")
	r := open(t, o)
	defer func() { _ = r.Close() }()
	w := workload(t, pod)
	mustAdd(t, r, w)
	pins, err := os.ReadDir(r.podDir(w.ID))
	if err != nil {
		t.Fatal(err)
	}
	damage := map[string]func() error{
		"::6":             func() error { return within(pod.Netns, inside.removeProxySource6) },
		"pod_ips":         func() error { return r.store.PodIps.Delete(&redirectSlAddr{Byte: pod.Addr6.As16()}) },
		"hook connect6":   func() error { return detachPinned(filepath.Join(r.hookDir(), "connect6")) },
		"hook getsockopt": func() error { return os.Remove(filepath.Join(r.hookDir(), "getsockopt")) },
	}
	for _, pin := range pins {
		damage[pin.Name()] = func() error { return detachPinned(filepath.Join(r.podDir(w.ID), pin.Name())) }
	}
	damage["filter"] = func() error {
		return within(pod.Netns, func(h inside) error { return h.detachFilters(func(int) bool { return false }, nil) })
	}
	if len(damage) != 6 {
		t.Fatalf("pins of the pod: %v", pins)
	}
	for what, do := range damage {
		t.Run(what, func(t *testing.T) {
			if err := do(); err != nil {
				t.Fatal(err)
			}
			list, err := r.List(t.Context())
			if err != nil || len(list) != 1 || list[0].Problem == nil {
				t.Fatalf("List() = %v, %v; want one with a problem", list, err)
			}
			t.Logf("problem: %v", list[0].Problem)
			mustAdd(t, r, w)
			if list, err = r.List(t.Context()); err != nil || len(list) != 1 || list[0].Problem != nil {
				t.Errorf("after Add List() = %v, %v", list, err)
			}
			wantName(t, pod.Namespace, netip.AddrPortFrom(peer.Addr6, 80), "proxy")
			wantName(t, peer.Namespace, netip.AddrPortFrom(pod.Addr6, 80), "proxy")
		})
	}
}

// TestAddressOfAnother gives a pod's address to a new pod before the old one is
// removed, as a fast runtime does.
func TestAddressOfAnother(t *testing.T) {
	o := newOptions(t)
	node := netnstest.NewNode(t)
	pod, peer, client := node.Pod(t, "old"), node.Pod(t, "new"), node.Pod(t, "client")
	proxy(t, peer)
	peer.Serve(t, netip.AddrPortFrom(peer.Addr4, 80), "app")
	r := open(t, o)
	defer func() { _ = r.Close() }()
	w, next := workload(t, pod), workload(t, peer)
	w.Addrs = next.Addrs // a stale claim
	mustAdd(t, r, w)
	mustAdd(t, r, next)
	if err := r.Remove(t.Context(), w.ID); err != nil {
		t.Fatal(err)
	}
	wantName(t, client.Namespace, netip.AddrPortFrom(peer.Addr4, 80), "proxy")
	list, err := r.List(t.Context())
	if err != nil || len(list) != 1 || list[0].Problem != nil {
		t.Errorf("List() = %v, %v", list, err)
	}
}

// TestRemoveAfterDeathInBetween: an Add that died before its last step, or a
// Remove after its first, leaves addresses that no entry of the pod names.
func TestRemoveAfterDeathInBetween(t *testing.T) {
	o := newOptions(t)
	pod := netnstest.NewNode(t).Pod(t, "pod")
	r := open(t, o)
	defer func() { _ = r.Close() }()
	w := workload(t, pod)
	clean := pod.State(t)
	mustAdd(t, r, w)
	cookie, err := netns.Cookie(pod.Netns)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.store.Pods.Delete(cookie); err != nil {
		t.Fatal(err)
	}
	list, err := r.List(t.Context())
	if err != nil || len(list) != 1 || list[0].Problem == nil {
		t.Fatalf("List() = %v, %v; want one workload with a problem", list, err)
	}
	if err := r.Remove(t.Context(), w.ID); err != nil {
		t.Fatal(err)
	}
	for _, m := range []*ebpf.Map{r.store.PodIps, r.store.PodMeta, r.store.Stats} {
		if n, err := count(t.Context(), m); err != nil || n != 0 {
			t.Errorf("%d entries are left in %s, %v", n, m, err)
		}
	}
	if diff := clean.Diff(pod.State(t)); diff != "" {
		t.Errorf("the namespace is not as before:\n%s", diff)
	}
}

// TestFull fills maps: nothing may get past the proxy, and Add must undo what
// it has begun.
func TestFull(t *testing.T) {
	o := newOptions(t)
	o.Sizes = Sizes{Handover: 1, Ports: 8, CIDRs: 4}
	node := netnstest.NewNode(t)
	pod, peer := node.Pod(t, "pod"), node.Pod(t, "peer")
	proxy(t, pod)
	peer.Serve(t, netip.AddrPortFrom(peer.Addr4, 80), "peer")
	r := open(t, o)
	defer func() { _ = r.Close() }()
	w := workload(t, pod)
	mustAdd(t, r, w)
	if err := r.store.Handover.Put(&redirectSlFlowKey{Netns: 1}, &redirectSlTarget{}); err != nil {
		t.Fatal(err)
	}
	wantName(t, pod.Namespace, netip.AddrPortFrom(peer.Addr4, 80), "proxy")
	if n := counted(t, r, redirect.Outbound, denied, "handover_full"); n != 1 {
		t.Errorf("handover_full is %d, want 1", n)
	}

	big := w
	for port := range uint16(20) {
		big.Policy.Outbound.ExcludePorts.List = append(big.Policy.Outbound.ExcludePorts.List, 100+port)
	}
	if err := r.Add(t.Context(), big); err == nil || !strings.Contains(err.Error(), "map ports: all 8 entries are in use") {
		t.Fatalf("Add of 20 ports in a map of 8: %v", err)
	}
	big = w
	for i := range byte(20) {
		big.Policy.Outbound.ExcludeCIDRs.List = append(big.Policy.Outbound.ExcludeCIDRs.List, netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 0, 2, i}), 32))
	}
	if err := r.Add(t.Context(), big); err == nil || !strings.Contains(err.Error(), "map cidrs: all 4 entries are in use") {
		t.Fatalf("Add of 20 prefixes in a map of 4: %v", err)
	}
	list, err := r.List(t.Context())
	if err != nil || len(list) != 1 || list[0].Digest != w.Digest() || list[0].Problem != nil {
		t.Errorf("List() = %v, %v; want the old workload", list, err)
	}
	if n, err := count(t.Context(), r.store.Ports); err != nil || n != 0 {
		t.Errorf("%d ports are left behind, %v", n, err)
	}
}

// TestFullOfPods: one pod more than there is room for is refused by the map's
// name and leaves nothing; the others stay, and there is room again when one goes.
func TestFullOfPods(t *testing.T) {
	o := newOptions(t)
	o.Sizes = Sizes{Pods: 2}
	node := netnstest.NewNode(t)
	r := open(t, o)
	defer func() { _ = r.Close() }()
	var all []redirect.Workload
	for range 3 {
		pod := node.Pod(t, "pod")
		proxy(t, pod)
		all = append(all, workload(t, pod))
	}
	mustAdd(t, r, all[0])
	mustAdd(t, r, all[1])
	if err := r.Add(t.Context(), all[2]); err == nil || !strings.Contains(err.Error(), "all 2 entries are in use") {
		t.Fatalf("Add of a third pod: %v", err)
	}
	if list, err := r.List(t.Context()); err != nil || len(list) != 2 || list[0].Problem != nil || list[1].Problem != nil {
		t.Errorf("List() = %v, %v; want the first two, whole", list, err)
	}
	if err := r.Remove(t.Context(), all[0].ID); err != nil {
		t.Fatal(err)
	}
	mustAdd(t, r, all[2])
	if list, err := r.List(t.Context()); err != nil || len(list) != 2 || list[0].Problem != nil || list[1].Problem != nil {
		t.Errorf("after one has gone List() = %v, %v; want two, whole", list, err)
	}
}

func counted(t *testing.T, r *Redirector, d redirect.Direction, verdict, reason string) (n uint64) {
	t.Helper()
	all, err := r.Counters(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range all {
		if c.Direction == d && c.Verdict == verdict && c.Reason == reason {
			n += c.Value
		}
	}
	return n
}

// TestHandoverIsTemporary shows that no entry stays after connections that
// succeed, are refused or are given up.
func TestHandoverIsTemporary(t *testing.T) {
	o := newOptions(t)
	pod := netnstest.NewNode(t).Pod(t, "pod")
	r := open(t, o)
	defer func() { _ = r.Close() }()
	mustAdd(t, r, workload(t, pod))
	dst := netip.MustParseAddrPort("192.0.2.1:80")
	for range 10 {
		if c, err := pod.Dial(t.Context(), "tcp", dst.String()); err == nil {
			_ = c.Close()
			t.Fatal("connected without a proxy")
		} else if !errors.Is(err, unix.ECONNREFUSED) {
			t.Fatal(err)
		}
	}
	if n := counted(t, r, redirect.Outbound, denied, "proxy_down"); n != 10 {
		t.Errorf("proxy_down is %d, want 10", n)
	}
	proxy(t, pod)
	for range 10 {
		wantName(t, pod.Namespace, dst, "proxy")
	}
	if n := counted(t, r, redirect.Outbound, redirected, "captured"); n != 10 {
		t.Errorf("captured is %d, want 10", n)
	}
	if n, err := count(t.Context(), r.store.Handover); err != nil || n != 0 {
		t.Errorf("%d handover entries are left, %v", n, err)
	}
}

// TestShortConnections makes 20,000 connections to one destination, in each
// direction and with few client ports, so that each meets the TIME_WAIT that
// its predecessor has left at the server. No SYN may be sent twice.
func TestShortConnections(t *testing.T) {
	const connections, workers = 20_000, 4
	o := newOptions(t)
	node := netnstest.NewNode(t)
	pod, peer := node.Pod(t, "pod"), node.Pod(t, "peer")
	for _, p := range []*netnstest.Pod{pod, peer} {
		p.Sysctl(t, "net/ipv4/ip_local_port_range", "20000 27999")
	}
	r := open(t, o)
	defer func() { _ = r.Close() }()
	mustAdd(t, r, workload(t, pod))
	for _, port := range []uint16{redirect.OutboundPort, redirect.InboundPort} {
		closeAtOnce(t, pod.Namespace, netip.AddrPortFrom(netip.IPv6Unspecified(), port))
	}
	for name, way := range map[string]struct {
		from *netnstest.Pod
		to   netip.AddrPort
	}{
		"outbound": {pod, netip.MustParseAddrPort("192.0.2.1:80")},
		"inbound":  {peer, netip.AddrPortFrom(pod.Addr4, 80)},
	} {
		t.Run(name, func(t *testing.T) {
			before := retransmitted(t, pod, peer)
			start := time.Now()
			var work sync.WaitGroup
			for range workers {
				work.Go(func() {
					if err := way.from.Do(func() error { return connectAndRead(way.to, connections/workers) }); err != nil {
						t.Error(err)
					}
				})
			}
			work.Wait()
			t.Logf("%d connections in %v", connections, time.Since(start))
			if n := retransmitted(t, pod, peer) - before; n != 0 {
				t.Errorf("%d SYNs were sent twice", n)
			}
		})
	}
	for _, d := range []redirect.Direction{redirect.Outbound, redirect.Inbound} {
		if n := counted(t, r, d, redirected, "captured"); n != connections {
			t.Errorf("%d connections were captured %s, want %d", n, d, connections)
		}
	}
}

// closeAtOnce serves connections with one byte and closes them first.
func closeAtOnce(t *testing.T, ns netnstest.Namespace, addr netip.AddrPort) {
	t.Helper()
	l, err := ns.Listen(t.Context(), "tcp", addr.String())
	if err != nil {
		t.Fatal(err)
	}
	var done sync.WaitGroup
	done.Go(func() {
		for {
			c, err := l.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				_, _ = c.Write([]byte{'x'})
				_ = c.Close()
			}
		}
	})
	t.Cleanup(func() { _ = l.Close(); done.Wait() })
}

// connectAndRead connects n times and reads to the end.
func connectAndRead(to netip.AddrPort, n int) error {
	sa := &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}
	one := func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open socket: %w", err)
		}
		defer func() { _ = unix.Close(fd) }()
		if err := unix.Connect(fd, sa); err != nil {
			return fmt.Errorf("connect: %w", err)
		}
		var b [4]byte
		if k, err := unix.Read(fd, b[:]); err != nil || k != 1 {
			return fmt.Errorf("read: %d bytes, %w", k, err)
		}
		if k, err := unix.Read(fd, b[:]); err != nil || k != 0 {
			return fmt.Errorf("read end: %d bytes, %w", k, err)
		}
		return nil
	}
	for i := range n {
		if err := one(); err != nil {
			return fmt.Errorf("connection %d: %w", i, err)
		}
	}
	return nil
}

// retransmitted is the number of SYNs that the pods have sent again.
func retransmitted(t *testing.T, pods ...*netnstest.Pod) (sum int) {
	t.Helper()
	for _, p := range pods {
		err := p.Do(func() error {
			b, err := os.ReadFile("/proc/thread-self/net/netstat")
			if err != nil {
				return err
			}
			names, values, _ := bytes.Cut(b, []byte{'\n'})
			values, _, _ = bytes.Cut(values, []byte{'\n'})
			i := slices.Index(strings.Fields(string(names)), "TCPSynRetrans")
			if i < 0 {
				return errors.New("no TCPSynRetrans in netstat")
			}
			n, err := strconv.Atoi(strings.Fields(string(values))[i])
			sum += n
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return sum
}

// TestAdminPort: only the proxy and whoever carries the agent's mark may reach
// the proxy's admin interface.
func TestAdminPort(t *testing.T) {
	o := newOptions(t)
	pod := netnstest.NewNode(t).Pod(t, "pod")
	pod.Serve(t, netip.AddrPortFrom(netip.IPv6Unspecified(), redirect.AdminPort), "admin")
	r := open(t, o)
	defer func() { _ = r.Close() }()
	mustAdd(t, r, workload(t, pod))
	for _, a := range []netip.Addr{pod.Addr4, pod.Addr6, netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()} {
		to := netip.AddrPortFrom(a, redirect.AdminPort).String()
		if c, err := pod.Dial(t.Context(), "tcp", to); err == nil {
			_ = c.Close()
			t.Errorf("anyone may connect to %s", to)
		} else if !errors.Is(err, unix.EPERM) {
			t.Errorf("connect to %s: %v, want EPERM", to, err)
		}
		marked := net.Dialer{ControlContext: func(_ context.Context, _, _ string, c syscall.RawConn) error {
			var err error
			return errors.Join(c.Control(func(fd uintptr) {
				err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, AgentMark)
			}), err)
		}}
		c, err := pod.DialWith(t.Context(), marked, "tcp", to)
		if err != nil {
			t.Errorf("agent's connection to %s: %v", to, err)
			continue
		}
		_ = c.Close()
	}
	if n := counted(t, r, redirect.Outbound, denied, "admin_port"); n != 4 {
		t.Errorf("admin_port is %d, want 4", n)
	}
}

// TestUninstallOfNothing: there may have been no agent.
func TestUninstallOfNothing(t *testing.T) {
	need.EBPF(t)
	for _, dir := range []string{t.TempDir(), "/proc/no/such"} {
		if err := Uninstall(t.Context(), Options{PinDir: filepath.Join(dir, "sluice")}); err != nil {
			t.Errorf("%s: %v", dir, err)
		}
	}
}

// TestNoMount: where mounts end with the process only the node's own bpffs will
// do, which is the node's to mount and to keep.
func TestNoMount(t *testing.T) {
	node := newOptions(t)
	dir := filepath.Dir(node.PinDir)
	o := node
	o.NoMount = true
	wantBPFFS := func(want bool) {
		t.Helper()
		if got, err := isBPFFS(dir); err != nil || got != want {
			t.Fatalf("%s is a bpffs: %v, %v; want %v", dir, got, err, want)
		}
	}
	_, err := New(o)
	if !errors.Is(err, redirect.ErrNotSupported) || !strings.Contains(fmt.Sprint(err), "mount -t bpf bpf "+dir) {
		t.Errorf("without a bpffs: got %v, want ErrNotSupported that says how to mount one", err)
	}
	wantBPFFS(false)
	if err := Uninstall(t.Context(), o); err != nil {
		t.Errorf("uninstall without a bpffs: %v", err)
	}
	wantBPFFS(false)
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		t.Errorf("left in %s: %v, %v", dir, entries, err)
	}

	if err := provideBPFFS(dir, false); err != nil {
		t.Fatal(err)
	}
	if err := open(t, o).Close(); err != nil {
		t.Fatal(err)
	}
	if err := Uninstall(t.Context(), o); err != nil {
		t.Errorf("uninstall: %v", err)
	}
	wantBPFFS(true)
	if _, err := os.Stat(o.PinDir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("pin directory: %v", err)
	}
}

// TestHookRunsTwice: while a new process moves the hooks to another cgroup,
// the old and the new connect program both run for a connection.
func TestHookRunsTwice(t *testing.T) {
	o := newOptions(t)
	pod := netnstest.NewNode(t).Pod(t, "pod")
	proxy(t, pod)
	first := open(t, o)
	defer func() { _ = first.Close() }()
	mustAdd(t, first, workload(t, pod))
	second := open(t, o)
	defer func() { _ = second.Close() }()
	hooks, err := first.hooks()
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range hooks {
		l, err := link.AttachCgroup(link.CgroupOptions{Path: h.cgroup, Attach: h.attach, Program: h.prog})
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = l.Close() }()
	}
	dst := netip.MustParseAddrPort("192.0.2.1:80")
	c, err := pod.Dial(t.Context(), "tcp", dst.String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	if a, err := netnstest.ReadAnswer(t.Context(), c); err != nil || a.Name != "proxy" {
		t.Errorf("got %+v, %v; want the proxy", a, err)
	}
	if got := netnstest.AddrPort(c.RemoteAddr()); got != dst {
		t.Errorf("peer is %s, want %s", got, dst)
	}
}

// TestCgroupIsRoot: the cgroup that is given is taken for the root. What serves
// pods alone goes to theirs below it, and moves when that appears later; before
// and after that connections are led to the proxy.
func TestCgroupIsRoot(t *testing.T) {
	o := newOptions(t)
	o.Cgroup = netnstest.NewCgroup(t)
	pods := filepath.Join(o.Cgroup, "kubepods")
	pod, peer := newPair(t)
	client := redirecttest.StartDialer(t, pod.Namespace, filepath.Join(o.Cgroup, "app"))
	wantProxy := func() {
		t.Helper()
		if got, err := client.Ask(app(peer)); err != nil || got != "proxy" {
			t.Fatalf("%q answers, %v; want the proxy", got, err)
		}
	}
	var links map[string]link.ID
	// wantHooks reads anew where the kernel has the hooks.
	wantHooks := func(podsAt string) {
		t.Helper()
		links = map[string]link.ID{}
		for name, dir := range map[string]string{
			"sockops": o.Cgroup, "host_connect4": o.Cgroup, "host_connect6": o.Cgroup,
			"connect4": podsAt, "connect6": podsAt, "getpeername4": podsAt, "getpeername6": podsAt, "getsockopt": podsAt,
		} {
			id, err := cgroupID(dir)
			if err != nil {
				t.Fatal(err)
			}
			info, err := pinnedInfo(filepath.Join(o.PinDir, "links", name))
			if err != nil {
				t.Fatal(err)
			}
			if got := info.Cgroup().CgroupId; got != id {
				t.Errorf("%s is attached to cgroup %d, want %d (%s)", name, got, id, dir)
			}
			links[name] = info.ID
		}
	}
	takeOver := func(r *Redirector) *Redirector {
		t.Helper()
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		return open(t, o)
	}

	r := open(t, o)
	defer func() { _ = r.Close() }()
	w := workload(t, pod)
	mustAdd(t, r, w)
	wantHooks(o.Cgroup)
	wantProxy()
	before := links

	// The kubelet makes the cgroup, and a process of the pod is in there.
	old := client
	client = redirecttest.StartDialer(t, pod.Namespace, filepath.Join(pods, "pod1"))
	old.Kill()
	wantProxy()
	r = takeOver(r)
	wantHooks(pods)
	wantProxy()
	if links["connect4"] == before["connect4"] || links["sockops"] != before["sockops"] {
		t.Errorf("links before: %v, after: %v; want those of pods anew and the others as they were", before, links)
	}
	for id := range map[link.ID]bool{before["connect4"]: true, before["getsockopt"]: true} {
		if !ended(t, id) {
			t.Errorf("link %d to the root is still there", id)
		}
	}

	// Of two names one is stale, and nobody can tell which. An agent that is at
	// work sees it as well, and the next Add mends it.
	if err := os.Mkdir(pods+".slice", 0o755); err != nil {
		t.Fatal(err)
	}
	if list, err := r.List(t.Context()); err != nil || len(list) != 1 || list[0].Problem == nil {
		t.Errorf("List() = %v, %v; want one with a problem", list, err)
	}
	mustAdd(t, r, w)
	wantHooks(o.Cgroup)
	wantProxy()
}

// ended waits until the kernel has freed a link, which it does a moment after
// the last use.
func ended(t *testing.T, id link.ID) bool {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); {
		l, err := link.NewFromID(id)
		if errors.Is(err, fs.ErrNotExist) {
			return true
		}
		if err != nil {
			t.Fatal(err)
		}
		_ = l.Close()
	}
	return false
}

// TestPodsCgroup: the pods' own cgroup is preferred to the root.
func TestPodsCgroup(t *testing.T) {
	root := t.TempDir()
	if got := podsCgroup(root); got != root {
		t.Errorf("without kubepods: got %s", got)
	}
	for _, name := range []string{"kubepods", "kubepods.slice"} {
		dir := filepath.Join(root, name)
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if got := podsCgroup(root); got != dir {
			t.Errorf("with %s: got %s", name, got)
		}
		if err := os.Remove(dir); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"kubepods", "kubepods.slice"} {
		if err := os.Mkdir(filepath.Join(root, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if got := podsCgroup(root); got != root {
		t.Errorf("with both, of which one is stale: got %s", got)
	}
}
