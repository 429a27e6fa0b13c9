package bpf

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/pkg/redirect/redirecttest"
	"github.com/sluicemesh/sluice/tests/need"
	"github.com/sluicemesh/sluice/tests/netnstest"
)

// TestReadOnly: on a bpffs that is mounted read-only nothing can be pinned. New
// says where and what helps; with nothing pinned another backend may do instead.
func TestReadOnly(t *testing.T) {
	o := newOptions(t)
	pod, peer := newPair(t)
	dir := filepath.Dir(o.PinDir)
	if err := provideBPFFS(dir, false); err != nil {
		t.Fatal(err)
	}
	readOnly := func(on uintptr) {
		t.Helper()
		if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_BIND|on, ""); err != nil {
			t.Fatal(err)
		}
	}
	defer readOnly(0) // Uninstall wants to remove what there is
	wantHelp := func(err error, fallback bool) {
		t.Helper()
		if err == nil || !strings.Contains(err.Error(), "mount -o remount,rw "+dir) || errors.Is(err, redirect.ErrNotSupported) != fallback {
			t.Errorf("got %v, want an error that says what helps; another backend will do: %v", err, fallback)
		}
	}
	readOnly(unix.MS_RDONLY)
	_, err := New(o)
	wantHelp(err, true)
	readOnly(0)
	r := open(t, o)
	defer func() { _ = r.Close() }()
	w := workload(t, pod)
	mustAdd(t, r, w)

	// What is pinned works on, and is not given up.
	readOnly(unix.MS_RDONLY)
	_, err = New(o)
	wantHelp(err, false)
	wantName(t, pod.Namespace, app(peer), "proxy")
	if err := r.Add(t.Context(), workload(t, peer)); !errors.Is(err, unix.EROFS) {
		t.Errorf("Add of another pod: %v, want EROFS", err)
	}
	if list, err := r.List(t.Context()); err != nil || len(list) == 0 {
		t.Errorf("List() = %v, %v", list, err)
	}
	readOnly(0)
	mustAdd(t, r, workload(t, peer))
}

// TestMemlock: the limit of locked memory, which containers often have, means
// nothing to eBPF since Linux 5.11, and Sluice needs 5.17.
func TestMemlock(t *testing.T) {
	const env = "SLUICE_TEST_MEMLOCK"
	if os.Getenv(env) != "" {
		o := newOptions(t)
		pod := netnstest.NewNode(t).Pod(t, "pod")
		r := open(t, o)
		mustAdd(t, r, workload(t, pod))
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		return
	}
	need.EBPF(t)
	cmd := exec.CommandContext(t.Context(), need.Tool(t, "sh"), "-c", `ulimit -l 0 && exec "$0" "$@"`, os.Args[0], "-test.run", "^TestMemlock$")
	cmd.Env = append(os.Environ(), env+"=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("without any memory that may be locked: %v\n%s", err, out)
	}
}

// TestNoMemoryForSocket: a socket that may hold no more memory cannot remember where
// it was to go. Its connect is refused and counted, and does not get past the proxy.
func TestNoMemoryForSocket(t *testing.T) {
	o := newOptions(t)
	pod, peer := newPair(t)
	r := open(t, o)
	defer func() { _ = r.Close() }()
	mustAdd(t, r, workload(t, pod))

	const limit = "net/core/optmem_max"
	var before []byte
	err := pod.Do(func() (err error) {
		before, err = os.ReadFile(filepath.Join("/proc/sys", limit))
		return err
	})
	if errors.Is(err, fs.ErrNotExist) {
		t.Log("this kernel (before 6.8) has one limit for the whole machine")
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	pod.Sysctl(t, limit, "1")
	c, err := pod.Dial(t.Context(), "tcp", app(peer).String())
	if err == nil {
		_ = c.Close()
	}
	if !errors.Is(err, unix.EPERM) {
		t.Errorf("connect without memory: %v, want EPERM", err)
	}
	if n := counted(t, r, redirect.Outbound, denied, "no_memory"); n != 1 {
		t.Errorf("%d connections are counted as denied for want of memory, want 1", n)
	}
	pod.Sysctl(t, limit, string(before))
	wantName(t, pod.Namespace, app(peer), "proxy")
}

// TestNoMemoryForMaps: an agent whose cgroup has too little memory left for the maps
// does not start and names the map. It attaches nothing, falls back to nothing, and
// does not stand in the way of the next.
func TestNoMemoryForMaps(t *testing.T) {
	if c, pins := agentsCgroup(); pins != "" {
		c.Enter(t)
		c.Leave(t, 64<<20) // enough for all else, so that the kernel ends no process
		_, err := newFrom(Options{PinDir: pins}, build(t, func(s *ebpf.CollectionSpec) { s.Maps[redirectMapHandover].MaxEntries = 1 << 24 }))
		if !errors.Is(err, unix.ENOMEM) || errors.Is(err, redirect.ErrNotSupported) || !strings.Contains(err.Error(), "map "+redirectMapHandover) {
			t.Errorf("New: %v; want an error that names the map, and no fallback", err)
		}
		return
	}
	o := newOptions(t)
	pod, peer := newPair(t)
	inAgentsCgroup(t, netnstest.NewMemoryCgroup(t), o)
	for _, dir := range []string{"links", "pods"} {
		if pins, err := os.ReadDir(filepath.Join(o.PinDir, dir)); len(pins) > 0 || err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("in %s are %v, %v; want nothing", dir, pins, err)
		}
	}
	wantName(t, pod.Namespace, app(peer), "peer")
	r := open(t, o)
	defer func() { _ = r.Close() }()
	mustAdd(t, r, workload(t, pod))
	wantName(t, pod.Namespace, app(peer), "proxy")
}

