package iptables

import (
	"cmp"
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"

	"github.com/sluicemesh/sluice/pkg/redirect"
)

var update = flag.Bool("update", false, "write the goldens")

// goldenWorkload is a pod with both families.
func goldenWorkload() redirect.Workload {
	return redirect.Workload{
		ID:         redirect.ID{PodUID: "uid", NetnsInode: 1},
		Pod:        "shop/web",
		Addrs:      []netip.Addr{netip.MustParseAddr("10.0.0.7"), netip.MustParseAddr("fd00::7")},
		Interfaces: []string{"eth0"},
		Policy:     redirect.DefaultPolicy(),
	}
}

// source returns where exempt connections to addr come from.
func source(addr netip.Addr) netip.Addr {
	if addr.Is4() {
		return netip.MustParseAddr(DefaultProbeSource4)
	}
	return netip.MustParseAddr(DefaultProbeSource6)
}

func prefixes(list ...string) []netip.Prefix {
	ps := make([]netip.Prefix, len(list))
	for i, s := range list {
		ps[i] = netip.MustParsePrefix(s)
	}
	return ps
}

func TestGolden(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(*redirect.Workload)
	}{
		{"default", func(*redirect.Workload) {}},
		{"nothing", func(w *redirect.Workload) { w.Policy = redirect.Policy{ProxyUID: 1337} }},
		{"ports", func(w *redirect.Workload) {
			w.Policy.ProxyUID = 4242
			w.Policy.Outbound.ExcludePorts.List = []uint16{22, 3306, 3307, 3308, 5432}
			w.Policy.Outbound.IncludePorts.List = []uint16{80}
			w.Policy.Outbound.IncludeCIDRs = redirect.CIDRs{}
			w.Policy.Inbound.IncludePorts = redirect.Ports{List: []uint16{8080, 8443}}
			w.Policy.Inbound.ExcludePorts.List = []uint16{9090}
		}},
		{"cidrs", func(w *redirect.Workload) {
			w.Policy.Outbound.ExcludeCIDRs.List = prefixes("10.1.2.3/32", "169.254.169.254/32", "fd00:1::/32")
			w.Policy.Outbound.IncludeCIDRs = redirect.CIDRs{List: prefixes("10.0.0.0/8", "10.4.0.0/16", "fd00::/8")}
		}},
		{"interfaces", func(w *redirect.Workload) {
			w.Interfaces = []string{"eth0", "net2"}
			w.Policy.ExcludeInterfaces = []string{"net1", "tun0"}
		}},
		{"proxy_cgroup", func(w *redirect.Workload) {
			w.ProxyCgroup = "/kubepods.slice/kubepods-poduid.slice/cri-containerd-0123.scope"
		}},
		{"all_excluded", func(w *redirect.Workload) {
			w.Policy.Outbound.ExcludePorts = redirect.Ports{All: true}
			w.Policy.Inbound.ExcludePorts = redirect.Ports{All: true}
		}},
		{"large", func(w *redirect.Workload) {
			for i := range 200 {
				w.Policy.Outbound.ExcludePorts.List = append(w.Policy.Outbound.ExcludePorts.List, uint16(20000+2*i))
			}
			for i := range 64 {
				w.Policy.Outbound.ExcludeCIDRs.List = append(w.Policy.Outbound.ExcludeCIDRs.List,
					netip.PrefixFrom(netip.AddrFrom4([4]byte{100, 64, byte(i), 0}), 24),
					netip.PrefixFrom(netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 0, byte(i)}), 48))
			}
		}},
	} {
		for _, addr := range goldenWorkload().Addrs {
			name := tc.name + "_v6"
			if addr.Is4() {
				name = tc.name + "_v4"
			}
			t.Run(name, func(t *testing.T) {
				w := goldenWorkload()
				tc.change(&w)
				got := installText(tables(w, addr, source(addr)), nil)
				file := filepath.Join("testdata", name+".rules")
				if *update {
					if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
						t.Fatal(err)
					}
				}
				want, err := os.ReadFile(file)
				if err != nil {
					t.Fatal(err)
				}
				if diff := gocmp.Diff(string(want), got); diff != "" {
					t.Errorf("differs from %s (-want +got); -update writes it anew:\n%s", file, diff)
				}
			})
		}
	}
}

