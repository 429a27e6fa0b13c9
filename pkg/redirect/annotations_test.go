package redirect

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

var cmpPolicy = cmp.Options{cmpopts.EquateComparable(netip.Prefix{}), cmpopts.EquateEmpty()}

func cidrs(s ...string) CIDRs {
	var c CIDRs
	for _, p := range s {
		c.List = append(c.List, netip.MustParsePrefix(p))
	}
	return c
}

func TestParsePolicy(t *testing.T) {
	for _, tc := range []struct {
		name        string
		annotations map[string]string
		want        func(*Policy)
	}{
		{"none", nil, func(*Policy) {}},
		{"of others", map[string]string{"app": "x", "sidecar.istio.io/inject": "maybe", "x.sluice.dev/y": "z"}, func(*Policy) {}},
		{"for other parts", map[string]string{"sluice.dev/redirect": "enabled", "sluice.dev/outbound-policy": "x", "sluice.dev/injected": "true"}, func(*Policy) {}},
		{"accelerate", map[string]string{"sluice.dev/accelerate": " on "}, func(p *Policy) { p.Accelerate = AccelerateOn }},
		{"include inbound", map[string]string{"sluice.dev/include-inbound-ports": "8080, 80,8080"}, func(p *Policy) {
			p.Inbound.IncludePorts = Ports{List: []uint16{80, 8080}}
		}},
		{"include nothing inbound", map[string]string{"sluice.dev/include-inbound-ports": ""}, func(p *Policy) {
			p.Inbound.IncludePorts = Ports{}
		}},
		{"exclude inbound", map[string]string{"sluice.dev/exclude-inbound-ports": " 22 "}, func(p *Policy) {
			p.Inbound.ExcludePorts = Ports{List: []uint16{22}}
		}},
		{"include outbound ports", map[string]string{"sluice.dev/include-outbound-ports": "443"}, func(p *Policy) {
			p.Outbound.IncludePorts = Ports{List: []uint16{443}}
		}},
		{"include all outbound ports", map[string]string{"sluice.dev/include-outbound-ports": " * "}, func(p *Policy) {
			p.Outbound.IncludePorts = Ports{All: true}
		}},
		{"exclude outbound ports", map[string]string{"sluice.dev/exclude-outbound-ports": "65535,1"}, func(p *Policy) {
			p.Outbound.ExcludePorts = Ports{List: []uint16{1, 65535}}
		}},
		{"include nothing outbound", map[string]string{"sluice.dev/include-outbound-cidrs": "\t"}, func(p *Policy) {
			p.Outbound.IncludeCIDRs = CIDRs{}
		}},
		{"cidrs are masked, unmapped, sorted, single", map[string]string{"sluice.dev/include-outbound-cidrs": "fd00::1/8,10.1.2.3/8,::ffff:192.168.1.1/112,10.0.0.0/8"}, func(p *Policy) {
			p.Outbound.IncludeCIDRs = cidrs("10.0.0.0/8", "192.168.0.0/16", "fd00::/8")
		}},
		{"exclude cidrs", map[string]string{"sluice.dev/exclude-outbound-cidrs": "169.254.169.254/32"}, func(p *Policy) {
			p.Outbound.ExcludeCIDRs = cidrs("169.254.169.254/32")
		}},
		{"interfaces", map[string]string{"sluice.dev/exclude-interfaces": "net1, eth0.7,net1"}, func(p *Policy) {
			p.ExcludeInterfaces = []string{"eth0.7", "net1"}
		}},
		{"backend", map[string]string{"sluice.dev/backend": "iptables"}, func(p *Policy) { p.Backend = BackendIPTables }},
		{"proxy uid", map[string]string{"sluice.dev/proxy-uid": "2102"}, func(p *Policy) { p.ProxyUID = 2102 }},
		{"istio", map[string]string{
			"traffic.sidecar.istio.io/includeInboundPorts":     "*",
			"traffic.sidecar.istio.io/excludeInboundPorts":     "15020",
			"traffic.sidecar.istio.io/includeOutboundPorts":    "",
			"traffic.sidecar.istio.io/excludeOutboundPorts":    "3306,5432",
			"traffic.sidecar.istio.io/includeOutboundIPRanges": "10.0.0.0/8",
			"traffic.sidecar.istio.io/excludeOutboundIPRanges": "10.9.0.0/16",
			"traffic.sidecar.istio.io/excludeInterfaces":       "net1",
		}, func(p *Policy) {
			p.Inbound = InboundPolicy{IncludePorts: Ports{All: true}, ExcludePorts: Ports{List: []uint16{15020}}}
			p.Outbound = OutboundPolicy{
				ExcludePorts: Ports{List: []uint16{3306, 5432}},
				IncludeCIDRs: cidrs("10.0.0.0/8"),
				ExcludeCIDRs: cidrs("10.9.0.0/16"),
			}
			p.ExcludeInterfaces = []string{"net1"}
		}},
		{"ours before istio's", map[string]string{
			"traffic.sidecar.istio.io/excludeOutboundPorts": "1",
			"sluice.dev/exclude-outbound-ports":             "2",
		}, func(p *Policy) { p.Outbound.ExcludePorts = Ports{List: []uint16{2}} }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			want := DefaultPolicy()
			tc.want(&want)
			got, err := ParsePolicy(DefaultPolicy(), tc.annotations)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, got, cmpPolicy); diff != "" {
				t.Errorf("policy (-want +got):\n%s", diff)
			}
		})
	}
}

