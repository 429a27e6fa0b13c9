package translate_test

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/sluicemesh/sluice/pkg/xds"
	"github.com/sluicemesh/sluice/pkg/xds/translate"
	"github.com/sluicemesh/sluice/tests/envoytest"
)

var update = flag.Bool("update", false, "write the goldens")

// A goldenCase is one object in all address families.
type goldenCase struct {
	name string
	make func(t *translate.Translator) ([]xds.Resource, error)
	// errs are parts of the error that comes beside the resources.
	errs []string
}

type family struct {
	name       string
	vips, pods []netip.Addr
}

func families() []family {
	v4, v6 := netip.MustParseAddr("10.96.0.10"), netip.MustParseAddr("fd00:96::10")
	p4, p6 := netip.MustParseAddr("10.244.1.5"), netip.MustParseAddr("fd00:244::5")
	return []family{
		{"v4", []netip.Addr{v4}, []netip.Addr{p4}},
		{"v6", []netip.Addr{v6}, []netip.Addr{p6}},
		{"dual", []netip.Addr{v4, v6}, []netip.Addr{p4, p6}},
	}
}

func goldenCases() []goldenCase {
	var cases []goldenCase
	for _, p := range []xds.OutboundPolicy{xds.OutboundPassthrough, xds.OutboundBlock} {
		cases = append(cases, goldenCase{
			name: "base-" + string(p),
			make: func(t *translate.Translator) ([]xds.Resource, error) { return t.Base(p) },
		})
	}
	for _, f := range families() {
		for _, p := range []xds.Protocol{xds.ProtocolAuto, xds.ProtocolTCP, xds.ProtocolHTTP, xds.ProtocolHTTP2, xds.ProtocolGRPC} {
			s := service(f, p)
			cases = append(cases, goldenCase{
				name: "service-" + string(p) + "-" + f.name,
				make: func(t *translate.Translator) ([]xds.Resource, error) { return t.Service(s) },
			})
		}
		headless := service(f, xds.ProtocolHTTP)
		headless.VIPs = nil
		cases = append(cases, goldenCase{
			name: "service-headless-" + f.name,
			make: func(t *translate.Translator) ([]xds.Resource, error) { return t.Service(headless) },
		}, goldenCase{
			name: "pod-" + f.name,
			make: func(t *translate.Translator) ([]xds.Resource, error) {
				return t.Pod(xds.Pod{
					UID: "uid", Namespace: "shop", Name: "reviews-1", Addrs: f.pods,
					Inbound: []xds.InboundPort{
						{Port: 9080, Protocol: xds.ProtocolHTTP},
						{Port: 3306, Protocol: xds.ProtocolTCP},
						{Port: 8080, Protocol: xds.ProtocolAuto},
						{Port: 7070, Protocol: xds.ProtocolGRPC},
					},
				})
			},
		})
	}
	v4 := families()[0]
	routed := service(v4, xds.ProtocolAuto)
	routed.Ports[0].Routes = matchRoutes()
	actions := service(v4, xds.ProtocolHTTP)
	actions.Ports[0].Routes = actionRoutes()
	broken := service(v4, xds.ProtocolHTTP)
	broken.Ports[0].Routes = brokenRoutes()
	return append(cases,
		goldenCase{
			name: "routes-matches",
			make: func(t *translate.Translator) ([]xds.Resource, error) { return t.Service(routed) },
		},
		goldenCase{
			name: "routes-actions",
			make: func(t *translate.Translator) ([]xds.Resource, error) { return t.Service(actions) },
		},
		goldenCase{
			name: "routes-broken",
			make: func(t *translate.Translator) ([]xds.Resource, error) { return t.Service(broken) },
			errs: []string{
				"HTTPRoute shop/broken for out/shop/reviews/80",
				`rule regex, match 0: path: regular expression "("`,
				`rule huge, match 0: header "x-a": regular expression of`,
				`rule type, match 0: query parameter "q": there is no match type "glob"`,
				`rule name, match 0: header "a b": the name is not a header's`,
				"rule value: request headers: header x-a",
				"rule host: response headers: header host can only be set",
				"rule filter: filter of type CORS is not served",
				"rule weights: the sum of the weights",
				"rule path, match 0:",
			},
		},
	)
}

