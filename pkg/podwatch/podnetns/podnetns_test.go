package podnetns

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/tests/need"
	"github.com/sluicemesh/sluice/tests/netnstest"
)

func TestMain(m *testing.M) { os.Exit(netnstest.VerifyNoLeaks(m)) }

const (
	uidA = "0a1b2c3d-0000-4000-8000-00000000000a"
	uidB = "0a1b2c3d-0000-4000-8000-00000000000b"
	// uidStatic is what the kubelet calls a static pod.
	uidStatic = "d4e5f60718293a4b5c6d7e8f90a1b2c3"
)

// id is a container's.
func id(n int) string { return fmt.Sprintf("%064x", n) }

func underscored(uid string) string { return strings.ReplaceAll(uid, "-", "_") }

func TestPlaceOf(t *testing.T) {
	systemd := "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + underscored(uidA) + ".slice"
	for name, c := range map[string]struct {
		content string
		want    place
		none    bool
	}{
		"v2, systemd, containerd": {content: "0::" + systemd + "/cri-containerd-" + id(1) + ".scope\n", want: place{uidA, id(1)}},
		"v2, systemd, CRI-O":      {content: "0::" + systemd + "/crio-" + id(1) + ".scope/container\n", want: place{uidA, id(1)}},
		"v2, systemd, conmon":     {content: "0::" + systemd + "/crio-conmon-" + id(1) + ".scope\n", want: place{uidA, id(1)}},
		"v2, systemd, docker":     {content: "0::" + systemd + "/docker-" + id(1) + ".scope\n", want: place{uidA, id(1)}},
		"guaranteed":              {content: "0::/kubepods.slice/kubepods-pod" + underscored(uidA) + ".slice/cri-containerd-" + id(1) + ".scope\n", want: place{uidA, id(1)}},
		"v2, cgroupfs":            {content: "0::/kubepods/besteffort/pod" + uidA + "/" + id(1) + "\n", want: place{uidA, id(1)}},
		"v2, cgroupfs, CRI-O":     {content: "0::/kubepods/besteffort/pod" + uidA + "/crio-" + id(1) + "\n", want: place{uidA, id(1)}},
		"v1": {content: "12:pids:/kubepods/burstable/pod" + uidA + "/" + id(1) + "\n11:cpu,cpuacct:/kubepods/burstable/pod" + uidA + "/" + id(1) +
			"\n1:name=systemd:/kubepods/burstable/pod" + uidA + "/" + id(1) + "\n0::/system.slice/containerd.service\n", want: place{uidA, id(1)}},
		"v1, only one controller":       {content: "12:rdma:/\n11:memory:" + systemd + "/cri-containerd-" + id(1) + ".scope\n0::/\n", want: place{uidA, id(1)}},
		"v1, a path with colons":        {content: "1:name=systemd:" + systemd + "/cri-containerd-" + id(1) + ".scope/a:b\n", want: place{uidA, id(1)}},
		"old containerd, systemd":       {content: "1:memory:/system.slice/containerd.service/kubepods-burstable-pod" + underscored(uidA) + ".slice:cri-containerd:" + id(1) + "\n", none: true},
		"static pod":                    {content: "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + uidStatic + ".slice/cri-containerd-" + id(1) + ".scope", want: place{uidStatic, id(1)}},
		"kind":                          {content: "0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod" + underscored(uidA) + ".slice/cri-containerd-" + id(1) + ".scope\n", want: place{uidA, id(1)}},
		"node in a container":           {content: "0::/docker/" + id(9) + "/kubepods/burstable/pod" + uidA + "/" + id(1) + "\n", want: place{uidA, id(1)}},
		"own cgroup below the one":      {content: "0::" + systemd + "/cri-containerd-" + id(1) + ".scope/app/worker\n", want: place{uidA, id(1)}},
		"another pod's name below":      {content: "0::" + systemd + "/cri-containerd-" + id(1) + ".scope/kubepods/pod" + uidB + "/" + id(2) + "\n", want: place{uidA, id(1)}},
		"reader's namespace is a pod's": {content: "0::/../../kubepods-besteffort-pod" + underscored(uidA) + ".slice/cri-containerd-" + id(1) + ".scope\n", want: place{uidA, id(1)}},
		"reader's namespace, cgroupfs":  {content: "0::/../../../besteffort/pod" + uidA + "/" + id(1) + "\n", want: place{uidA, id(1)}},
		"reader's namespace, v1":        {content: "3:cpu:/../../pod" + uidA + "/" + id(1) + "\n", want: place{uidA, id(1)}},
		"the pod's cgroup itself":       {content: "0::" + systemd + "\n", want: place{uidA, ""}},
		"a container with a short name": {content: "0::" + systemd + "/init\n", want: place{uidA, ""}},
		"no pod":                        {content: "0::/system.slice/podman.service\n", none: true},
		"podman":                        {content: "0::/machine.slice/libpod-" + id(1) + ".scope\n", none: true},
		"no UID":                        {content: "0::/kubepods/pod1234/" + id(1) + "\n", none: true},
		"capitals":                      {content: "0::/kubepods/pod" + strings.ToUpper(uidA) + "/" + id(1) + "\n", none: true},
		"empty":                         {none: true},
		"garbage":                       {content: "pod\n::\npod:pod:pod", none: true},
	} {
		got, ok := placeOf([]byte(c.content))
		if got != c.want || ok == c.none {
			t.Errorf("%s: %+v %t, want %+v", name, got, ok, c.want)
		}
	}
}

func TestStartTime(t *testing.T) {
	for _, name := range []string{"sh", "a b", "a) R 1 (b", "(((", ")))", ""} {
		got, err := startTime([]byte(stat(7, name, 4711)))
		if got != 4711 || err != nil {
			t.Errorf("%q: %d, %v", name, got, err)
		}
	}
	for _, bad := range []string{"", "1 (sh) S 1", "1 (sh) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 x 20"} {
		if got, err := startTime([]byte(bad)); err == nil {
			t.Errorf("%q: %d", bad, got)
		}
	}
}

// stat is the content of a /proc/PID/stat.
func stat(pid int, name string, start uint64) string {
	return fmt.Sprintf("%d (%s) S 1 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 %d 1000 100 18446744073709551615\n", pid, name, start)
}

// A tree is a directory that looks like /proc. Namespaces are files in it.
type tree struct {
	tb    testing.TB
	dir   string
	addrs map[string][]Interface
	in    string // the namespace that a function runs in
}

func newTree(tb testing.TB) *tree {
	tb.Helper()
	t := &tree{tb: tb, dir: tb.TempDir(), addrs: map[string][]Interface{}}
	for _, dir := range []string{"proc", "ns", "run"} {
		if err := os.Mkdir(filepath.Join(t.dir, dir), 0o755); err != nil {
			tb.Fatal(err)
		}
	}
	t.netns("host", "192.0.2.1")
	t.process(1, "init", 1, "0::/init.scope\n", "host")
	return t
}

func (t *tree) write(path, content string) {
	t.tb.Helper()
	if err := os.WriteFile(filepath.Join(t.dir, path), []byte(content), 0o600); err != nil {
		t.tb.Fatal(err)
	}
}

// netns makes a namespace with eth0 that has the addresses.
func (t *tree) netns(name string, addrs ...string) {
	t.tb.Helper()
	t.write("ns/"+name, "")
	i := Interface{Name: "eth0"}
	for _, a := range addrs {
		i.Addrs = append(i.Addrs, netip.MustParseAddr(a))
	}
	t.addrs[name] = []Interface{i}
}

func (t *tree) process(pid int, name string, start uint64, cgroup, netns string) {
	t.tb.Helper()
	dir := filepath.Join("proc", strconv.Itoa(pid))
	if err := os.MkdirAll(filepath.Join(t.dir, dir, "ns"), 0o755); err != nil {
		t.tb.Fatal(err)
	}
	t.write(dir+"/cgroup", cgroup)
	t.write(dir+"/stat", stat(pid, name, start))
	if err := os.Symlink(filepath.Join(t.dir, "ns", netns), filepath.Join(t.dir, dir, "ns/net")); err != nil {
		t.tb.Fatal(err)
	}
}

func (t *tree) mount(name, netns string) {
	t.tb.Helper()
	if err := os.Link(filepath.Join(t.dir, "ns", netns), filepath.Join(t.dir, "run", name)); err != nil {
		t.tb.Fatal(err)
	}
}

func (t *tree) options() Options {
	return Options{
		Proc: filepath.Join(t.dir, "proc"), NetnsDirs: []string{filepath.Join(t.dir, "absent"), filepath.Join(t.dir, "run")},
		InNetns: func(path string, f func() error) error {
			file, err := os.Readlink(path)
			if err != nil {
				return err
			}
			t.in = filepath.Base(file)
			return f()
		},
	}
}

func (t *tree) interfaces() ([]Interface, error) { return t.addrs[t.in], nil }

func (t *tree) inode(netns string) uint64 {
	t.tb.Helper()
	ns, err := statNetns(unix.AT_FDCWD, filepath.Join(t.dir, "ns", netns))
	if err != nil {
		t.tb.Fatal(err)
	}
	return ns.ino
}

func (t *tree) findAll(pods ...Pod) map[string]Result {
	t.tb.Helper()
	before := descriptors(t.tb)
	got, err := findAll(t.options(), pods, t.interfaces)
	if err != nil {
		t.tb.Fatal(err)
	}
	if after := descriptors(t.tb); after != before {
		t.tb.Errorf("%d descriptors are open, were %d", after, before)
	}
	return got
}

func descriptors(tb testing.TB) int {
	tb.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		tb.Fatal(err)
	}
	return len(list)
}

