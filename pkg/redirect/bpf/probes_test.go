package bpf

import (
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/pkg/redirect/redirecttest"
	"github.com/sluicemesh/sluice/tests/netnstest"
)

// A probing is a node with one redirected pod, "app" on its port 80, and a
// cgroup that the backend takes for the root.
type probing struct {
	node *netnstest.Node
	pod  *netnstest.Pod
	r    *Redirector
	root string
	log  *lines
}

func newProbing(t *testing.T, o Options) *probing {
	t.Helper()
	p := &probing{node: netnstest.NewNode(t), root: netnstest.NewCgroup(t), log: new(lines)}
	p.pod = p.node.Pod(t, "pod")
	o.HostNetns, o.Cgroup, o.Log = p.node.Netns, p.root, slog.New(slog.NewTextHandler(p.log, nil))
	p.r = open(t, o)
	t.Cleanup(func() { _ = p.r.Close() })
	mustAdd(t, p.r, workload(t, p.pod))
	proxy(t, p.pod)
	p.pod.Serve(t, netip.AddrPortFrom(p.pod.Addr4, 80), "app")
	return p
}

// lines is a log that is read while it is written.
type lines struct {
	mu sync.Mutex
	s  strings.Builder
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.s.Write(b)
}

func (l *lines) count(text string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.s.String(), text)
}

// start starts a process of the node in the cgroup at path below the root.
func (p *probing) start(t *testing.T, path ...string) *redirecttest.Dialer {
	t.Helper()
	return startIn(t, p.node, p.root, path...)
}

func startIn(tb testing.TB, node *netnstest.Node, root string, path ...string) *redirecttest.Dialer {
	tb.Helper()
	return redirecttest.StartDialer(tb, node.Namespace, filepath.Join(append([]string{root}, path...)...))
}

// list does what an agent does every now and then: it looks, and mends. Hooks
// move when a cgroup of pods appears or goes.
func (p *probing) list(t *testing.T) {
	t.Helper()
	for mended := false; ; mended = true {
		all, err := p.r.List(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		i := slices.IndexFunc(all, func(i redirect.Installed) bool { return i.Problem != nil })
		if i < 0 {
			return
		}
		if mended || all[i].ID.NetnsInode != p.pod.Inode(t) {
			t.Fatalf("%s: %v", all[i].Pod, all[i].Problem)
		}
		mustAdd(t, p.r, workload(t, p.pod))
	}
}

func (p *probing) want(t *testing.T, d *redirecttest.Dialer, name string) {
	t.Helper()
	if got, err := d.Ask(netip.AddrPortFrom(p.pod.Addr4, 80)); err != nil || got != name {
		t.Fatalf("%q answers, %v; want %q", got, err, name)
	}
}

// left is how many connections are exempt.
func (p *probing) left(t *testing.T) int {
	t.Helper()
	n, err := count(t.Context(), p.r.store.Probes)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func (p *probing) waitNoneLeft(t *testing.T) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(20 * time.Second); ; <-tick.C {
		n := p.left(t)
		if n == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d connections are still exempt", n)
		}
	}
}

// silence makes a pod drop all that comes from the node.
func silence(t *testing.T, pod *netnstest.Pod, node netip.Addr) {
	t.Helper()
	err := pod.Do(func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer h.Close()
		dst := &net.IPNet{IP: node.AsSlice(), Mask: net.CIDRMask(node.BitLen(), node.BitLen())}
		return h.RouteAdd(&netlink.Route{Dst: dst, Type: unix.RTN_BLACKHOLE})
	})
	if err != nil {
		t.Fatalf("silence pod: %v", err)
	}
}

// TestFailedProbesLeaveNothing: whatever becomes of a connection, it is not
// exempt for longer than it exists.
func TestFailedProbesLeaveNothing(t *testing.T) {
	p := newProbing(t, newOptions(t))
	p.start(t, "kubepods")
	p.list(t)
	silent := p.node.Pod(t, "silent")
	mustAdd(t, p.r, workload(t, silent))
	silence(t, silent, p.node.Addr4())
	kubelet := p.start(t, "system")
	for _, tc := range []struct {
		name string
		to   netip.AddrPort
		n    int
	}{
		{"refused/v4", netip.AddrPortFrom(p.pod.Addr4, 9), 5000},
		{"refused/v6", netip.AddrPortFrom(p.pod.Addr6, 9), 4000},
		{"given up", netip.AddrPortFrom(silent.Addr4, 80), 1000},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if err := kubelet.Abandon(tc.to, tc.n); err != nil {
				t.Fatal(err)
			}
			p.waitNoneLeft(t)
		})
	}
	t.Run("killed", func(t *testing.T) {
		if err := kubelet.Begin(netip.AddrPortFrom(silent.Addr4, 80), 500); err != nil {
			t.Fatal(err)
		}
		if n := p.left(t); n != 500 {
			t.Errorf("%d connections are exempt, want 500", n)
		}
		kubelet.Kill()
		p.waitNoneLeft(t)
	})
}