// service has two endpoints in two zones, given out of order and one twice.
func service(f family, p xds.Protocol) xds.Service {
	var eps []xds.Endpoint
	for i := range f.pods {
		a := f.pods[len(f.pods)-1-i]
		eps = append(eps,
			xds.Endpoint{Addr: netip.AddrPortFrom(a.Next(), 9080), Zone: "b"},
			xds.Endpoint{Addr: netip.AddrPortFrom(a, 9080), Zone: "a"},
			xds.Endpoint{Addr: netip.AddrPortFrom(a.Next(), 9080), Zone: "b"})
	}
	return xds.Service{
		Namespace: "shop", Name: "reviews", VIPs: f.vips,
		Ports: []xds.ServicePort{{Name: "port", Port: 80, Protocol: p, Endpoints: eps}},
	}
}

func backend(name string, weight uint32) xds.HTTPBackend {
	return xds.HTTPBackend{Ref: xds.ServicePortRef{Namespace: "shop", Name: name, Port: 80}, Weight: weight}
}

func path(kind xds.MatchType, value string) *xds.StringMatch {
	return &xds.StringMatch{Type: kind, Value: value}
}

func named(name string, kind xds.MatchType, value string) xds.NamedMatch {
	return xds.NamedMatch{Name: name, StringMatch: xds.StringMatch{Type: kind, Value: value}}
}

// matchRoutes are given in the order opposite to their precedence.
func matchRoutes() []xds.HTTPRoute {
	t0 := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	to := func(name string, m ...xds.HTTPMatch) xds.HTTPRule {
		return xds.HTTPRule{Name: name, Matches: m, Backends: []xds.HTTPBackend{backend(name, 1)}}
	}
	return []xds.HTTPRoute{
		{Namespace: "shop", Name: "young", Created: t0.Add(time.Hour), Rules: []xds.HTTPRule{
			to("rest"),
			to("prefix", xds.HTTPMatch{Path: path(xds.MatchPrefix, "/a/")}),
			to("longer", xds.HTTPMatch{Path: path(xds.MatchPrefix, "/a/b")}),
			to("queries", xds.HTTPMatch{
				Path:    path(xds.MatchPrefix, "/a/b"),
				Queries: []xds.NamedMatch{named("q", xds.MatchExact, "1"), named("r", xds.MatchRegex, "x.*")},
			}),
			to("headers", xds.HTTPMatch{Path: path(xds.MatchPrefix, "/a/b"), Headers: []xds.NamedMatch{named("X-V", xds.MatchExact, "2")}}),
			to("cookie", xds.HTTPMatch{
				Path:    path(xds.MatchPrefix, "/a/b"),
				Headers: []xds.NamedMatch{named("cookie", xds.MatchRegex, "(.*; )?user=jason(;.*)?"), named("x-v", xds.MatchExact, "2")},
			}),
			to("method", xds.HTTPMatch{Path: path(xds.MatchPrefix, "/a/b"), Method: "PUT"}),
			to("regex", xds.HTTPMatch{Path: path(xds.MatchRegex, "/items/[0-9]+")}),
			to("exact", xds.HTTPMatch{Path: path(xds.MatchExact, "/a")}, xds.HTTPMatch{Path: path(xds.MatchExact, "/alias")}),
		}},
		{Namespace: "shop", Name: "old", Created: t0, Rules: []xds.HTTPRule{
			to("old-exact", xds.HTTPMatch{Path: path(xds.MatchExact, "/a")}),
		}},
	}
}