func addrs(list ...string) []netip.Addr {
	var as []netip.Addr
	for _, a := range list {
		as = append(as, netip.MustParseAddr(a))
	}
	return as
}

func pod(uid string, container int) string {
	return "0::/kubepods/burstable/pod" + uid + "/" + id(container) + "\n"
}

func eth0(list ...string) []Interface { return []Interface{{"eth0", addrs(list...)}} }

func TestFindAll(t *testing.T) {
	tr := newTree(t)
	tr.netns("a", "10.0.0.1", "fd00::1", "fe80::1")
	tr.netns("b", "10.0.0.2")
	tr.netns("docker in b", "10.0.0.9")
	tr.netns("static", "10.0.0.3")
	tr.process(30, "app", 300, pod(uidA, 2), "a")
	tr.process(20, "pause", 200, pod(uidA, 1), "a")
	tr.process(10, "late) R 1 (", 900, pod(uidA, 3), "a") // a low number, used again
	tr.process(40, "dockerd", 100, pod(uidB, 5), "docker in b")
	tr.process(41, "on the host", 50, pod(uidB, 7), "host")
	tr.process(42, "pause", 400, pod(uidB, 4), "b")
	tr.process(50, "pause", 400, pod(uidStatic, 6), "static")
	tr.process(60, "sshd", 1, "0::/system.slice/sshd.service\n", "a")
	tr.write("proc/version", "no process")
	if err := os.Mkdir(filepath.Join(tr.dir, "proc/99"), 0o755); err != nil { // has ended
		t.Fatal(err)
	}
	tr.mount("cni-b", "b")
	tr.write("run/left-over", "")

	got := tr.findAll(
		Pod{UID: uidA, Addrs: addrs("fd00::1", "10.0.0.1")}, Pod{UID: uidB, Addrs: addrs("::ffff:10.0.0.2")},
		Pod{UID: uidStatic, Addrs: addrs("10.0.0.3")},
	)
	want := map[string]Result{
		uidA: {Found: Found{
			Path: filepath.Join(tr.dir, "proc/20/ns/net"), Inode: tr.inode("a"), SandboxID: id(1),
			Interfaces: eth0("fd00::1", "10.0.0.1"), PID: 20,
		}},
		uidB: {Found: Found{
			Path: filepath.Join(tr.dir, "run/cni-b"), Inode: tr.inode("b"), SandboxID: id(4),
			Interfaces: eth0("10.0.0.2"), PID: 42,
		}},
		uidStatic: {Found: Found{
			Path: filepath.Join(tr.dir, "proc/50/ns/net"), Inode: tr.inode("static"), SandboxID: id(6),
			Interfaces: eth0("10.0.0.3"), PID: 50,
		}},
	}
	if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Errorf("FindAll (-want +got):\n%s", diff)
	}
}

