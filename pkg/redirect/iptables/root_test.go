package iptables_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/pkg/redirect/iptables"
	"github.com/sluicemesh/sluice/tests/need"
	"github.com/sluicemesh/sluice/tests/netnstest"
)

// setup returns a Redirector, and a pod with the workload that describes it.
func setup(t *testing.T) (*iptables.Redirector, *netnstest.Pod, redirect.Workload) {
	t.Helper()
	return setupIn(t, t.TempDir())
}

func setupIn(t *testing.T, dir string) (*iptables.Redirector, *netnstest.Pod, redirect.Workload) {
	t.Helper()
	return setupOn(t, netnstest.NewNode(t), iptables.Options{StateDir: dir})
}

// setupOn is setup on a node and with options.
func setupOn(t *testing.T, node *netnstest.Node, o iptables.Options) (*iptables.Redirector, *netnstest.Pod, redirect.Workload) {
	t.Helper()
	need.Root(t)
	for _, name := range []string{"iptables-restore", "ip6tables-restore"} {
		need.Tool(t, name)
	}
	o.HostNetns = node.Netns
	r, err := iptables.New(o)
	if err != nil {
		t.Fatal(err)
	}
	pod := node.Pod(t, "pod")
	return r, pod, redirect.Workload{
		ID:         redirect.ID{PodUID: "uid", NetnsInode: pod.Inode(t)},
		Pod:        "shop/web",
		Netns:      pod.Netns,
		Addrs:      pod.Addrs(),
		Interfaces: []string{"eth0"},
		Policy:     redirect.DefaultPolicy(),
	}
}

func mustAdd(t *testing.T, r *iptables.Redirector, w redirect.Workload) {
	t.Helper()
	if err := r.Add(t.Context(), w); err != nil {
		t.Fatal(err)
	}
}

// problem returns what List says of the only workload.
func problem(t *testing.T, r *iptables.Redirector) error {
	t.Helper()
	list, err := r.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(list) != 1 {
		t.Fatalf("List() = %v, want one workload", list)
	}
	return list[0].Problem
}

func TestChangesByOthersAreMended(t *testing.T) {
	r, pod, w := setup(t)
	mustAdd(t, r, w)
	whole := pod.State(t)
	for _, tc := range []struct{ name, cmd, args string }{
		{"jump deleted", "iptables", "-t nat -D OUTPUT 1"},
		{"jump doubled", "iptables", "-t nat -A PREROUTING -p tcp -j SLUICE_INBOUND"},
		{"rule deleted", "ip6tables", "-t nat -D SLUICE_OUTPUT 4"},
		{"rule added", "iptables", "-t nat -I SLUICE_OUTPUT -j RETURN"},
		{"verdict changed", "ip6tables", "-t nat -R SLUICE_IN_CAPTURED 1 -j ACCEPT"},
		{"chain added", "iptables", "-t nat -N SLUICE_OF_SOMEONE"},
		{"table flushed", "iptables", "-t nat -F"},
		{"filter flushed", "iptables", "-t filter -F"},
		{"address removed", "ip", "-6 addr del ::6/128 dev lo"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			out, err := pod.Command(t, 0, need.Tool(t, tc.cmd), strings.Fields(tc.args)...).CombinedOutput()
			if err != nil {
				t.Fatalf("%s %s: %v\n%s", tc.cmd, tc.args, err, out)
			}
			if problem(t, r) == nil {
				t.Error("List sees no problem")
			}
			mustAdd(t, r, w)
			if err := problem(t, r); err != nil {
				t.Errorf("after Add: %v", err)
			}
			if diff := whole.Diff(pod.State(t)); diff != "" {
				t.Errorf("after Add the namespace differs:\n%s", diff)
			}
		})
	}
}