func actionRoutes() []xds.HTTPRoute {
	modifier := xds.HeaderModifier{
		Set:    []xds.Header{{Name: "X-Set", Value: "100%"}, {Name: "Host", Value: "other.example"}},
		Add:    []xds.Header{{Name: "x-add", Value: "a"}},
		Remove: []string{"x-remove"},
	}
	response := xds.HeaderModifier{Set: []xds.Header{{Name: "server", Value: "mine"}}, Remove: []string{"x-powered-by"}}
	modified := backend("v3", 5)
	modified.RequestHeaders, modified.ResponseHeaders = modifier, response
	invalid := backend("gone", 5)
	invalid.Invalid = true
	at := func(p string) []xds.HTTPMatch { return []xds.HTTPMatch{{Path: path(xds.MatchExact, p)}} }
	return []xds.HTTPRoute{{Namespace: "shop", Name: "actions", Rules: []xds.HTTPRule{
		{Name: "one", Matches: at("/one"), Backends: []xds.HTTPBackend{backend("v1", 7), backend("v2", 0)}},
		{Name: "split", Matches: at("/split"), Backends: []xds.HTTPBackend{backend("v1", 90), backend("v2", 10), modified, invalid}},
		{Name: "invalid", Matches: at("/invalid"), Backends: []xds.HTTPBackend{invalid}},
		{Name: "zero", Matches: at("/zero"), Backends: []xds.HTTPBackend{backend("v1", 0)}},
		{Name: "none", Matches: at("/none")},
		{Name: "headers", Matches: at("/headers"), RequestHeaders: modifier, ResponseHeaders: response, Backends: []xds.HTTPBackend{backend("v1", 1)}},
		{Name: "timeouts", Matches: at("/timeouts"), RequestTimeout: 3 * time.Second, BackendTimeout: time.Second, Backends: []xds.HTTPBackend{backend("v1", 1)}},
	}}}
}

func brokenRoutes() []xds.HTTPRoute {
	ok := []xds.HTTPBackend{backend("v1", 1)}
	header := func(m xds.NamedMatch) []xds.HTTPMatch { return []xds.HTTPMatch{{Headers: []xds.NamedMatch{m}}} }
	return []xds.HTTPRoute{
		{Namespace: "shop", Name: "broken", Rules: []xds.HTTPRule{
			{Name: "regex", Matches: []xds.HTTPMatch{{Path: path(xds.MatchRegex, "(")}, {Path: path(xds.MatchExact, "/kept")}}, Backends: ok},
			{Name: "huge", Matches: header(named("x-a", xds.MatchRegex, strings.Repeat("(a|b){999}", 5))), Backends: ok},
			{Name: "type", Matches: []xds.HTTPMatch{{Queries: []xds.NamedMatch{named("q", "glob", "*")}}}, Backends: ok},
			{Name: "name", Matches: header(named("a b", xds.MatchExact, "x")), Backends: ok},
			{Name: "path", Matches: []xds.HTTPMatch{{Path: path(xds.MatchPrefix, "/a?b")}}, Backends: ok},
			{Name: "value", RequestHeaders: xds.HeaderModifier{Set: []xds.Header{{Name: "x-a", Value: "a\r\nb"}}}, Backends: ok},
			{Name: "host", ResponseHeaders: xds.HeaderModifier{Remove: []string{"Host"}}, Backends: ok},
			{Name: "filter", Unsupported: "filter of type CORS is not served", Backends: ok},
			{Name: "weights", Backends: []xds.HTTPBackend{backend("v1", 1<<31), backend("v2", 1<<31)}},
		}},
		{Namespace: "shop", Name: "good", Rules: []xds.HTTPRule{
			{Matches: []xds.HTTPMatch{{Path: path(xds.MatchExact, "/good")}}, Backends: ok},
		}},
	}
}

func TestGolden(t *testing.T) {
	tr := newTranslator(t)
	for _, c := range goldenCases() {
		t.Run(c.name, func(t *testing.T) {
			got, err := c.make(tr)
			checkErrors(t, err, c.errs)
			text := render(t, got)
			file := filepath.Join("testdata", c.name+".json")
			if *update {
				if err := os.WriteFile(file, text, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(string(want), string(text)); d != "" {
				t.Errorf("%s differs (-want +got); -update accepts it:\n%s", file, d)
			}
		})
	}
	t.Run("no others", func(t *testing.T) {
		files, err := filepath.Glob("testdata/*.json")
		if err != nil {
			t.Fatal(err)
		}
		if len(files) != len(goldenCases()) {
			t.Errorf("%d files in testdata, %d cases", len(files), len(goldenCases()))
		}
	})
}

// TestGoldenAccepted asks the real Envoy about every golden.
func TestGoldenAccepted(t *testing.T) {
	files, err := filepath.Glob("testdata/*.json")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".json"), func(t *testing.T) {
			t.Parallel()
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			var resources []goldenResource
			if err := json.Unmarshal(b, &resources); err != nil {
				t.Fatal(err)
			}
			// As they are, then with everything inlined that Envoy would fetch.
			envoytest.Validate(t, static(t, resources, false))
			envoytest.Validate(t, static(t, resources, true))
		})
	}
}

