package redirectbench

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/pkg/redirect/bpf"
	"github.com/sluicemesh/sluice/pkg/redirect/iptables"
	"github.com/sluicemesh/sluice/tests/need"
	"github.com/sluicemesh/sluice/tests/netnstest"
	"github.com/sluicemesh/sluice/tests/redirectbench/load"
)

// A mode is one way from the client to the server.
type mode struct {
	name string
	way  way
	// backend redirects both pods; empty: nothing is redirected.
	backend redirect.Backend
	// policy changes the default policy of both; may be nil.
	policy func(*redirect.Policy)
	// places are those in which connections are to be accelerated, and no others.
	places []redirect.Place
	// asked modes are measured only when they are asked for by name.
	asked bool
}

// Names of modes that others are compared with.
const (
	modeExplicit = "explicit"
	modeSame     = "explicit-same"
	modeIPTables = "iptables"
	modeEBPF     = "eBPF"
)

// modes are measured in turns. One that a build may have or not is one line here.
var modes = []mode{
	{name: "direct", way: direct},
	{name: modeExplicit, way: explicit},
	{name: modeSame, way: same},
	{name: modeIPTables, way: captured, backend: redirect.BackendIPTables},
	{name: modeEBPF, way: captured, backend: redirect.BackendEBPF},
	{name: "eBPF + peer", way: captured, backend: redirect.BackendEBPF, places: []redirect.Place{redirect.PlacePeer}},
	{name: "eBPF + loopback", way: captured, backend: redirect.BackendEBPF, places: []redirect.Place{redirect.PlaceLoopback}},
	{name: "eBPF + both", way: captured, backend: redirect.BackendEBPF, places: []redirect.Place{redirect.PlacePeer, redirect.PlaceLoopback}},
	// What the hooks cost connections that they let pass.
	{name: "excluded", way: same, backend: redirect.BackendEBPF, policy: excludeSame, asked: true},
}

func excludeSame(p *redirect.Policy) {
	for i := range uint16(load.Services) {
		p.Inbound.ExcludePorts.List = append(p.Inbound.ExcludePorts.List, sameIn+i)
	}
}

// chosen are the modes that this run is to measure; without those in which
// nothing is redirected, but for the one that the others are held to, and without
// those that this node cannot have.
func (n *node) chosen(redirected bool) []mode {
	return slices.DeleteFunc(slices.Clone(modes), func(m mode) bool {
		return redirected && m.backend == "" && m.way != same || !asked(m) || n.missing(m) != ""
	})
}

func asked(m mode) bool {
	if *only == "" {
		return !m.asked
	}
	return slices.Contains(strings.Split(*only, ","), m.name)
}

// missing says why a mode cannot be had here; "" if it can. The eBPF backend is
// accelerated in all places that this kernel does right, or in none.
func (n *node) missing(m mode) string {
	if len(m.places) == 0 {
		return ""
	}
	why := ""
	for _, a := range n.accelerations {
		switch wanted := slices.Contains(m.places, a.Place); {
		case wanted && !a.Right:
			return fmt.Sprintf("%s: %s", a.Place, a.Reason)
		case a.Right && !wanted:
			why = fmt.Sprintf("%s cannot be left out", a.Place)
		}
	}
	return why
}

// A node is where the modes take turns: the pair that is measured, and other pods
// that are redirected as well.
type node struct {
	*pair
	others []*netnstest.Pod
	ebpf   bpf.Options
	iptab  iptables.Options
	// accelerations is what this kernel can do; events what became of the
	// connections of each accelerated mode.
	accelerations []redirect.Acceleration
	events        map[string]map[string]uint64
}

func newNode(t *testing.T) *node {
	t.Helper()
	cgroup := netnstest.EnterCgroup(t)
	n := &node{pair: newPair(t)}
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "bpf"), 0o755); err != nil {
		t.Fatal(err)
	}
	n.ebpf = bpf.Options{PinDir: filepath.Join(dir, "bpf", "sluice"), Cgroup: cgroup, HostNetns: n.host.Netns}
	n.ebpf.AccelerateCache = filepath.Join(dir, "accelerate.json")
	n.iptab = iptables.Options{StateDir: filepath.Join(dir, "iptables"), Cgroup: cgroup, HostNetns: n.host.Netns}
	n.events = map[string]map[string]uint64{}
	n.tryAcceleration(t)
	return n
}

// tryAcceleration finds out what can be accelerated, and names what is not.
func (n *node) tryAcceleration(t *testing.T) {
	t.Helper()
	o := n.ebpf
	o.Accelerate = redirect.AccelerateAuto
	r, err := bpf.New(o)
	if err != nil {
		t.Fatalf("try acceleration: %v", err)
	}
	n.accelerations = r.Accelerations()
	if err := errors.Join(r.Close(), bpf.Uninstall(t.Context(), o)); err != nil {
		t.Fatalf("remove backend: %v", err)
	}
	for _, m := range modes {
		if why := n.missing(m); asked(m) && why != "" {
			fmt.Printf("%s is not measured: %s\n", m.name, why)
		}
	}
}

// fill makes the node have so many pods, the pair among them.
func (n *node) fill(t *testing.T, pods int) {
	t.Helper()
	for len(n.others) < pods-2 {
		n.others = append(n.others, n.host.Pod(t, "other"))
	}
}