// TestNoMemoryForEntries: the kernel counts entries of maps to the cgroup of the agent
// that made them. When that has no memory left a policy cannot be changed, and the one
// in force stays; connections go on.
func TestNoMemoryForEntries(t *testing.T) {
	if c, pins := agentsCgroup(); pins != "" {
		c.Enter(t)
		if err := open(t, Options{PinDir: pins}).Close(); err != nil {
			t.Error(err)
		}
		return
	}
	o := newOptions(t)
	pod, peer := newPair(t)
	c := netnstest.NewMemoryCgroup(t)
	inAgentsCgroup(t, c, o)
	r := open(t, o)
	defer func() { _ = r.Close() }()
	w := workload(t, pod)
	mustAdd(t, r, w)
	large := w
	for port := range 60000 {
		large.Policy.Outbound.ExcludePorts.List = append(large.Policy.Outbound.ExcludePorts.List, uint16(port+1))
	}
	c.Leave(t, 0)
	for range 2 {
		if err := r.Add(t.Context(), large); !errors.Is(err, unix.ENOMEM) || !strings.Contains(err.Error(), redirectMapPorts) {
			t.Errorf("Add: %v; want an error that names the map", err)
		}
		if list, err := r.List(t.Context()); err != nil || len(list) != 1 || !list[0].Whole(w) {
			t.Errorf("List() = %v, %v; want the pod as it was", list, err)
		}
		for range 100 {
			wantName(t, pod.Namespace, app(peer), "proxy")
			wantName(t, peer.Namespace, app(pod), "proxy")
		}
	}
	c.Leave(t, 1<<30)
	mustAdd(t, r, large)
	wantName(t, pod.Namespace, app(peer), "peer")
}

// What an agent in a cgroup of its own does is done by the test's program once more.
const (
	envAgentsCgroup = "SLUICE_TEST_CGROUP"
	envAgentsPins   = "SLUICE_TEST_PINS"
)

// agentsCgroup returns what inAgentsCgroup was called with if this is the process
// that it has started.
func agentsCgroup() (c netnstest.MemoryCgroup, pins string) {
	return netnstest.MemoryCgroup(os.Getenv(envAgentsCgroup)), os.Getenv(envAgentsPins)
}

// inAgentsCgroup runs the same test in another process, which is to enter c.
func inAgentsCgroup(t *testing.T, c netnstest.MemoryCgroup, o Options) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run", "^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), envAgentsCgroup+"="+string(c), envAgentsPins+"="+o.PinDir)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("in a cgroup of its own: %v\n%s", err, out)
	}
}

// TestCgroupMadeAnew removes the cgroup of pods, hooks and all, and makes it
// again, as a kubelet does that starts with another driver and back. List names
// it, the next Add mends it; processes elsewhere do not notice.
func TestCgroupMadeAnew(t *testing.T) {
	o := newOptions(t)
	o.Cgroup = netnstest.NewCgroup(t)
	pods := filepath.Join(o.Cgroup, "kubepods")
	pod, peer := newPair(t)
	if err := os.MkdirAll(filepath.Join(pods, "pod1"), 0o755); err != nil {
		t.Fatal(err)
	}
	other := redirecttest.StartDialer(t, peer.Namespace, filepath.Join(o.Cgroup, "system"))
	r := open(t, o)
	defer func() { _ = r.Close() }()
	w := workload(t, pod)
	mustAdd(t, r, w)
	for _, at := range []string{"kubepods", "kubepods.slice", "kubepods"} {
		for _, dir := range []string{filepath.Join(pods, "pod1"), pods} {
			if err := unix.Rmdir(dir); err != nil {
				t.Fatal(err)
			}
		}
		pods = filepath.Join(o.Cgroup, at)
		if err := os.MkdirAll(filepath.Join(pods, "pod1"), 0o755); err != nil {
			t.Fatal(err)
		}
		list, err := r.List(t.Context())
		if err != nil || len(list) != 1 || list[0].Problem == nil {
			t.Fatalf("%s made anew: got %v, %v; want a problem", at, list, err)
		}
		t.Logf("problem: %v", list[0].Problem)
		mustAdd(t, r, w)
		if list, err := r.List(t.Context()); err != nil || len(list) != 1 || list[0].Problem != nil {
			t.Errorf("%s made anew: after Add: %v, %v", at, list, err)
		}
		client := redirecttest.StartDialer(t, pod.Namespace, filepath.Join(pods, "pod1"))
		if got, err := client.Ask(app(peer)); err != nil || got != "proxy" {
			t.Errorf("%s made anew: %q answers, %v; want the proxy", at, got, err)
		}
		if got, err := other.Ask(app(peer)); err != nil || got != "peer" {
			t.Errorf("%s made anew: another pod reaches %q: %v", at, got, err)
		}
		client.Kill()
	}
}