// Every annotation means the same in Istio's spelling.
func TestIstioMeansTheSame(t *testing.T) {
	base := DefaultPolicy()
	for _, a := range annotations() {
		if a.istio == "" {
			continue
		}
		for _, value := range []string{"", "7", "*", "7,8", "10.0.0.0/8, fd00::/8", "eth1", "7,", "bad value"} {
			ours, err1 := ParsePolicy(base, map[string]string{AnnotationPrefix + a.name: value})
			istio, err2 := ParsePolicy(base, map[string]string{IstioAnnotationPrefix + a.istio: value})
			if (err1 == nil) != (err2 == nil) {
				t.Errorf("%s=%q: %v; %s: %v", a.name, value, err1, a.istio, err2)
			}
			if diff := cmp.Diff(ours, istio, cmpPolicy); diff != "" {
				t.Errorf("%s=%q:\n%s", a.name, value, diff)
			}
		}
	}
}

func TestParsePolicyReplacesBase(t *testing.T) {
	base := DefaultPolicy()
	base.Inbound.ExcludePorts = Ports{List: []uint16{22, 23}}
	base.Outbound.ExcludeCIDRs = cidrs("10.0.0.0/8")
	got, err := ParsePolicy(base, map[string]string{"sluice.dev/exclude-inbound-ports": "9"})
	if err != nil {
		t.Fatal(err)
	}
	want := base
	want.Inbound.ExcludePorts = Ports{List: []uint16{9}}
	if diff := cmp.Diff(want, got, cmpPolicy); diff != "" {
		t.Errorf("policy (-want +got):\n%s", diff)
	}
	if !slices.Equal(base.Inbound.ExcludePorts.List, []uint16{22, 23}) {
		t.Errorf("base was changed: %v", base)
	}
}

