package translate_test

import (
	"net/netip"
	"strings"
	"testing"

	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"sigs.k8s.io/yaml"

	"github.com/sluicemesh/sluice/pkg/xds"
	"github.com/sluicemesh/sluice/pkg/xds/translate"
)

func yamlToJSON(tb testing.TB, b []byte) []byte {
	tb.Helper()
	out, err := yaml.YAMLToJSON(b)
	if err != nil {
		tb.Fatal(err)
	}
	return out
}

func TestEqualInputEqualBytes(t *testing.T) {
	for _, c := range goldenCases() {
		a, _ := c.make(newTranslator(t)) // errors are TestGolden's
		b, _ := c.make(newTranslator(t))
		if d := cmp.Diff(a, b, protocmp.Transform()); d != "" {
			t.Errorf("%s: two runs differ:\n%s", c.name, d)
		}
		for i := range a {
			if string(a[i].Body.Value) != string(b[i].Body.Value) {
				t.Errorf("%s: %s has other bytes", c.name, a[i].Name)
			}
		}
	}
}

func TestVersions(t *testing.T) {
	tr := newTranslator(t)
	versions := func(s xds.Service) map[string]string {
		t.Helper()
		rs, err := tr.Service(s)
		if err != nil {
			t.Fatal(err)
		}
		out := map[string]string{}
		for _, r := range rs {
			out[r.TypeURL[strings.LastIndex(r.TypeURL, ".")+1:]] = r.Version
		}
		return out
	}
	changed := func(a, b map[string]string) []string {
		var out []string
		for _, k := range []string{"Cluster", "ClusterLoadAssignment", "Listener", "RouteConfiguration"} {
			if a[k] != b[k] {
				out = append(out, k)
			}
		}
		return out
	}
	base := service(families()[0], xds.ProtocolHTTP)
	before := versions(base)

	other := service(families()[0], xds.ProtocolHTTP)
	other.Ports[0].Endpoints = other.Ports[0].Endpoints[:1]
	if d := cmp.Diff([]string{"ClusterLoadAssignment"}, changed(before, versions(other))); d != "" {
		t.Errorf("an endpoint left: %s", d)
	}
	other = service(families()[0], xds.ProtocolHTTP)
	other.Ports[0].Routes = actionRoutes()
	if d := cmp.Diff([]string{"RouteConfiguration"}, changed(before, versions(other))); d != "" {
		t.Errorf("routes were attached: %s", d)
	}
	// Envoy asks for the endpoints of a changed cluster again: their version
	// must change although they did not.
	if d := cmp.Diff([]string{"Cluster", "ClusterLoadAssignment"}, changed(before, versions(service(families()[0], xds.ProtocolHTTP2)))); d != "" {
		t.Errorf("the protocol changed: %s", d)
	}
}

func TestServiceBestEffort(t *testing.T) {
	s := service(families()[0], xds.ProtocolHTTP)
	good := s.Ports[0]
	s.Ports = []xds.ServicePort{
		{Port: 0, Protocol: xds.ProtocolTCP},
		{Port: 81, Protocol: "carrier-pigeon"},
		good,
		good,
		{Port: 82, Protocol: xds.ProtocolTCP, Routes: actionRoutes(), Endpoints: []xds.Endpoint{{}}},
	}
	rs, err := newTranslator(t).Service(s)
	checkErrors(t, err, []string{
		"service shop/reviews: port 0", "service shop/reviews: port 80", `out/shop/reviews/81: protocol "carrier-pigeon"`,
		"out/shop/reviews/82: HTTP routes", "out/shop/reviews/82: endpoint invalid",
	})
	var names []string
	for _, r := range rs {
		names = append(names, r.TypeURL[strings.LastIndex(r.TypeURL, ".")+1:]+" "+r.Name)
	}
	want := []string{
		"Cluster out/shop/reviews/80", "ClusterLoadAssignment out/shop/reviews/80", "Listener out/shop/reviews/80", "RouteConfiguration out/shop/reviews/80",
		"Cluster out/shop/reviews/82", "ClusterLoadAssignment out/shop/reviews/82", "Listener out/shop/reviews/82",
	}
	if d := cmp.Diff(want, names); d != "" {
		t.Error(d)
	}
}

func TestPodRefuses(t *testing.T) {
	tr := newTranslator(t)
	p := xds.Pod{Namespace: "shop", Name: "p", Addrs: families()[0].pods, Inbound: []xds.InboundPort{
		{Port: 15006, Protocol: xds.ProtocolTCP},
		{Port: 80, Protocol: xds.ProtocolHTTP},
		{Port: 80, Protocol: xds.ProtocolTCP},
		{Port: 80, Protocol: xds.ProtocolHTTP},
		{Port: 81, Protocol: "x"},
	}}
	rs, err := tr.Pod(p)
	checkErrors(t, err, []string{"port 15006 of pod shop/p", "port 80 of pod shop/p: protocol tcp", `port 81 of pod shop/p: protocol "x"`})
	if len(rs) != 4 { // 15006, its passthrough, port 80's listener and cluster
		t.Errorf("%d resources, want 4", len(rs))
	}
	for _, addrs := range [][]netip.Addr{nil, {netip.IPv4Unspecified()}, {{}}, {netip.MustParseAddr("::ffff:10.0.0.1")}, {netip.MustParseAddr("fe80::1%eth0")}} {
		p.Addrs = addrs
		if rs, err := tr.Pod(p); err == nil || rs != nil {
			t.Errorf("addresses %v: %d resources and no error", addrs, len(rs))
		}
	}
}

func TestBaseIPv4Only(t *testing.T) {
	tr, err := translate.New(translate.Options{IPv4Only: true, NoAccessLog: true})
	if err != nil {
		t.Fatal(err)
	}
	rs, err := tr.Base("")
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range rs {
		if r.TypeURL != xds.ListenerType {
			continue
		}
		var l listenerv3.Listener
		if err := proto.Unmarshal(r.Body.Value, &l); err != nil {
			t.Fatal(err)
		}
		if got := l.GetAddress().GetSocketAddress().GetAddress(); got != "0.0.0.0" || len(l.AdditionalAddresses) > 0 {
			t.Errorf("%s listens on %s and %v", r.Name, got, l.AdditionalAddresses)
		}
		if strings.Contains(string(r.Body.Value), "access_loggers") {
			t.Errorf("%s has an access log", r.Name)
		}
	}
	if _, err := tr.Base("other"); err == nil {
		t.Error("no error for a policy that does not exist")
	}
}

func TestEmpty(t *testing.T) {
	for _, typeURL := range []string{xds.EndpointType, xds.RouteType} {
		r, ok := translate.Empty(typeURL, "out/shop/gone/80")
		if !ok || r.Name != "out/shop/gone/80" || r.TypeURL != typeURL || r.Version == "" || r.Body.GetTypeUrl() != typeURL {
			t.Errorf("Empty(%s) = %+v, %t", typeURL, r, ok)
		}
	}
	if _, ok := translate.Empty(xds.ClusterType, "x"); ok {
		t.Error("clusters are not asked for by name")
	}
}

func TestNew(t *testing.T) {
	if _, err := translate.New(translate.Options{ConnectTimeout: -1}); err == nil {
		t.Error("no error for a negative timeout")
	}
}

func BenchmarkService(b *testing.B) {
	tr := newTranslator(b)
	s := service(families()[2], xds.ProtocolHTTP)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := tr.Service(s); err != nil {
			b.Fatal(err)
		}
	}
}