func TestRulesOfOthersStay(t *testing.T) {
	r, pod, w := setup(t)
	needLegacy(t)
	for _, args := range []string{"-t nat -A OUTPUT -d 192.0.2.1/32 -j RETURN", "-A INPUT -s 192.0.2.1/32 -j DROP"} {
		if out, err := pod.Command(t, 0, need.Tool(t, "iptables-legacy"), strings.Fields(args)...).CombinedOutput(); err != nil {
			t.Fatalf("iptables-legacy: %v\n%s", err, out)
		}
	}
	before := pod.State(t)
	mustAdd(t, r, w)
	state := strings.Join(pod.State(t), "\n")
	if !strings.Contains(state, "iptables-legacy-save :SLUICE_OUTPUT") || strings.Contains(state, "\niptables-nft-save :SLUICE_OUTPUT") {
		t.Errorf("rules were not put where the others are:\n%s", state)
	}
	if !strings.Contains(state, "ip6tables-nft-save :SLUICE_OUTPUT") {
		t.Errorf("rules of IPv4 decided for IPv6:\n%s", state)
	}
	if err := r.Remove(t.Context(), w.ID); err != nil {
		t.Fatal(err)
	}
	if diff := before.Diff(pod.State(t)); diff != "" {
		t.Errorf("the namespace is not as before:\n%s", diff)
	}
}

// TestTablesOfNFT: tables that others made with nft, which iptables cannot show, stay
// and are obeyed. Where one stands in the place of iptables' own, Add says so.
func TestTablesOfNFT(t *testing.T) {
	for _, tc := range []struct {
		name  string
		rules string
		err   string
	}{
		{"beside", "table inet other { chain out { type filter hook output priority 0; ip daddr 192.0.2.1 counter drop; }; chain in { type nat hook prerouting priority -110; }; }", ""},
		{"in a table of that name", "table ip nat { set s { type ipv4_addr; elements = { 192.0.2.1 }; }; chain OUTPUT { type nat hook output priority -100; ip daddr @s accept; }; }", ""},
		{"in the place of a chain", "table ip nat { chain OUTPUT { type nat hook output priority -50; }; }", "chain OUTPUT"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			node := netnstest.NewNode(t)
			r, pod, w := setupOn(t, node, iptables.Options{StateDir: t.TempDir(), Variant: iptables.VariantNFT})
			peer := node.Pod(t, "peer")
			to := netip.AddrPortFrom(pod.Addr4, 80)
			pod.Serve(t, to, "app")
			pod.Serve(t, netip.AddrPortFrom(netip.IPv6Unspecified(), redirect.InboundPort), "proxy")
			answers := func(want string) {
				t.Helper()
				if a, err := peer.Ask(t.Context(), to); err != nil || a.Name != want {
					t.Errorf("%q answers, %v; want %q", a.Name, err, want)
				}
			}
			nft := func(args string) string {
				t.Helper()
				out, err := pod.Command(t, 0, need.Tool(t, "nft"), args).CombinedOutput()
				if err != nil {
					t.Fatalf("nft %s: %v\n%s", args, err, out)
				}
				return string(out)
			}
			nft(tc.rules)
			before := nft("list ruleset")
			switch err := r.Add(t.Context(), w); {
			case tc.err == "":
				if err != nil {
					t.Fatal(err)
				}
				answers("proxy")
				if err := problem(t, r); err != nil {
					t.Errorf("it is a problem: %v", err)
				}
			case err == nil || !strings.Contains(err.Error(), tc.err):
				t.Errorf("Add: %v; want an error with %q", err, tc.err)
			}
			if err := r.Remove(t.Context(), w.ID); err != nil {
				t.Fatal(err)
			}
			answers("app")
			after := nft("list ruleset")
			for line := range strings.Lines(before) {
				if !strings.Contains(after, line) {
					t.Errorf("%q is gone", line)
				}
			}
			if strings.Contains(after, "SLUICE") {
				t.Errorf("something is left:\n%s", after)
			}
		})
	}
}