// walk returns the verdict chain that a new outbound connection of an app ends
// in and the number of rules looked at. It knows what the builder writes and
// nothing more.
func walk(t *testing.T, nat table, dst netip.AddrPort) (verdict string, rules int) {
	t.Helper()
	chains := make(map[string][]string)
	for _, c := range nat.walk {
		chains[c.name] = c.rules
	}
	at := "SLUICE_OUTPUT"
next:
	for {
		for _, r := range chains[at] {
			rules++
			match, to, _ := strings.Cut(r, "-g ")
			if !appMatches(t, match, dst) {
				continue
			}
			if _, ok := chains[to]; !ok {
				return to, rules
			}
			at = to
			continue next
		}
		t.Fatalf("chain %s ends without a verdict", at)
	}
}

// appMatches evaluates the matches of a rule for an app's connection over eth0.
func appMatches(t *testing.T, match string, dst netip.AddrPort) bool {
	t.Helper()
	f := strings.Fields(match)
	for i := 0; i < len(f); i += 2 {
		switch f[i] {
		case "-p", "-m":
		case "-o", "--uid-owner", "-s":
			return false
		case "-d":
			if !netip.MustParsePrefix(f[i+1]).Contains(dst.Addr()) {
				return false
			}
		case "--dport", "--dports":
			in := slices.ContainsFunc(strings.Split(f[i+1], ","), func(s string) bool {
				var sp span
				if n, _ := fmt.Sscanf(s, "%d:%d", &sp.first, &sp.last); n == 1 {
					sp.last = sp.first
				}
				return sp.first <= dst.Port() && dst.Port() <= sp.last
			})
			if !in {
				return false
			}
		default:
			t.Fatalf("unexpected match %q", match)
		}
	}
	return true
}

// TestTreesMeanTheSame compares trees with the sets they were made of, for
// random sets of random sizes, and bounds the rules that a connection passes.
func TestTreesMeanTheSame(t *testing.T) {
	seed := rand.Uint64()
	if s := os.Getenv("TEST_SEED"); s != "" {
		if _, err := fmt.Sscan(s, &seed); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("TEST_SEED=%d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	for range 50 {
		w := goldenWorkload()
		v4 := rnd.IntN(2) == 0
		ports := make(map[uint16]bool)
		for range rnd.IntN(1000) {
			ports[uint16(1+rnd.IntN(3000))] = true
		}
		for p := range ports {
			w.Policy.Outbound.ExcludePorts.List = append(w.Policy.Outbound.ExcludePorts.List, p)
		}
		slices.Sort(w.Policy.Outbound.ExcludePorts.List)
		cidrs := make(map[netip.Prefix]bool)
		for range rnd.IntN(1000) {
			cidrs[randomPrefix(rnd, v4)] = true
		}
		for p := range cidrs {
			w.Policy.Outbound.ExcludeCIDRs.List = append(w.Policy.Outbound.ExcludeCIDRs.List, p)
		}
		addr := w.Addrs[1]
		if v4 {
			addr = w.Addrs[0]
		}
		nat := tables(w, addr, source(addr))[1]
		for range 200 {
			dst := netip.AddrPortFrom(randomAddr(rnd, v4), uint16(1+rnd.IntN(3100)))
			want := "SLUICE_OUT_CAPTURED"
			switch {
			case ports[dst.Port()]:
				want = "SLUICE_OUT_X_PORT"
			case slices.ContainsFunc(w.Policy.Outbound.ExcludeCIDRs.List, func(p netip.Prefix) bool { return p.Contains(dst.Addr()) }):
				want = "SLUICE_OUT_X_CIDR"
			}
			got, rules := walk(t, nat, dst)
			if got != want {
				t.Fatalf("%s with %d ports and %d prefixes: %s, want %s", dst, len(ports), len(cidrs), got, want)
			}
			if limit := 100; rules > limit {
				t.Errorf("%s with %d ports and %d prefixes: %d rules, more than %d", dst, len(ports), len(cidrs), rules, limit)
			}
		}
	}
}

// randomAddr returns an address out of a small space, so that prefixes meet it.
func randomAddr(rnd *rand.Rand, v4 bool) netip.Addr {
	if v4 {
		return netip.AddrFrom4([4]byte{100, byte(rnd.IntN(4)), byte(rnd.IntN(64)), byte(rnd.IntN(256))})
	}
	return netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, byte(rnd.IntN(4)), byte(rnd.IntN(64)), 15: byte(rnd.IntN(256))})
}