func TestSeveralInterfaces(t *testing.T) {
	tr := newTree(t)
	tr.netns("a")
	tr.addrs["a"] = []Interface{{"eth0", addrs("10.0.0.1", "10.0.0.7")}, {"net1", addrs("fd00::1")}, {"net2", addrs("10.1.0.1")}}
	tr.process(20, "pause", 200, pod(uidA, 1), "a")
	got := tr.findAll(Pod{UID: uidA, Addrs: addrs("10.0.0.1", "fd00::1")})[uidA]
	want := []Interface{{"eth0", addrs("10.0.0.1")}, {"net1", addrs("fd00::1")}}
	if diff := cmp.Diff(want, got.Interfaces, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" || got.Err != nil {
		t.Errorf("interfaces (-want +got), %v:\n%s", got.Err, diff)
	}
}

func TestNotFound(t *testing.T) {
	for name, c := range map[string]struct {
		make func(*tree)
		want error
		text string
	}{
		"no process": {func(*tree) {}, ErrNotFound, ""},
		"another pod's": {func(tr *tree) {
			tr.netns("b", "10.0.0.1")
			tr.process(20, "pause", 2, pod(uidB, 1), "b")
		}, ErrNotFound, ""},
		"host network": {func(tr *tree) { tr.process(20, "pause", 2, pod(uidA, 1), "host") }, ErrHostNetwork, ""},
		"another address": {func(tr *tree) {
			tr.netns("a", "10.0.0.2")
			tr.process(20, "pause", 2, pod(uidA, 1), "a")
		}, ErrNotItsAddrs, "process 20: 10.0.0.1"},
		"no address any more": {func(tr *tree) {
			tr.netns("a")
			tr.process(20, "pause", 2, pod(uidA, 1), "a")
		}, ErrNotItsAddrs, ""},
		"a zombie": {func(tr *tree) {
			tr.process(20, "pause", 2, pod(uidA, 1), "gone")
		}, ErrNotFound, ""},
		"a broken stat": {func(tr *tree) {
			tr.netns("a", "10.0.0.1")
			tr.process(20, "pause", 2, pod(uidA, 1), "a")
			tr.write("proc/20/stat", "20 (pause) S")
		}, nil, "process 20: read /proc/PID/stat"},
	} {
		t.Run(name, func(t *testing.T) {
			tr := newTree(t)
			c.make(tr)
			got := tr.findAll(Pod{UID: uidA, Addrs: addrs("10.0.0.1")})[uidA]
			if c.want != nil && !errors.Is(got.Err, c.want) {
				t.Errorf("error is %v, want %v", got.Err, c.want)
			}
			if got.Err == nil || !strings.Contains(got.Err.Error(), c.text) || !strings.Contains(got.Err.Error(), uidA) {
				t.Errorf("error is %v, want %q and the pod in it", got.Err, c.text)
			}
			if got.Path != "" {
				t.Errorf("found %+v", got.Found)
			}
		})
	}
	t.Run("no addresses known", func(t *testing.T) {
		tr := newTree(t)
		tr.netns("a", "10.0.0.1")
		tr.process(20, "pause", 2, pod(uidA, 1), "a")
		if got := tr.findAll(Pod{UID: uidA})[uidA]; !errors.Is(got.Err, ErrNotItsAddrs) {
			t.Errorf("got %+v", got)
		}
	})
	t.Run("no proc", func(t *testing.T) {
		if _, err := FindAll(Options{Proc: t.TempDir(), InNetns: func(string, func() error) error { return nil }}, nil); err == nil {
			t.Error("an empty directory passes for /proc")
		}
		if _, err := Find(Options{}, Pod{}); err == nil {
			t.Error("InNetns is not asked for")
		}
	})
}