// TestProbesFull: where there is no room, a connection is captured.
func TestProbesFull(t *testing.T) {
	o := newOptions(t)
	o.Sizes.Probes = 4
	p := newProbing(t, o)
	p.start(t, "kubepods")
	p.list(t)
	kubelet := p.start(t, "system")
	p.want(t, kubelet, "app")
	silent := p.node.Pod(t, "silent")
	mustAdd(t, p.r, workload(t, silent))
	silence(t, silent, p.node.Addr4())
	others := p.start(t, "others")
	if err := others.Begin(netip.AddrPortFrom(silent.Addr4, 80), 100); err != nil {
		t.Fatal(err)
	}
	p.want(t, kubelet, "proxy")
	counters, err := p.r.Counters(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	counted := false
	for _, c := range counters {
		counted = counted || c.Pod == "bpf/pod" && c.Direction == redirect.Inbound && c.Reason == "probes_full" && c.Value == 1
	}
	if !counted {
		t.Errorf("it was not counted: %+v", counters)
	}
	others.Kill()
	p.waitNoneLeft(t)
	p.want(t, kubelet, "app")
}

// TestPodCgroups: who is exempt while cgroups of pods come and go.
func TestPodCgroups(t *testing.T) {
	const captured = "probes of the kubelet are captured"
	p := newProbing(t, newOptions(t))
	kubelet := p.start(t, "system", "kubelet.service")
	// Nobody knows yet which cgroups are pods'.
	p.want(t, kubelet, "proxy")
	if p.log.count(captured) != 1 {
		t.Errorf("log: %s", p.log.s.String())
	}
	// On a node with cgroup v1 it may be there, without processes.
	if err := os.Mkdir(filepath.Join(p.root, "kubepods.slice"), 0o755); err != nil {
		t.Fatal(err)
	}
	p.list(t)
	p.want(t, kubelet, "proxy")
	if p.log.count(captured) != 2 || p.log.count("no process is in cgroup") != 1 {
		t.Errorf("log: %s", p.log.s.String())
	}
	first := p.start(t, "kubepods.slice", "kubepods-besteffort.slice", "kubepods-besteffort-pod1.slice", "cri-1.scope")
	p.want(t, kubelet, "proxy")
	// Each Add looks again while none is known.
	mustAdd(t, p.r, workload(t, p.pod))
	p.want(t, kubelet, "app")
	p.want(t, first, "proxy")
	// A second kubelet, with a root of its own, as nodes in containers have.
	nested := p.start(t, "docker", "1", "kubelet.slice", "kubelet-kubepods.slice", "pod2")
	p.list(t)
	p.want(t, kubelet, "app")
	p.want(t, first, "proxy")
	p.want(t, nested, "proxy")
	// Deeper than anybody looks.
	deep := []string{"deep"}
	for i := range 20 {
		deep = append(deep, fmt.Sprint(i))
	}
	p.want(t, p.start(t, deep...), "proxy")
	// Another process takes over, and finds what there is.
	if got := p.log.count(captured); got != 2 {
		t.Errorf("%d lines for two states: %s", got, p.log.s.String())
	}
	// The first one is made anew, with another id, under the same name.
	first.Kill()
	removeBelow(t, filepath.Join(p.root, "kubepods.slice"))
	again := p.start(t, "kubepods.slice", "pod3")
	mustAdd(t, p.r, workload(t, p.pod))
	p.want(t, again, "proxy")
	p.want(t, kubelet, "app")
	// All are gone.
	again.Kill()
	nested.Kill()
	removeBelow(t, filepath.Join(p.root, "kubepods.slice"))
	removeBelow(t, filepath.Join(p.root, "docker"))
	p.list(t)
	p.want(t, kubelet, "proxy")
}

// removeBelow removes a cgroup whose processes have ended.
func removeBelow(t *testing.T, dir string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.IsDir() {
			removeBelow(t, filepath.Join(dir, e.Name()))
		}
	}
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(10 * time.Second); ; <-tick.C {
		err := unix.Rmdir(dir)
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("remove cgroup %s: %v", dir, err)
		}
	}
}