func randomPrefix(rnd *rand.Rand, v4 bool) netip.Prefix {
	a := randomAddr(rnd, v4)
	bits := 18 + rnd.IntN(15)
	if !v4 {
		bits = 42 + rnd.IntN(87)
	}
	return netip.PrefixFrom(a, bits).Masked()
}

func TestPortGroups(t *testing.T) {
	var singles []uint16
	for i := range 31 {
		singles = append(singles, uint16(1+2*i))
	}
	for _, g := range portGroups(singles) {
		if len(g) > multiportSlots {
			t.Errorf("%d ports in one rule", len(g))
		}
	}
	got := portGroups([]uint16{1, 2, 3, 65534, 65535})
	want := [][]span{{{1, 3}, {65534, 65535}}}
	if diff := gocmp.Diff(want, got, gocmp.AllowUnexported(span{})); diff != "" {
		t.Error(diff)
	}
}

func TestDisjoint(t *testing.T) {
	got := disjoint(prefixes("10.1.0.0/16", "10.0.0.0/8", "192.0.2.1/32", "2001:db8::/32", "192.0.2.0/24"), true)
	slices.SortFunc(got, func(a, b netip.Prefix) int { return cmp.Compare(a.String(), b.String()) })
	if diff := gocmp.Diff(prefixes("10.0.0.0/8", "192.0.2.0/24"), got, gocmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); diff != "" {
		t.Error(diff)
	}
}

func TestNames(t *testing.T) {
	w := goldenWorkload()
	for i := range 30000 {
		w.Policy.Outbound.ExcludePorts.List = append(w.Policy.Outbound.ExcludePorts.List, uint16(1+2*i))
	}
	const xtChainName = 28 // of the kernel's XT_FUNCTION_MAXNAMELEN 29
	for _, tb := range slices.Concat(tables(w, w.Addrs[0], source(w.Addrs[0])), hostTables(source(w.Addrs[0]), []string{"kubepods"}, w.Addrs)) {
		for _, c := range slices.Concat(tb.walk, tb.verdicts) {
			if len(c.name) > xtChainName || !strings.HasPrefix(c.name, chainPrefix) {
				t.Errorf("chain name %q", c.name)
			}
		}
	}
}

func TestParseSaved(t *testing.T) {
	s, foreign, err := parseSaved(`# Generated by iptables-nft-save
*nat
:PREROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [1:60]
:SLUICE_OUTPUT - [0:0]
:SLUICE_OUT_CAPTURED - [0:0]
[3:180] -A OUTPUT -p tcp -j SLUICE_OUTPUT
[7:420] -A SLUICE_OUT_CAPTURED -p tcp -j REDIRECT --to-ports 15001
COMMIT
*filter
:OUTPUT ACCEPT [0:0]
[0:0] -A OUTPUT -d 192.0.2.1/32 -j DROP
COMMIT
`)
	if err != nil {
		t.Fatal(err)
	}
	if !foreign {
		t.Error("the rule of another was not seen")
	}
	if got := s.packets("nat", "SLUICE_OUT_CAPTURED"); got != 7 {
		t.Errorf("counter is %d, want 7", got)
	}
	if got, want := removeText(s), `*nat
-D OUTPUT -p tcp -j SLUICE_OUTPUT
-F SLUICE_OUTPUT
-F SLUICE_OUT_CAPTURED
-X SLUICE_OUTPUT
-X SLUICE_OUT_CAPTURED
COMMIT
`; got != want {
		t.Errorf("removal is\n%s\nwant\n%s", got, want)
	}
	for _, bad := range []string{"*nat\n-A OUTPUT -j X\n", "*nat\n[1:2] something\n"} {
		if _, _, err := parseSaved(bad); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}