// TestNumberUsedAgain: between two looks a process ends and its number becomes
// another one's.
func TestNumberUsedAgain(t *testing.T) {
	tr := newTree(t)
	tr.netns("a", "10.0.0.1")
	tr.netns("b", "10.0.0.1") // even with the same address
	tr.process(20, "pause", 200, pod(uidA, 1), "a")
	proc := &procfs{path: filepath.Join(tr.dir, "proc")}
	was, ok, err := proc.process(20)
	if !ok || err != nil {
		t.Fatal(ok, err)
	}
	if err := os.RemoveAll(filepath.Join(tr.dir, "proc/20")); err != nil {
		t.Fatal(err)
	}
	if _, ok, err := proc.openNetns(was); ok || err != nil {
		t.Errorf("a process that has ended: %t, %v", ok, err)
	}
	tr.process(20, "other", 900, pod(uidB, 2), "a")
	if _, ok, err := proc.openNetns(was); ok || err != nil {
		t.Errorf("another process: %t, %v", ok, err)
	}
	if err := os.RemoveAll(filepath.Join(tr.dir, "proc/20")); err != nil {
		t.Fatal(err)
	}
	before := descriptors(t)
	tr.process(20, "pause", 200, pod(uidA, 1), "b")
	if _, ok, err := proc.openNetns(was); ok || err != nil {
		t.Errorf("another namespace: %t, %v", ok, err)
	}
	if after := descriptors(t); after != before {
		t.Errorf("%d descriptors are open, were %d", after, before)
	}
}

