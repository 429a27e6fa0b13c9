package podwatch

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// equateAddrs lets cmp compare addresses.
var equateAddrs = cmpopts.EquateComparable(netip.Addr{})

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

// parseFile parses a file of testdata.
func parseFile(t testing.TB, path string) []document {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("testdata", path))
	if err != nil {
		t.Fatal(err)
	}
	return newParser().parse(filepath.Base(path), data)
}

func TestParseGood(t *testing.T) {
	want := map[string][]Object{
		"good/shop.yaml": {
			&Namespace{Meta: Meta{Name: "shop", UID: "fixed", Labels: map[string]string{"sluice.dev/redirect": "enabled"}}},
			&Service{
				Meta:                 Meta{Namespace: "shop", Name: "details", UID: "d1"},
				ClusterIPs:           []netip.Addr{addr("10.96.0.10"), addr("fd00:96::10")},
				Selector:             map[string]string{"app": "details"},
				InternalTrafficLocal: true,
				Ports: []ServicePort{
					{Name: "http", Port: 80, TargetName: "web", AppProtocol: "http"},
					{Name: "admin", Port: 8081, TargetPort: 8081},
				},
			},
			&Pod{
				Meta: Meta{
					Namespace: "shop", Name: "details-1", UID: "fixed",
					Created:     time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
					Labels:      map[string]string{"app": "details", "built": "2026-01-01"},
					Annotations: map[string]string{"sluice.dev/exclude-outbound-ports": "3306"},
				},
				RuntimeUID: "fixed", Node: "n1", ServiceAccount: "details", Ready: true,
				Containers: []Container{{Name: "sluice-proxy"}, {Name: "app", Ports: []ContainerPort{{"web", 9080}}}},
				Addrs:      []netip.Addr{addr("10.1.0.4"), addr("fd00:1::4")},
			},
		},
		"good/list.json": {
			&Service{
				Meta: Meta{Namespace: "default", Name: "headless", UID: "fixed"}, Headless: true,
				PublishNotReadyAddresses: true, Ports: []ServicePort{{Port: 80, TargetPort: 80}},
			},
			&Service{Meta: Meta{Namespace: "default", Name: "elsewhere", UID: "fixed"}, ExternalName: "example.org"},
			&EndpointSlice{
				Meta: Meta{
					Namespace: "default", Name: "headless-1", UID: "fixed",
					Labels: map[string]string{"kubernetes.io/service-name": "headless"},
				},
				Service: "headless",
				Ports:   []EndpointPort{{Port: 8080}},
				Endpoints: []Endpoint{
					{Addrs: []netip.Addr{addr("192.0.2.1")}, Ready: true, Serving: true},
					{Addrs: []netip.Addr{addr("192.0.2.2")}, Serving: true, Terminating: true, Node: "n2", Zone: "z", Pod: "p"},
				},
			},
		},
		"good/zones.yaml": {
			&Node{Meta: Meta{Name: "n1", UID: "fixed", Labels: map[string]string{"topology.kubernetes.io/zone": "north"}}, Zone: "north"},
			&Node{Meta: Meta{Name: "n2.example.org", UID: "fixed"}},
			&EndpointSlice{
				Meta: Meta{
					Namespace: "default", Name: "web-1", UID: "fixed",
					Labels: map[string]string{"kubernetes.io/service-name": "web"},
				},
				Service: "web",
				Ports:   []EndpointPort{{Port: 80}},
				Endpoints: []Endpoint{{
					Addrs: []netip.Addr{addr("192.0.2.1")}, Ready: true, Serving: true, Zone: "north",
					ForZones: []string{"north", "south"}, ForNodes: []string{"n1"},
				}},
			},
			&Pod{
				Meta: Meta{
					Namespace: "default", Name: "dns-n1", UID: "a1",
					Annotations: map[string]string{"kubernetes.io/config.mirror": "c0ffee", "kubernetes.io/config.hash": "c0ffee"},
				},
				RuntimeUID: "c0ffee", Node: "n1", ServiceAccount: "default", Containers: []Container{{Name: "dns"}},
			},
		},
		"good/route.yaml": {
			&HTTPRoute{
				Meta:    Meta{Namespace: "shop", Name: "reviews", UID: "r1"},
				Parents: []RouteParent{{"shop", "reviews", 9080, ""}, {"other", "reviews", 0, "http"}},
				Rules: []HTTPRouteRule{
					{
						Name: "canary",
						Matches: []HTTPRouteMatch{{
							PathType: MatchExact, Path: "/reviews", Method: "GET",
							Headers: []NamedMatch{{MatchExact, "x-user", "jason"}},
							Queries: []NamedMatch{{MatchRegex, "v", "[0-9]+"}},
						}},
						RequestHeaders: HeaderModifier{Set: []Header{{"x-a", "1"}}, Add: []Header{{"x-b", "2"}}, Remove: []string{"x-c"}},
						Backends: []HTTPBackend{
							{
								Kind: "Service", Namespace: "shop", Name: "reviews-v2", Port: 9080, Weight: 90,
								ResponseHeaders: HeaderModifier{Add: []Header{{"x-version", "v2"}}},
							},
							{Kind: "Service", Namespace: "other", Name: "reviews-v3", Port: 9080},
						},
						RequestTimeout: 90 * time.Second, BackendTimeout: 500 * time.Millisecond,
					},
					{
						Matches:  []HTTPRouteMatch{{PathType: MatchPrefix, Path: "/"}},
						Backends: []HTTPBackend{{Kind: "Service", Namespace: "shop", Name: "reviews-v1", Port: 9080, Weight: 1}},
					},
				},
			},
		},
	}
	for file, objects := range want {
		t.Run(file, func(t *testing.T) {
			var got []Object
			for _, d := range parseFile(t, file) {
				for _, p := range d.problems {
					t.Errorf("problem: %v", p)
				}
				got = append(got, d.object)
			}
			// Where no UID is given any will do, as long as there is one; TestDerivedUID looks at them.
			uid := cmp.FilterPath(func(p cmp.Path) bool { return strings.HasSuffix(p.Last().String(), "UID") },
				cmp.Comparer(func(a, b string) bool { return a == b || a == "fixed" && b != "" || b == "fixed" && a != "" }))
			if diff := cmp.Diff(objects, got, equateAddrs, uid); diff != "" {
				t.Errorf("objects (-want +got):\n%s", diff)
			}
		})
	}
}