func TestParsePolicyRefuses(t *testing.T) {
	const exclusion = `is not allowed in a list of exclusions; to capture nothing, set the list of inclusions to ""`
	for _, tc := range []struct{ key, value, want string }{
		{"sluice.dev/exclude-inbound-ports", "80,http", `"http": want a port from 1 to 65535`},
		{"sluice.dev/exclude-inbound-ports", "0", `"0": want a port from 1 to 65535`},
		{"sluice.dev/exclude-inbound-ports", "65536", `"65536": want a port from 1 to 65535`},
		{"sluice.dev/exclude-inbound-ports", "-1", `"-1": want a port from 1 to 65535; a range must be written port by port`},
		{"sluice.dev/exclude-inbound-ports", "8000-8010", `"8000-8010": want a port from 1 to 65535; a range must be written port by port`},
		{"sluice.dev/exclude-inbound-ports", "80,", `"80,": there is nothing before, after or between two commas`},
		{"sluice.dev/exclude-inbound-ports", "*", `"*": ` + exclusion},
		{"sluice.dev/include-inbound-ports", "80,*", `"*": must stand alone`},
		{"traffic.sidecar.istio.io/excludeOutboundIPRanges", "*", `"*": ` + exclusion},
		{"sluice.dev/include-outbound-cidrs", "10.0.0.0/33", `"10.0.0.0/33": want an IPv4 or IPv6 range such as 10.0.0.0/8 or fd00::/8`},
		{"sluice.dev/include-outbound-cidrs", "10.1.2.3", `"10.1.2.3": want an IPv4 or IPv6 range such as 10.0.0.0/8 or fd00::/8; for the one address, write 10.1.2.3/32`},
		{"sluice.dev/include-outbound-cidrs", "fd00::1", `"fd00::1": want an IPv4 or IPv6 range such as 10.0.0.0/8 or fd00::/8; for the one address, write fd00::1/128`},
		{"sluice.dev/include-outbound-cidrs", "example.org", `"example.org": want an IPv4 or IPv6 range such as 10.0.0.0/8 or fd00::/8`},
		{"sluice.dev/include-outbound-cidrs", "::ffff:10.0.0.0/90", `"::ffff:10.0.0.0/90": a range of IPv4 addresses written as IPv6 needs a length of 96 or more; write it as IPv4`},
		{"sluice.dev/exclude-interfaces", "eth+", `"eth+": want the name of an interface: letters, digits and ._- only`},
		{"sluice.dev/exclude-interfaces", "a234567890123456", `"a234567890123456": want the name of an interface, at most 15 characters`},
		{"sluice.dev/exclude-interfaces", "..", `"..": want the name of an interface, at most 15 characters`},
		{"sluice.dev/backend", "ebfp", `"ebfp": want auto, ebpf or iptables`},
		{"sluice.dev/accelerate", "yes", `"yes": want auto, on or off`},
		{"sluice.dev/backend", "", `want auto, ebpf or iptables`},
		{"sluice.dev/proxy-uid", "root", `"root": want a user ID from 1 to 4294967294`},
		{"sluice.dev/proxy-uid", "0", `"0": want a user ID from 1 to 4294967294`},
		{"sluice.dev/proxy-uid", "4294967295", `"4294967295": want a user ID from 1 to 4294967294`},
		{"sluice.dev/exclude-outbound-port", "80", `Sluice does not know this annotation; did you mean sluice.dev/exclude-outbound-ports?`},
		{"sluice.dev/excludeOutboundPorts", "80", `Sluice does not know this annotation; did you mean sluice.dev/exclude-outbound-ports?`},
		{"sluice.dev/exclude-outbound-ip-ranges", "", `Sluice does not know this annotation; did you mean sluice.dev/exclude-outbound-cidrs?`},
		{"sluice.dev/redirects", "", `Sluice does not know this annotation; did you mean sluice.dev/redirect?`},
		{"sluice.dev/colour", "", `Sluice does not know this annotation`},
		{"traffic.sidecar.istio.io/excludeInboundPort", "", `Sluice does not know this annotation; did you mean traffic.sidecar.istio.io/excludeInboundPorts?`},
		{"traffic.sidecar.istio.io/exclude-inbound-ports", "", `Sluice does not know this annotation; did you mean traffic.sidecar.istio.io/excludeInboundPorts?`},
		{"traffic.sidecar.istio.io/kubevirtInterfaces", "x", `Sluice does not know this annotation`},
	} {
		t.Run(tc.key+"="+tc.value, func(t *testing.T) {
			base := DefaultPolicy()
			got, err := ParsePolicy(base, map[string]string{tc.key: tc.value})
			if err == nil || err.Error() != tc.key+": "+tc.want {
				t.Errorf("got  %v\nwant %s: %s", err, tc.key, tc.want)
			}
			if diff := cmp.Diff(base, got, cmpPolicy); diff != "" {
				t.Errorf("policy is not base:\n%s", diff)
			}
		})
	}
}