// TestRecordOfAnotherBuild: where rules were made by an earlier or a later build, List
// says so and Add brings them to this one's; connections are captured all along.
func TestRecordOfAnotherBuild(t *testing.T) {
	dir := t.TempDir()
	node := netnstest.NewNode(t)
	r, pod, w := setupOn(t, node, iptables.Options{StateDir: dir})
	peer := node.Pod(t, "peer")
	to := netip.AddrPortFrom(pod.Addr4, 80)
	pod.Serve(t, to, "app")
	pod.Serve(t, netip.AddrPortFrom(netip.IPv6Unspecified(), redirect.InboundPort), "proxy")
	captured := func() {
		t.Helper()
		if a, err := peer.Ask(t.Context(), to); err != nil || a.Name != "proxy" {
			t.Errorf("%q answers, %v; want the proxy", a.Name, err)
		}
	}
	mustAdd(t, r, w)
	whole := pod.State(t)
	for _, build := range []string{"1", "99"} {
		records, err := filepath.Glob(filepath.Join(dir, "*.json"))
		if err != nil || len(records) != 1 {
			t.Fatalf("records %v, %v", records, err)
		}
		b, err := os.ReadFile(records[0])
		if err != nil {
			t.Fatal(err)
		}
		b = regexp.MustCompile(`"format":\d+`).ReplaceAll(b, []byte(`"format":`+build+`,"unknown":[]`))
		if err := os.WriteFile(records[0], b, 0o600); err != nil {
			t.Fatal(err)
		}
		for _, args := range []string{"-t nat -N SLUICE_OTHER", "-t nat -A SLUICE_OTHER -j RETURN", "-t nat -I OUTPUT -p tcp -j SLUICE_OTHER"} {
			if out, err := pod.Command(t, 0, need.Tool(t, "iptables"), strings.Fields(args)...).CombinedOutput(); err != nil {
				t.Fatalf("iptables %s: %v\n%s", args, err, out)
			}
		}
		if err := problem(t, r); err == nil || !strings.Contains(err.Error(), "layout "+build) {
			t.Errorf("build %s: problem %v does not name the layout", build, err)
		}
		captured()
		mustAdd(t, r, w)
		if err := problem(t, r); err != nil {
			t.Errorf("build %s: after Add: %v", build, err)
		}
		captured()
		if diff := whole.Diff(pod.State(t)); diff != "" {
			t.Errorf("build %s: after Add the namespace differs:\n%s", build, diff)
		}
	}
}