func TestDerivedUID(t *testing.T) {
	a := derivedUID(Key{KindPod, "shop", "web"})
	// A fixed value: agents of two versions have to agree too.
	if want := "b710232f-dfc2-8e18-a6f1-4d13c2c361a4"; a != want {
		t.Errorf("derivedUID = %q, want %q", a, want)
	}
	for _, other := range []Key{{KindService, "shop", "web"}, {KindPod, "shop", "we"}, {KindPod, "sho", "pweb"}} {
		if derivedUID(other) == a {
			t.Errorf("derivedUID(%v) is that of Pod shop/web", other)
		}
	}
}

// TestParseBad compares the problems of each testdata/bad/x.yaml with x.want,
// one problem a line.
func TestParseBad(t *testing.T) {
	files, err := filepath.Glob("testdata/bad/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("testdata/bad: %v, %v", files, err)
	}
	for _, path := range files {
		name := filepath.Base(path)
		t.Run(name, func(t *testing.T) {
			want, err := os.ReadFile(strings.TrimSuffix(path, ".yaml") + ".want")
			if err != nil {
				t.Fatal(err)
			}
			var got strings.Builder
			for _, d := range parseFile(t, "bad/"+name) {
				for _, p := range d.problems {
					got.WriteString(p.String() + "\n")
				}
			}
			if diff := cmp.Diff(string(want), got.String()); diff != "" {
				t.Errorf("problems (-want +got):\n%s", diff)
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	for _, pattern := range []string{"testdata/good/*", "testdata/bad/*.yaml"} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			f.Fatal(err)
		}
		for _, path := range files {
			data, err := os.ReadFile(path)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(filepath.Base(path), data)
		}
	}
	f.Add("a.yaml", []byte("a: &a [*a]"))
	f.Add("a.yaml", []byte("a: &a {<<: *a, b: *a}\n...\n---\n- x\n"))
	f.Fuzz(func(t *testing.T, name string, data []byte) {
		lines := 1
		for _, lineBreak := range []string{"\n", "\r", "\u0085", "\u2028", "\u2029"} { // of YAML 1.1
			lines += strings.Count(string(data), lineBreak)
		}
		for _, d := range newParser().parse(name, data) {
			if d.object == nil && len(d.problems) == 0 {
				t.Errorf("document in line %d is dropped without a word", d.line)
			}
			if d.object != nil && d.object.Key() != d.key {
				t.Errorf("document says %v, object %v", d.key, d.object.Key())
			}
			for _, p := range d.problems {
				if p.Line < 1 || p.Line > lines || p.Message == "" || p.File != name {
					t.Errorf("problem %+v in a file of %d lines", p, lines)
				}
			}
		}
	})
}

// TestDocumentedFiles reads what users are shown: the example of the reference
// page and the manifests of the demo.
func TestDocumentedFiles(t *testing.T) {
	page, err := os.ReadFile("../../docs/file-source.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(page), "```yaml\n")
	example, _, ok := strings.Cut(rest, "```")
	if !ok {
		t.Fatal("no example in docs/file-source.md")
	}
	files := map[string]string{"file-source.md": example}
	manifests, err := filepath.Glob("../../deploy/demo/manifests/*.yaml")
	if err != nil || len(manifests) == 0 {
		t.Fatalf("no manifests of the demo: %v", err)
	}
	for _, path := range manifests {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		files[filepath.Base(path)] = string(data)
	}
	for name, text := range files {
		docs := newParser().parse(name, []byte(text))
		if len(docs) == 0 {
			t.Errorf("%s holds nothing", name)
		}
		for _, d := range docs {
			for _, p := range d.problems {
				t.Errorf("problem: %v", p)
			}
		}
	}
}