func TestParsePolicyReportsAllAtOnce(t *testing.T) {
	_, err := ParsePolicy(DefaultPolicy(), map[string]string{
		"sluice.dev/exclude-inbound-ports":              "80,x,90,y",
		"sluice.dev/backend":                            "nft",
		"sluice.dev/bakend":                             "ebpf",
		"traffic.sidecar.istio.io/excludeInboundPorts":  "z", // replaced, and still wrong
		"traffic.sidecar.istio.io/includeOutboundPorts": "80",
	})
	var all AnnotationErrors
	if !errors.As(err, &all) {
		t.Fatalf("got %#v", err)
	}
	var got []string
	for _, e := range all {
		got = append(got, e.Key+" "+e.Token)
	}
	want := []string{
		"sluice.dev/backend nft",
		"sluice.dev/bakend ",
		"sluice.dev/exclude-inbound-ports x",
		"sluice.dev/exclude-inbound-ports y",
		"traffic.sidecar.istio.io/excludeInboundPorts z",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("refused (-want +got):\n%s", diff)
	}
	if strings.Count(err.Error(), "; ") < len(want)-1 || strings.Contains(err.Error(), "\n") {
		t.Errorf("not one line with all of them: %v", err)
	}
	var one *AnnotationError
	if !errors.As(err, &one) || one.Key != want[0][:strings.Index(want[0], " ")] {
		t.Errorf("errors.As finds %v", one)
	}
}

func TestCaptureEnabled(t *testing.T) {
	m := func(v string) map[string]string { return map[string]string{RedirectKey: v} }
	app, sluice, istio := []string{"app"}, []string{"app", "sluice-proxy"}, []string{"istio-proxy", "app"}
	for _, tc := range []struct {
		name                string
		pod, annotation, ns map[string]string
		containers          []string
		want                bool
		err                 string
	}{
		{name: "nothing"},
		{name: "no proxy", containers: app},
		{name: "our proxy", containers: sluice, want: true},
		{name: "istio's proxy", containers: istio, want: true},
		{name: "namespace on", ns: m("enabled"), containers: app, want: true},
		{name: "namespace off", ns: m("disabled"), containers: sluice},
		{name: "annotation beats namespace", annotation: m("enabled"), ns: m("disabled"), want: true},
		{name: "label beats annotation", pod: m("disabled"), annotation: m("enabled"), containers: sluice},
		{name: "label beats namespace", pod: m("enabled"), ns: m("disabled"), want: true},
		{name: "wrong label", pod: m("on"), err: `label of the pod: sluice.dev/redirect: "on": want enabled or disabled`},
		{name: "empty label", pod: m(""), err: `label of the pod: sluice.dev/redirect: is empty: want enabled or disabled`},
		{name: "wrong annotation", annotation: m("true"), err: `annotation of the pod: sluice.dev/redirect: "true": want enabled or disabled`},
		{name: "wrong namespace", ns: m("Enabled"), err: `label of the namespace: sluice.dev/redirect: "Enabled": want enabled or disabled`},
		{name: "wrong namespace overruled", pod: m("enabled"), ns: m("?"), want: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := CaptureEnabled(tc.pod, tc.annotation, tc.ns, tc.containers)
			if tc.err != "" {
				var a *AnnotationError
				if err == nil || err.Error() != tc.err || !errors.As(err, &a) {
					t.Errorf("got error %v, want %s", err, tc.err)
				}
				return
			}
			if err != nil || got != tc.want {
				t.Errorf("got %v, %v, want %v", got, err, tc.want)
			}
		})
	}
}