// ownNetns stands for the node's: a test may not read that of process 1, and
// the main thread may have gone into a namespace that a test made.
const ownNetns = "/proc/thread-self/ns/net"

// in runs functions in namespaces for the tests.
func in(path string, f func() error) error { return netnstest.Namespace{Netns: path}.Do(f) }

// TestRealProcesses finds a pod of real processes, cgroups and namespaces.
func TestRealProcesses(t *testing.T) {
	need.Root(t)
	node := netnstest.NewNode(t)
	p := node.Pod(t, "a")
	base := netnstest.NewCgroup(t)
	slice := filepath.Join(base, "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod"+underscored(uidA)+".slice")
	start := func(ns netnstest.Namespace, container int, below string) *netnstest.Cmd {
		t.Helper()
		dir := filepath.Join(slice, "cri-containerd-"+id(container)+".scope", below)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		c := ns.Command(t, 65535, "sleep", "600") // as the pause container's user
		c.In(dir)
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		return c
	}
	pod := Pod{UID: uidA, Addrs: []netip.Addr{p.Addr4, p.Addr6}}
	o := Options{InNetns: in, HostNetns: ownNetns}
	find := func() Found {
		t.Helper()
		found, err := Find(o, pod)
		if err != nil {
			t.Fatal(err)
		}
		if found.Inode != p.Inode(t) {
			t.Errorf("inode is %d, want %d", found.Inode, p.Inode(t))
		}
		if ns, err := statNetns(unix.AT_FDCWD, found.Path); err != nil || ns.ino != found.Inode {
			t.Errorf("%s leads to %+v, %v", found.Path, ns, err)
		}
		want := []Interface{{"eth0", pod.Addrs}}
		if diff := cmp.Diff(want, found.Interfaces, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
			t.Errorf("interfaces (-want +got):\n%s", diff)
		}
		return found
	}
	if _, err := Find(o, pod); !errors.Is(err, ErrNotFound) {
		t.Fatalf("before its first process: %v", err)
	}
	pause := start(p.Namespace, 1, "")
	app := start(p.Namespace, 2, "nested/deep")
	if got := find(); got.PID != pause.Process.Pid || got.SandboxID != id(1) || got.Path != p.Netns {
		t.Errorf("found %+v, want process %d and %s", got, pause.Process.Pid, p.Netns)
	}
	// Others do not show their namespaces to everybody.
	err := withoutPtrace(func() error {
		_, err := Find(o, pod)
		return err
	})
	if err == nil || !errors.Is(err, os.ErrPermission) || !strings.Contains(err.Error(), "needs CAP_SYS_PTRACE") {
		t.Errorf("without CAP_SYS_PTRACE: %v", err)
	}
	// Without a mount the path goes through the process.
	o.NetnsDirs = []string{}
	if got, want := find().Path, fmt.Sprintf("/proc/%d/ns/net", pause.Process.Pid); got != want {
		t.Errorf("path is %s, want %s", got, want)
	}
	// What ends is no more found, what is in a namespace of its own is not taken.
	pause.Kill()
	start(node.Namespace, 3, "")
	if got := find(); got.PID != app.Process.Pid || got.SandboxID != id(2) {
		t.Errorf("found %+v, want process %d", got, app.Process.Pid)
	}
	app.Kill()
	if _, err := Find(o, pod); !errors.Is(err, ErrNotItsAddrs) {
		t.Errorf("with a process in another namespace: %v", err)
	}
}