func newTranslator(tb testing.TB) *translate.Translator {
	tb.Helper()
	tr, err := translate.New(translate.Options{})
	if err != nil {
		tb.Fatal(err)
	}
	return tr
}

func checkErrors(t *testing.T, err error, parts []string) {
	t.Helper()
	if err == nil {
		err = fmt.Errorf("none")
	} else if len(parts) == 0 {
		t.Fatalf("error %v", err)
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("the error does not say %q:\n%v", p, err)
		}
	}
}

// A goldenResource is a resource as a golden has it.
type goldenResource struct {
	Type string         `json:"type"`
	Name string         `json:"name"`
	Body map[string]any `json:"body"`
}

// render writes resources as JSON that is stable, which protojson's is not.
func render(t *testing.T, resources []xds.Resource) []byte {
	t.Helper()
	var all []goldenResource
	for _, r := range resources {
		all = append(all, toGolden(t, r))
	}
	var buf bytes.Buffer
	enc := json.NewEncoder(&buf)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false)
	if err := enc.Encode(all); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func toGolden(tb testing.TB, r xds.Resource) goldenResource {
	tb.Helper()
	m, err := r.Body.UnmarshalNew()
	if err != nil {
		tb.Fatal(err)
	}
	b, err := protojson.Marshal(m)
	if err != nil {
		tb.Fatal(err)
	}
	g := goldenResource{Type: r.TypeURL[strings.LastIndex(r.TypeURL, ".")+1:], Name: r.Name}
	if err := json.Unmarshal(b, &g.Body); err != nil {
		tb.Fatal(err)
	}
	return g
}

// static makes a bootstrap that has the resources as static ones. With inline,
// routes and endpoints are put where they would be fetched to.
func static(tb testing.TB, resources []goldenResource, inline bool) []byte {
	tb.Helper()
	byName := map[string]map[string]any{}
	for _, r := range resources {
		byName[r.Type+" "+r.Name] = r.Body
	}
	var boot map[string]any
	if err := json.Unmarshal(yamlToJSON(tb, xds.Bootstrap()), &boot); err != nil {
		tb.Fatal(err)
	}
	sr := boot["static_resources"].(map[string]any)
	if inline {
		delete(boot, "dynamic_resources")
	} else {
		dr := boot["dynamic_resources"].(map[string]any)
		delete(dr, "lds_config")
		delete(dr, "cds_config")
	}
	clusters, listeners := sr["clusters"].([]any), []any{}
	for _, r := range resources {
		switch r.Type {
		case "Cluster":
			if inline && r.Body["type"] == "EDS" {
				r.Body["type"] = "STATIC"
				delete(r.Body, "edsClusterConfig")
				r.Body["loadAssignment"] = byName["ClusterLoadAssignment "+r.Name]
			}
			clusters = append(clusters, r.Body)
		case "Listener":
			if inline {
				inlineRoutes(r.Body, byName)
			}
			listeners = append(listeners, r.Body)
		}
	}
	sr["clusters"], sr["listeners"] = clusters, listeners
	b, err := json.Marshal(boot)
	if err != nil {
		tb.Fatal(err)
	}
	return b
}

// inlineRoutes replaces every rds below v.
func inlineRoutes(v any, byName map[string]map[string]any) {
	switch v := v.(type) {
	case map[string]any:
		if rds, ok := v["rds"].(map[string]any); ok {
			v["routeConfig"] = byName["RouteConfiguration "+rds["routeConfigName"].(string)]
			delete(v, "rds")
		}
		for _, child := range v {
			inlineRoutes(child, byName)
		}
	case []any:
		for _, child := range v {
			inlineRoutes(child, byName)
		}
	}
}