// The table that users read lists exactly what the code reads.
func TestDocumentedAnnotations(t *testing.T) {
	doc, err := os.ReadFile(filepath.Join("..", "..", "docs", "annotations.md"))
	if err != nil {
		t.Fatal(err)
	}
	row := regexp.MustCompile("(?m)^\\| `sluice\\.dev/([a-z-]+)` \\| (?:`([A-Za-z]+)`|none) \\|")
	var got, want [][2]string
	for _, m := range row.FindAllStringSubmatch(string(doc), -1) {
		got = append(got, [2]string{m[1], m[2]})
	}
	for _, a := range annotations() {
		want = append(want, [2]string{a.name, a.istio})
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("docs/annotations.md lists\n%v\nthe code reads\n%v", got, want)
	}
	for _, name := range foreignAnnotations() {
		if !strings.Contains(string(doc), "`"+AnnotationPrefix+name+"`") {
			t.Errorf("docs/annotations.md does not mention %s%s", AnnotationPrefix, name)
		}
	}
}

// Whatever the value: no panic, errors name the key, and what is accepted keeps
// the promises of Ports, CIDRs and Policy and survives being written back.
func FuzzAnnotations(f *testing.F) {
	for i := range annotations() {
		for _, v := range []string{"", "*", "80, 443,80", "8000-8010", "10.1.2.3/8,fd00::/8,::ffff:1.2.3.4/120", "eth0,net1", "ebpf", "1337", ",", " "} {
			f.Add(i, v, "sluice.dev/exclude-outbound-port")
		}
	}
	table := annotations()
	f.Fuzz(func(t *testing.T, i int, value, unknown string) {
		a := table[uint(i)%uint(len(table))]
		key := AnnotationPrefix + a.name
		p, err := ParsePolicy(DefaultPolicy(), map[string]string{key: value})
		if err != nil {
			if !strings.HasPrefix(err.Error(), key+": ") {
				t.Errorf("%q: error does not name %s: %v", value, key, err)
			}
		} else {
			checkPolicy(t, p)
		}
		if _, err := ParsePolicy(DefaultPolicy(), map[string]string{AnnotationPrefix + unknown: value}); err == nil &&
			!slices.Contains(foreignAnnotations(), unknown) &&
			!slices.ContainsFunc(table, func(a annotation) bool { return a.name == unknown }) {
			t.Errorf("%s%s passed", AnnotationPrefix, unknown)
		}
	})
}

func checkPolicy(t *testing.T, p Policy) {
	t.Helper()
	for _, ports := range []Ports{p.Inbound.IncludePorts, p.Inbound.ExcludePorts, p.Outbound.IncludePorts, p.Outbound.ExcludePorts} {
		if ports.All && len(ports.List) > 0 || slices.Contains(ports.List, 0) || !sortedSet(ports.List, func(a, b uint16) int { return int(a) - int(b) }) {
			t.Errorf("ports %v", ports)
		}
	}
	for _, c := range []CIDRs{p.Outbound.IncludeCIDRs, p.Outbound.ExcludeCIDRs} {
		if c.All && len(c.List) > 0 || !sortedSet(c.List, netip.Prefix.Compare) {
			t.Errorf("CIDRs %v", c)
		}
		for _, x := range c.List {
			if x != x.Masked() || x.Addr().Is4In6() {
				t.Errorf("prefix %v", x)
			}
		}
	}
	if !sortedSet(p.ExcludeInterfaces, strings.Compare) || slices.Contains(p.ExcludeInterfaces, "") {
		t.Errorf("interfaces %q", p.ExcludeInterfaces)
	}
	if p.ProxyUID == 0 || !slices.Contains([]Backend{BackendAuto, BackendEBPF, BackendIPTables}, p.Backend) {
		t.Errorf("policy %+v", p)
	}
}

func sortedSet[T comparable](s []T, compare func(a, b T) int) bool {
	return slices.IsSortedFunc(s, compare) && len(slices.Compact(slices.Clone(s))) == len(s)
}