func TestRealHostNetwork(t *testing.T) {
	need.Root(t)
	dir := filepath.Join(netnstest.NewCgroup(t), "kubepods/pod"+uidA, id(1))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	c := netnstest.Namespace{Name: "host", Netns: ownNetns}.Command(t, 0, "sleep", "600")
	c.In(dir)
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := Find(Options{InNetns: in, HostNetns: ownNetns}, Pod{UID: uidA, Addrs: addrs("10.0.0.1")}); !errors.Is(err, ErrHostNetwork) {
		t.Errorf("error is %v", err)
	}
}

// withoutPtrace runs f on a thread that lacks CAP_SYS_PTRACE.
func withoutPtrace(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var data [2]unix.CapUserData
		if err := unix.Capget(&head, &data[0]); err != nil {
			done <- fmt.Errorf("read capabilities: %w", err)
			return
		}
		data[0].Effective &^= 1 << unix.CAP_SYS_PTRACE
		if err := unix.Capset(&head, &data[0]); err != nil {
			done <- fmt.Errorf("drop CAP_SYS_PTRACE: %w", err)
			return
		}
		done <- f()
	}()
	return <-done
}

func FuzzPlaceOf(f *testing.F) {
	f.Add([]byte(pod(uidA, 1)))
	f.Add([]byte("0::/kubepods.slice/kubepods-pod" + underscored(uidA) + ".slice/cri-containerd-" + id(1) + ".scope\n"))
	f.Fuzz(func(t *testing.T, content []byte) {
		if got, ok := placeOf(content); ok != (got.pod != "") || ok && !isUID(got.pod) {
			t.Errorf("%q: %+v %t", content, got, ok)
		}
	})
}

// BenchmarkFindAll looks for 100 pods of 4 processes each among 2,000 processes.
func BenchmarkFindAll(b *testing.B) {
	tr := newTree(b)
	var pods []Pod
	for i := range 100 {
		uid, ns := fmt.Sprintf("0a1b2c3d-0000-4000-8000-%012x", i), fmt.Sprintf("pod%d", i)
		tr.netns(ns, fmt.Sprintf("10.0.1.%d", i))
		for k := range 4 {
			tr.process(100+4*i+k, "app", uint64(k), pod(uid, i), ns)
		}
		pods = append(pods, Pod{UID: uid, Addrs: addrs(fmt.Sprintf("10.0.1.%d", i))})
	}
	for pid := 1000; pid < 2599; pid++ {
		tr.process(pid, "other", 1, "0::/system.slice/other.service\n", "host")
	}
	o := tr.options()
	b.ReportAllocs()
	for b.Loop() {
		got, err := findAll(o, pods, tr.interfaces)
		if err != nil || len(got) != 100 || got[pods[99].UID].Err != nil {
			b.Fatal(len(got), err)
		}
	}
}