func TestLostRecordIsFoundInTheRules(t *testing.T) {
	dir := t.TempDir()
	r, pod, w := setupIn(t, dir)
	before := pod.State(t)
	mustAdd(t, r, w)
	records, err := filepath.Glob(filepath.Join(dir, "*.json"))
	if err != nil || len(records) != 1 {
		t.Fatalf("records %v, %v", records, err)
	}
	if err := os.WriteFile(records[0], []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := r.List(t.Context()); err == nil {
		t.Error("List says nothing of a broken record")
	}
	mustAdd(t, r, w)
	if err := problem(t, r); err != nil {
		t.Error(err)
	}
	if err := r.Remove(t.Context(), w.ID); err != nil {
		t.Fatal(err)
	}
	after := pod.State(t)
	// Whose address it is cannot be known without the record.
	if diff := before.Diff(after); diff != "" && !strings.Contains(diff, "::6/128") {
		t.Errorf("the namespace is not as before:\n%s", diff)
	}
}

// TestBrokenRecord: one record that cannot be read hides no other.
func TestBrokenRecord(t *testing.T) {
	dir := t.TempDir()
	r, _, w := setupIn(t, dir)
	mustAdd(t, r, w)
	if err := os.WriteFile(filepath.Join(dir, "broken.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	list, err := r.List(t.Context())
	if err == nil || !strings.Contains(err.Error(), "broken") {
		t.Errorf("error %v does not name the record", err)
	}
	if len(list) != 1 || !list[0].Whole(w) {
		t.Errorf("List() = %+v, want the other workload", list)
	}
}

// TestUninstallBrokenRecord: what can be removed is removed, and the record that
// says no longer of whom it is stays and is named.
func TestUninstallBrokenRecord(t *testing.T) {
	o := iptables.Options{StateDir: t.TempDir()}
	node := netnstest.NewNode(t)
	o.HostNetns = node.Netns
	r, pod, w := setupOn(t, node, o)
	before := pod.State(t)
	mustAdd(t, r, w)
	broken := filepath.Join(o.StateDir, "broken.json")
	if err := os.WriteFile(broken, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := iptables.Uninstall(t.Context(), o); err == nil || !strings.Contains(err.Error(), "broken") {
		t.Errorf("error %v does not name the record", err)
	}
	if diff := before.Diff(pod.State(t)); diff != "" {
		t.Errorf("the namespace is not as before:\n%s", diff)
	}
	if _, err := os.Stat(broken); err != nil {
		t.Error(err)
	}
}

func TestUninstall(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	node := netnstest.NewNode(t)
	o := iptables.Options{StateDir: dir, HostNetns: node.Netns}
	r, pod, w := setupOn(t, node, o)
	before := pod.State(t)
	mustAdd(t, r, w)
	for range 2 {
		if err := iptables.Uninstall(t.Context(), o); err != nil {
			t.Fatal(err)
		}
	}
	if diff := before.Diff(pod.State(t)); diff != "" {
		t.Errorf("the namespace is not as before:\n%s", diff)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the records are still there: %v", err)
	}
}

// TestInterfaceRenamed: rules go by names. One that is gone is named, and comes
// into its own again when it is back.
func TestInterfaceRenamed(t *testing.T) {
	r, pod, w := setup(t)
	mustAdd(t, r, w)
	rename := func(from, to string) {
		t.Helper()
		for _, args := range []string{"down", "name " + to, "up"} {
			args = "link set dev " + from + " " + args
			if out, err := pod.Command(t, 0, need.Tool(t, "ip"), strings.Fields(args)...).CombinedOutput(); err != nil {
				t.Fatalf("ip %s: %v\n%s", args, err, out)
			}
			if strings.Contains(args, " name ") {
				from = to
			}
		}
	}
	rename("eth0", "net7")
	if err := problem(t, r); err == nil || !strings.Contains(err.Error(), "find interface eth0") {
		t.Errorf("List names %v, want the interface", err)
	}
	if err := r.Add(t.Context(), w); err == nil || !strings.Contains(err.Error(), "find interface eth0") {
		t.Errorf("Add without the interface: %v", err)
	}
	w.Interfaces = []string{"net7"}
	mustAdd(t, r, w)
	if err := problem(t, r); err != nil {
		t.Error(err)
	}
}

func TestManyAtOnce(t *testing.T) {
	r, _, w := setup(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			w := w
			w.Policy.Outbound.ExcludePorts.List = []uint16{uint16(1000 + i)}
			for range 3 {
				if err := r.Add(ctx, w); err != nil {
					t.Error(err)
				}
				if _, err := r.List(ctx); err != nil {
					t.Error(err)
				}
				if _, err := r.Counters(ctx); err != nil {
					t.Error(err)
				}
			}
		}()
	}
	wg.Wait()
	if err := problem(t, r); err != nil {
		t.Error(err)
	}
}

func TestAnotherNamespaceUnderThePath(t *testing.T) {
	r, _, w := setup(t)
	w.ID.NetnsInode++
	if err := r.Add(t.Context(), w); !errors.Is(err, redirect.ErrGone) {
		t.Errorf("got %v, want ErrGone", err)
	}
}

func TestRefused(t *testing.T) {
	r, _, good := setup(t)
	for name, change := range map[string]func(*redirect.Workload){
		"wildcard interface": func(w *redirect.Workload) { w.Policy.ExcludeInterfaces = []string{"eth+"} },
		"words":              func(w *redirect.Workload) { w.Interfaces = []string{"eth0 -j ACCEPT"} },
		"no address":         func(w *redirect.Workload) { w.Addrs = nil },
		"two of a family":    func(w *redirect.Workload) { w.Addrs = []netip.Addr{w.Addrs[0], w.Addrs[0]} },
		"mapped address": func(w *redirect.Workload) {
			w.Addrs = []netip.Addr{netip.AddrFrom16(w.Addrs[0].As16())}
		},
	} {
		w := good
		change(&w)
		if err := r.Add(t.Context(), w); err == nil {
			t.Errorf("%s was taken", name)
		}
	}
}

func TestNoSuchVariant(t *testing.T) {
	if _, err := iptables.New(iptables.Options{StateDir: t.TempDir(), Variant: "pf"}); err == nil {
		t.Error("variant pf was taken")
	}
}

// BenchmarkConnect measures a connection that an app opens to a server of the
// same namespace's peer while the policy excludes many ranges and ports, none
// of which it matches: the longest walk through the rules.
func BenchmarkConnect(b *testing.B) {
	need.Root(b)
	for _, variant := range []string{iptables.VariantNFT, iptables.VariantLegacy} {
		for _, size := range []struct{ cidrs, ports int }{{0, 0}, {8, 15}, {500, 200}} {
			b.Run(fmt.Sprintf("%s/cidrs=%d,ports=%d", variant, size.cidrs, size.ports), func(b *testing.B) {
				benchmarkConnect(b, variant, size.cidrs, size.ports)
			})
		}
	}
}

func benchmarkConnect(b *testing.B, variant string, cidrs, ports int) {
	node := netnstest.NewNode(b)
	r, err := iptables.New(iptables.Options{StateDir: b.TempDir(), Variant: variant, HostNetns: node.Netns})
	if err != nil {
		b.Fatal(err)
	}
	pod, peer := node.Pod(b, "pod"), node.Pod(b, "peer")
	w := redirect.Workload{
		ID:  redirect.ID{PodUID: "uid", NetnsInode: pod.Inode(b)},
		Pod: "shop/web", Netns: pod.Netns, Addrs: pod.Addrs(), Interfaces: []string{"eth0"},
		Policy: redirect.DefaultPolicy(),
	}
	// Not captured in the end: the connection itself costs the same each time.
	w.Policy.Outbound.IncludeCIDRs = redirect.CIDRs{}
	for i := range cidrs {
		w.Policy.Outbound.ExcludeCIDRs.List = append(w.Policy.Outbound.ExcludeCIDRs.List,
			netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 87, byte(i / 2), byte(i % 2 * 128)}), 25))
	}
	for i := range ports {
		w.Policy.Outbound.ExcludePorts.List = append(w.Policy.Outbound.ExcludePorts.List, uint16(1000+2*i))
	}
	if err := r.Add(b.Context(), w); err != nil {
		b.Fatal(err)
	}
	s := peer.Serve(b, netip.AddrPortFrom(peer.Addr4, 0), "peer")
	err = pod.Do(func() error {
		for b.Loop() {
			if err := connectOnce(s.Addr); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		b.Fatal(err)
	}
}

// connectOnce opens a connection and resets it, so that no port is held.
func connectOnce(to netip.AddrPort) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	err = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	if err == nil {
		err = unix.Connect(fd, &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()})
	}
	return errors.Join(err, unix.Close(fd))
}

// BenchmarkOperations measures what the agent does with one pod of both families.
func BenchmarkOperations(b *testing.B) {
	need.Root(b)
	node := netnstest.NewNode(b)
	r, err := iptables.New(iptables.Options{StateDir: b.TempDir(), HostNetns: node.Netns})
	if err != nil {
		b.Fatal(err)
	}
	pod := node.Pod(b, "pod")
	w := redirect.Workload{
		ID:  redirect.ID{PodUID: "uid", NetnsInode: pod.Inode(b)},
		Pod: "shop/web", Netns: pod.Netns, Addrs: pod.Addrs(), Interfaces: []string{"eth0"},
		Policy: redirect.DefaultPolicy(),
	}
	for _, op := range []struct {
		name string
		do   func() error
	}{
		{"add and remove", func() error {
			return errors.Join(r.Add(b.Context(), w), r.Remove(b.Context(), w.ID))
		}},
		{"add what is there", func() error { return r.Add(b.Context(), w) }},
		{"list", func() error { _, err := r.List(b.Context()); return err }},
		{"counters", func() error { _, err := r.Counters(b.Context()); return err }},
	} {
		b.Run(op.name, func(b *testing.B) {
			if err := r.Add(b.Context(), w); err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				if err := op.do(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
