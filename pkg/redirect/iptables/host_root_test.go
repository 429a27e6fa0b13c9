package iptables_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/pkg/redirect/iptables"
	"github.com/sluicemesh/sluice/pkg/redirect/redirecttest"
	"github.com/sluicemesh/sluice/tests/need"
	"github.com/sluicemesh/sluice/tests/netnstest"
)

// A probing is a node with one redirected pod, "app" on its port 80, and a
// cgroup that the backend takes for the root of all.
type probing struct {
	node *netnstest.Node
	pod  *netnstest.Pod
	w    redirect.Workload
	r    *iptables.Redirector
	o    iptables.Options
	log  *bytes.Buffer
}

func newProbing(t *testing.T) *probing {
	t.Helper()
	p := &probing{node: netnstest.NewNode(t), log: new(bytes.Buffer)}
	p.o = iptables.Options{
		StateDir: filepath.Join(t.TempDir(), "state"), Cgroup: netnstest.NewCgroup(t),
		Log: slog.New(slog.NewTextHandler(p.log, nil)),
	}
	// The node is in a cgroup namespace of its own, as one in a container is.
	first := p.node.Command(t, 0, need.Tool(t, "sleep"), "infinity")
	first.In(p.o.Cgroup)
	first.SysProcAttr.Unshareflags = unix.CLONE_NEWCGROUP
	if err := first.Start(); err != nil {
		t.Fatal(err)
	}
	p.o.HostCgroupNS = fmt.Sprintf("/proc/%d/ns/cgroup", first.Process.Pid)
	p.r, p.pod, p.w = setupOn(t, p.node, p.o)
	p.o.HostNetns = p.node.Netns
	t.Cleanup(func() {
		if err := iptables.Uninstall(context.Background(), p.o); err != nil {
			t.Errorf("uninstall: %v", err)
		}
	})
	for _, addr := range p.pod.Addrs() {
		p.pod.Serve(t, netip.AddrPortFrom(addr, 80), "app")
	}
	p.pod.Serve(t, netip.AddrPortFrom(netip.IPv6Unspecified(), redirect.InboundPort), "proxy")
	return p
}

// start starts a process of the node in the cgroup at path below the root.
func (p *probing) start(t *testing.T, path string) *redirecttest.Dialer {
	t.Helper()
	return redirecttest.StartDialer(t, p.node.Namespace, filepath.Join(p.o.Cgroup, path))
}

func (p *probing) want(t *testing.T, d *redirecttest.Dialer, name string) {
	t.Helper()
	for _, addr := range p.pod.Addrs() {
		if got, err := d.Ask(netip.AddrPortFrom(addr, 80)); err != nil || got != name {
			t.Fatalf("at %s %q answers, %v; want %q", addr, got, err, name)
		}
	}
}

// rules returns the packet filter rules of the node.
func (p *probing) rules(t *testing.T) netnstest.State {
	t.Helper()
	return slices.DeleteFunc(p.node.State(t), func(s string) bool { return !strings.HasPrefix(s, "ip") })
}

func (p *probing) problem(t *testing.T) error { t.Helper(); return problem(t, p.r) }

// TestExemptOnceKnown: while nobody knows which cgroups are pods' nothing is
// exempt and the node has no rules; then it is without the pod being touched by
// others than List and Add.
func TestExemptOnceKnown(t *testing.T) {
	p := newProbing(t)
	bare := p.rules(t)
	mustAdd(t, p.r, p.w)
	kubelet := p.start(t, "system")
	p.want(t, kubelet, "proxy")
	if diff := bare.Diff(p.rules(t)); diff != "" {
		t.Errorf("the node has rules:\n%s", diff)
	}
	if err := p.problem(t); err != nil {
		t.Errorf("it is no problem: %v", err)
	}
	if n := strings.Count(p.log.String(), "there is no cgroup kubepods"); n != 1 {
		t.Errorf("the log says it %d times: %s", n, p.log)
	}
	hostPod := p.start(t, "kubepods/pod1")
	if p.problem(t) == nil {
		t.Error("List does not see that probes can be exempt now")
	}
	mustAdd(t, p.r, p.w)
	if err := p.problem(t); err != nil {
		t.Error(err)
	}
	p.want(t, kubelet, "app")
	p.want(t, hostPod, "proxy")
	// A second cgroup of pods.
	nested := p.start(t, "docker/1/kubelet.slice/kubelet-kubepods.slice/pod2")
	if err := p.problem(t); err != nil {
		t.Error(err)
	}
	p.want(t, nested, "proxy")
	p.want(t, hostPod, "proxy")
	p.want(t, kubelet, "app")
	// Another agent takes over.
	again, err := iptables.New(p.o)
	if err != nil {
		t.Fatal(err)
	}
	p.r = again
	whole := p.rules(t)
	if err := p.problem(t); err != nil {
		t.Error(err)
	}
	if diff := whole.Diff(p.rules(t)); diff != "" {
		t.Errorf("another agent changes the node's rules:\n%s", diff)
	}
	p.want(t, nested, "proxy")
	p.want(t, kubelet, "app")
	if err := p.r.Remove(t.Context(), p.w.ID); err != nil {
		t.Fatal(err)
	}
	if diff := bare.Diff(p.rules(t)); diff != "" {
		t.Errorf("the node is not as before:\n%s", diff)
	}
}