// in runs f with the mode's redirection in place, and nothing else's. Traffic has
// to take the mode's way.
func (n *node) in(t *testing.T, m mode, f func()) {
	t.Helper()
	joined := func() map[string]uint64 { return nil }
	if m.backend != "" {
		r, remove := n.backend(t, m)
		defer remove()
		joined = func() map[string]uint64 { return events(t, r) }
		for _, pod := range append([]*netnstest.Pod{n.client, n.server}, n.others...) {
			w := workload(t, pod)
			if m.policy != nil {
				m.policy(&w.Policy)
			}
			if err := r.Add(t.Context(), w); err != nil {
				t.Fatalf("%s: add %s: %v", m.name, pod.Name, err)
			}
		}
	}
	before, tracked := n.passed(t), n.tracked(t)
	f()
	n.disconnect(t)
	n.checkJoined(t, m, joined(), n.checkWay(t, m, before, n.passed(t)))
	// Rules that an earlier mode has left would have the kernel track connections;
	// those that it tracked then are forgotten in time.
	after := n.tracked(t)
	if m.backend == redirect.BackendIPTables && after == 0 || m.backend != redirect.BackendIPTables && after > tracked {
		t.Errorf("%s: %d connections are tracked, %d were before", m.name, after, tracked)
	}
}

// backend opens a backend; remove takes everything of it away.
func (n *node) backend(t *testing.T, m mode) (r redirect.Redirector, remove func()) {
	t.Helper()
	uninstall := func(ctx context.Context) error { return bpf.Uninstall(ctx, n.ebpf) }
	var err error
	if m.backend == redirect.BackendEBPF {
		o := n.ebpf
		if len(m.places) > 0 {
			o.Accelerate = redirect.AccelerateOn
		}
		r, err = bpf.New(o)
	} else {
		r, err = iptables.New(n.iptab)
		uninstall = func(ctx context.Context) error {
			return errors.Join(iptables.Uninstall(ctx, n.iptab), n.untrack())
		}
	}
	if err != nil {
		t.Fatalf("%s: open backend: %v", m.name, err)
	}
	return r, func() {
		t.Helper()
		if err := errors.Join(r.Close(), uninstall(context.WithoutCancel(t.Context()))); err != nil {
			t.Errorf("%s: remove backend: %v", m.name, err)
		}
	}
}

// events reads what a backend has counted of acceleration.
func events(t *testing.T, r redirect.Redirector) map[string]uint64 {
	t.Helper()
	a, ok := r.(redirect.Accelerator)
	if !ok {
		return nil
	}
	counted, err := a.AccelerationEvents()
	if err != nil {
		t.Fatalf("read events: %v", err)
	}
	return counted
}

// checkJoined wants pairs to have been joined in an accelerated mode alone: of
// peers all connections between the two Envoys, but for one whose first ACK was
// lost. It adds up the events: a backend's maps, and so its counts, begin with
// each turn.
func (n *node) checkJoined(t *testing.T, m mode, counted map[string]uint64, connections uint64) {
	t.Helper()
	least := uint64(1)
	if slices.Contains(m.places, redirect.PlacePeer) {
		least = connections - connections/100
	}
	joined := counted["joined"]
	if len(m.places) == 0 {
		if joined > 0 {
			t.Errorf("%s: %d pairs were joined", m.name, joined)
		}
		return
	}
	if joined < least {
		t.Errorf("%s: %d pairs were joined of %d connections", m.name, joined, connections)
	}
	if n.events[m.name] == nil {
		n.events[m.name] = map[string]uint64{}
	}
	for name, count := range counted {
		n.events[m.name][name] += count
	}
}

// printEvents prints what became of accelerated connections so far.
func (n *node) printEvents() {
	for _, m := range modes {
		if e := n.events[m.name]; e != nil {
			fmt.Printf("%s: %s\n\n", m.name, strings.TrimPrefix(fmt.Sprint(e), "map"))
		}
	}
	clear(n.events)
}

// untrack removes the chains that iptables leaves without rules: they have the
// kernel track all connections.
func (n *node) untrack() error {
	var errs []error
	for _, ns := range []netnstest.Namespace{n.client.Namespace, n.server.Namespace} {
		for _, tool := range []string{"iptables", "ip6tables"} {
			for _, table := range []string{"nat", "filter", "mangle", "raw"} {
				out, err := ns.Command(n.tb, 0, need.Tool(n.tb, tool), "-w", "-t", table, "-X").CombinedOutput()
				if err != nil {
					errs = append(errs, errors.New(strings.TrimSpace(string(out))))
				}
			}
		}
	}
	return errors.Join(errs...)
}

func workload(t *testing.T, pod *netnstest.Pod) redirect.Workload {
	t.Helper()
	inode := pod.Inode(t)
	return redirect.Workload{
		ID:  redirect.ID{PodUID: filepath.Base(pod.Netns), NetnsInode: inode},
		Pod: "bench/" + pod.Name, Netns: pod.Netns, Addrs: pod.Addrs(), Interfaces: []string{"eth0"},
		Policy: redirect.DefaultPolicy(),
	}
}

// A way is where the client dials, and the clusters of both Envoys that its
// connections to a service then must pass.
type way int

const (
	direct   way = iota // no Envoy
	explicit            // listeners of their own, clusters with a fixed address
	same                // listeners of their own, the clusters of captured connections
	captured            // the service's address
)

// Where a way's first port is: the services follow each other.
const (
	vipPort     = 80
	appPort     = 9000
	explicitOut = 10000
	explicitIn  = 11000
	sameOut     = 12000
	sameIn      = 13000
)

var vip = netip.MustParseAddr("10.96.0.1")

// to is where the client dials for a service.
func (n *node) to(w way, service int) netip.AddrPort {
	at := map[way]netip.AddrPort{
		direct:   netip.AddrPortFrom(n.server.Addr4, appPort),
		explicit: netip.AddrPortFrom(n.client.Addr4, explicitOut),
		same:     netip.AddrPortFrom(n.client.Addr4, sameOut),
		captured: netip.AddrPortFrom(vip, vipPort),
	}[w]
	return netip.AddrPortFrom(at.Addr(), at.Port()+uint16(service))
}