// TestInterfaceChanges renames the interface of a pod, and replaces it. List
// names it, Add mends it once the interface is there, and nobody gets past the
// proxy in between.
func TestInterfaceChanges(t *testing.T) {
	o := newOptions(t)
	pod, peer := newPair(t)
	r := open(t, o)
	defer func() { _ = r.Close() }()
	w := workload(t, pod)
	mustAdd(t, r, w)
	wantProblem := func(what, text string) {
		t.Helper()
		list, err := r.List(t.Context())
		if err != nil || len(list) != 1 || list[0].Problem == nil || !strings.Contains(list[0].Problem.Error(), text) {
			t.Errorf("%s: List() = %v, %v; want a problem with %q", what, list, err, text)
		}
	}
	inPod := func(fn func(h inside, eth0 netlink.Link) error) {
		t.Helper()
		err := within(pod.Netns, func(h inside) error {
			for _, name := range []string{"eth0", "net7"} {
				if l, err := h.LinkByName(name); err == nil {
					return fn(h, l)
				}
			}
			return fs.ErrNotExist
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	rename := func(name string) {
		t.Helper()
		inPod(func(h inside, l netlink.Link) error {
			routes, err := h.RouteList(l, netlink.FAMILY_ALL)
			if err != nil {
				return err
			}
			if err := errors.Join(h.LinkSetDown(l), h.LinkSetName(l, name), h.LinkSetUp(l)); err != nil {
				return err
			}
			for i := range routes { // going down has cost it them
				if err := h.RouteReplace(&routes[i]); err != nil && !errors.Is(err, unix.EEXIST) {
					return fmt.Errorf("put back %s: %w", routes[i], err)
				}
			}
			return nil
		})
	}
	rename("net7")
	wantName(t, peer.Namespace, app(pod), "proxy")
	wantProblem("renamed", "find interface eth0")
	if err := r.Add(t.Context(), w); err == nil || !strings.Contains(err.Error(), "find interface eth0") {
		t.Errorf("Add without the interface: %v", err)
	}
	wantName(t, peer.Namespace, app(pod), "proxy")
	renamed := w
	renamed.Interfaces = []string{"net7"}
	mustAdd(t, r, renamed)
	wantName(t, peer.Namespace, app(pod), "proxy")
	rename("eth0")
	mustAdd(t, r, w)

	// A new interface with the old one's name and address. Nobody has put a filter
	// on it yet, and what arrives there does not get past the proxy all the same.
	pod.Attach(t, "pods")
	inPod(func(h inside, old netlink.Link) error {
		addrs, err := h.AddrList(old, netlink.FAMILY_V4)
		if err != nil {
			return err
		}
		fresh, err := h.LinkByName("net1")
		if err != nil {
			return err
		}
		errs := []error{ // neighbours know the hardware address
			h.LinkDel(old), h.LinkSetDown(fresh), h.LinkSetName(fresh, "eth0"),
			h.LinkSetHardwareAddr(fresh, old.Attrs().HardwareAddr), h.LinkSetUp(fresh),
		}
		for _, a := range addrs {
			errs = append(errs, h.AddrReplace(fresh, &netlink.Addr{IPNet: a.IPNet}))
		}
		return errors.Join(errs...)
	})
	wantName(t, peer.Namespace, app(pod), "proxy")
	wantProblem("replaced", "made anew")
	mustAdd(t, r, w)
	wantName(t, peer.Namespace, app(pod), "proxy")
	wantName(t, pod.Namespace, app(peer), "proxy")
	if list, err := r.List(t.Context()); err != nil || len(list) != 1 || list[0].Problem != nil {
		t.Errorf("after Add List() = %v, %v", list, err)
	}
}