// TestNodeRulesAreMended: what others do to the node's rules.
func TestNodeRulesAreMended(t *testing.T) {
	p := newProbing(t)
	hostPod, kubelet := p.start(t, "kubepods/pod1"), p.start(t, "system")
	others := func(cmd, args string) {
		t.Helper()
		if out, err := p.node.Command(t, 0, need.Tool(t, cmd), strings.Fields(args)...).CombinedOutput(); err != nil {
			t.Fatalf("%s %s: %v\n%s", cmd, args, err, out)
		}
	}
	others("iptables", "-t nat -N OTHERS")
	others("iptables", "-t nat -A POSTROUTING -j OTHERS")
	bare := p.rules(t)
	mustAdd(t, p.r, p.w)
	whole := p.rules(t)
	for _, tc := range []struct{ name, cmd, args string }{
		{"jump deleted", "iptables", "-t nat -D POSTROUTING 1"},
		{"drop deleted", "ip6tables", "-t raw -F SLUICE_FORGED"},
		{"raw flushed", "iptables", "-t raw -F"},
		{"pod deleted", "ip6tables", "-t nat -D SLUICE_NODE 1"},
		{"rule added", "iptables", "-t nat -I SLUICE_EXEMPT -j RETURN"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			others(tc.cmd, tc.args)
			if p.problem(t) == nil {
				t.Error("List sees no problem")
			}
			mustAdd(t, p.r, p.w)
			if err := p.problem(t); err != nil {
				t.Errorf("after Add: %v", err)
			}
			if diff := whole.Diff(p.rules(t)); diff != "" {
				t.Errorf("after Add the node differs:\n%s", diff)
			}
		})
	}
	t.Run("pushed down", func(t *testing.T) {
		// A chain of others in front is theirs alone.
		others("iptables", "-t nat -I POSTROUTING -j OTHERS")
		if err := p.problem(t); err != nil {
			t.Error(err)
		}
		// A rule that decides is not.
		others("iptables", "-t nat -I POSTROUTING -s 10.0.0.0/8 -d 10.0.0.0/8 -j RETURN")
		p.want4(t, kubelet, "proxy")
		if p.problem(t) == nil {
			t.Error("List sees no problem")
		}
		mustAdd(t, p.r, p.w)
		if err := p.problem(t); err != nil {
			t.Error(err)
		}
		p.want(t, kubelet, "app")
		p.want(t, hostPod, "proxy")
		others("iptables", "-t nat -D POSTROUTING -s 10.0.0.0/8 -d 10.0.0.0/8 -j RETURN")
		others("iptables", "-t nat -D POSTROUTING -j OTHERS")
	})
	if err := iptables.Uninstall(t.Context(), p.o); err != nil {
		t.Fatal(err)
	}
	if diff := bare.Diff(p.rules(t)); diff != "" {
		t.Errorf("after Uninstall the node is not as before:\n%s", diff)
	}
}

// faultyRestore puts programs in front of iptables-restore and its kin. Those of the
// families that the function returned was last called with fail where the node's
// rules are concerned.
func faultyRestore(t *testing.T) (fail func(families ...string)) {
	t.Helper()
	dir := t.TempDir()
	for _, family := range []string{"iptables", "ip6tables"} {
		for _, variant := range []string{iptables.VariantNFT, iptables.VariantLegacy} {
			name := family + "-" + variant + "-restore"
			script := fmt.Sprintf(`#!%s
rules=$(cat)
case $rules in *SLUICE_NODE*) if grep -qsx %s %s/failing; then echo no memory >&2; exit 4; fi; esac
echo "$rules" | %s "$@"
`, need.Tool(t, "sh"), family, dir, need.Tool(t, name))
			if err := os.WriteFile(filepath.Join(dir, name), []byte(script), 0o755); err != nil {
				t.Fatal(err)
			}
		}
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	return func(families ...string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, "failing"), []byte(strings.Join(families, "\n")+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// TestNodeRulesCannotBeChanged: while iptables-restore fails, the node's rules stay
// as they are, whoever asks is told, and no pod trusts an address that others can
// send from. Once it works again all is as it should be.
func TestNodeRulesCannotBeChanged(t *testing.T) {
	fail := faultyRestore(t)
	p := newProbing(t)
	p.start(t, "kubepods/pod1")
	kubelet := p.start(t, "system")
	mustAdd(t, p.r, p.w)
	p.want(t, kubelet, "app")
	whole := p.rules(t)
	other := p.node.Pod(t, "other")
	w := p.w
	w.ID, w.Netns, w.Addrs = redirect.ID{PodUID: "other", NetnsInode: other.Inode(t)}, other.Netns, other.Addrs()
	nat := func(action string) {
		t.Helper()
		args := "-t nat " + action + " SLUICE_EXEMPT -j RETURN"
		if out, err := p.node.Command(t, 0, need.Tool(t, "iptables"), strings.Fields(args)...).CombinedOutput(); err != nil {
			t.Fatalf("iptables %s: %v\n%s", args, err, out)
		}
	}
	problem := func() error { // the other pod was begun and may be listed, too
		t.Helper()
		list, err := p.r.List(t.Context())
		i := slices.IndexFunc(list, func(i redirect.Installed) bool { return i.ID == p.w.ID })
		if err != nil || i < 0 {
			t.Fatalf("List() = %v, %v", list, err)
		}
		return list[i].Problem
	}
	refused := func(what string, w redirect.Workload) {
		t.Helper()
		if err := p.r.Add(t.Context(), w); err == nil || !strings.Contains(err.Error(), "change the node's iptables rules") || !strings.Contains(err.Error(), "no memory") {
			t.Errorf("%s: Add: %v, want an error with what the program says", what, err)
		}
	}

	fail("iptables", "ip6tables")
	for range 2 { // the second time it looks what there is
		refused("another pod", w)
		if diff := whole.Diff(p.rules(t)); diff != "" {
			t.Fatalf("the node's rules did not stay:\n%s", diff)
		}
	}
	p.want(t, kubelet, "app")
	nat("-I")
	damaged := p.rules(t)
	if problem() == nil {
		t.Error("List sees no problem")
	}
	refused("rules that others changed", p.w)
	if diff := damaged.Diff(p.rules(t)); diff != "" {
		t.Errorf("what is left of the node's rules did not stay:\n%s", diff)
	}
	p.want4(t, kubelet, "proxy")

	// Without the rule that drops what others send pods must trust nobody.
	if out, err := p.node.Command(t, 0, need.Tool(t, "iptables"), "-t", "raw", "-F").CombinedOutput(); err != nil {
		t.Fatalf("iptables: %v\n%s", err, out)
	}
	nat("-D")
	fail("iptables")
	if problem() == nil {
		t.Error("List sees no problem")
	}
	mustAdd(t, p.r, p.w)
	p.want4(t, kubelet, "proxy")
	if rules := strings.Join(p.pod.State(t), "\n"); strings.Contains(rules, iptables.DefaultProbeSource4) {
		t.Errorf("the pod trusts an address that others can send from:\n%s", rules)
	}

	fail()
	if problem() == nil {
		t.Error("List does not see that probes can be exempt again")
	}
	mustAdd(t, p.r, p.w)
	if err := problem(); err != nil {
		t.Error(err)
	}
	p.want(t, kubelet, "app")
	mustAdd(t, p.r, w)
	if err := p.r.Remove(t.Context(), w.ID); err != nil {
		t.Error(err)
	}
	if diff := whole.Diff(p.rules(t)); diff != "" {
		t.Errorf("once it works again the node's rules are not as before:\n%s", diff)
	}
}

// TestUninstallWithoutRecords: the node's rules go even if somebody has removed
// the records, and what is others' stays.
func TestUninstallWithoutRecords(t *testing.T) {
	p := newProbing(t)
	p.start(t, "kubepods/pod1")
	if out, err := p.node.Command(t, 0, need.Tool(t, "iptables"), "-t", "nat", "-N", "OTHERS").CombinedOutput(); err != nil {
		t.Fatalf("iptables: %v\n%s", err, out)
	}
	bare := p.rules(t)
	mustAdd(t, p.r, p.w)
	whole := strings.Join(p.rules(t), "\n")
	for _, chain := range []string{"SLUICE_NODE", "SLUICE_EXEMPT", "SLUICE_FORGED"} {
		if !strings.Contains(whole, chain) {
			t.Errorf("the node has no chain %s:\n%s", chain, whole)
		}
	}
	if err := os.RemoveAll(p.o.StateDir); err != nil {
		t.Fatal(err)
	}
	p.log.Reset()
	for range 2 {
		if err := iptables.Uninstall(t.Context(), p.o); err != nil {
			t.Fatal(err)
		}
		if diff := bare.Diff(p.rules(t)); diff != "" {
			t.Errorf("after Uninstall the node is not as before:\n%s", diff)
		}
		if _, err := os.Stat(p.o.StateDir); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("there is a directory of records: %v", err)
		}
	}
	if p.log.Len() > 0 {
		t.Errorf("it logs what does not matter any more: %s", p.log)
	}
}

func (p *probing) want4(t *testing.T, d *redirecttest.Dialer, name string) {
	t.Helper()
	if got, err := d.Ask(netip.AddrPortFrom(p.pod.Addr4, 80)); err != nil || got != name {
		t.Fatalf("%q answers, %v; want %q", got, err, name)
	}
}

// TestForgedSource: nobody else gets a connection from the reserved address.
func TestForgedSource(t *testing.T) {
	p := newProbing(t)
	hostPod := p.start(t, "kubepods/pod1")
	mustAdd(t, p.r, p.w)
	p.want(t, p.start(t, "system"), "app")
	neighbour, remote := p.node.Pod(t, "neighbour"), p.node.Remote(t, "remote")
	for _, source := range []string{iptables.DefaultProbeSource4, iptables.DefaultProbeSource6} {
		source := netip.MustParseAddr(source)
		to := netip.AddrPortFrom(p.pod.Addr4, 80)
		if source.Is6() {
			to = netip.AddrPortFrom(p.pod.Addr6, 80)
		}
		for _, client := range []*netnstest.Pod{neighbour, remote} {
			t.Run(fmt.Sprintf("%s from %s", client.Name, source), func(t *testing.T) {
				addAddr(t, client, source)
				ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
				defer cancel()
				c, err := client.DialWith(ctx, net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(source, 0))}, "tcp", to.String())
				if err == nil {
					a, err := netnstest.ReadAnswer(ctx, c)
					t.Errorf("%q answers, %v", a.Name, err)
					_ = c.Close()
				}
			})
		}
	}
	p.want(t, hostPod, "proxy")
}

func addAddr(t *testing.T, pod *netnstest.Pod, addr netip.Addr) {
	t.Helper()
	err := pod.Do(func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer h.Close()
		eth0, err := h.LinkByName("eth0")
		if err != nil {
			return err
		}
		return h.AddrAdd(eth0, &netlink.Addr{
			IPNet: &net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(addr.BitLen(), addr.BitLen())},
			Flags: unix.IFA_F_NODAD,
		})
	})
	if err != nil {
		t.Fatalf("add address %s: %v", addr, err)
	}
}

// TestNoWayBack: a pod whose answers would not reach the node is probed through
// its proxy rather than not at all.
func TestNoWayBack(t *testing.T) {
	p := newProbing(t)
	p.start(t, "kubepods/pod1")
	kubelet := p.start(t, "system")
	err := p.pod.Do(func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer h.Close()
		return h.RouteDel(&netlink.Route{Dst: &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}})
	})
	if err != nil {
		t.Fatal(err)
	}
	mustAdd(t, p.r, p.w)
	p.want4(t, kubelet, "proxy")
	if got, err := kubelet.Ask(netip.AddrPortFrom(p.pod.Addr6, 80)); err != nil || got != "app" {
		t.Errorf("over IPv6 %q answers, %v", got, err)
	}
	if err := p.problem(t); err != nil {
		t.Error(err)
	}
	if !strings.Contains(p.log.String(), "no route to the address") {
		t.Errorf("the log does not say it: %s", p.log)
	}
}

// TestServiceIsNoProbe: what a process of the node dials as a Service is not
// meant for that pod, and is captured.
func TestServiceIsNoProbe(t *testing.T) {
	p := newProbing(t)
	p.start(t, "kubepods/pod1")
	kubelet := p.start(t, "system")
	mustAdd(t, p.r, p.w)
	args := fmt.Sprintf("-t nat -A OUTPUT -d 10.96.0.1/32 -p tcp -j DNAT --to-destination %s:80", p.pod.Addr4)
	if out, err := p.node.Command(t, 0, need.Tool(t, "iptables"), strings.Fields(args)...).CombinedOutput(); err != nil {
		t.Fatalf("iptables: %v\n%s", err, out)
	}
	addRoute(t, p.node, "10.96.0.0/16", p.pod.Addr4)
	if got, err := kubelet.Ask(netip.MustParseAddrPort("10.96.0.1:80")); err != nil || got != "proxy" {
		t.Errorf("%q answers, %v; want the proxy", got, err)
	}
	p.want(t, kubelet, "app")
}

func addRoute(t *testing.T, node *netnstest.Node, to string, via netip.Addr) {
	t.Helper()
	_, dst, err := net.ParseCIDR(to)
	if err != nil {
		t.Fatal(err)
	}
	err = node.Do(func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer h.Close()
		return h.RouteAdd(&netlink.Route{Dst: dst, Gw: via.AsSlice()})
	})
	if err != nil {
		t.Fatalf("add route: %v", err)
	}
}
