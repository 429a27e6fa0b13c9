package server

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	router "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/sluicemesh/sluice/pkg/xds"
	"github.com/sluicemesh/sluice/tests/envoytest"
	"github.com/sluicemesh/sluice/tests/need"
	"github.com/sluicemesh/sluice/tests/netnstest"
)

const envoyUID = 1337

// pack makes a resource of a message; extra is part of the version only.
func pack(t int, name string, m proto.Message, extra string) xds.Resource {
	body, err := anypb.New(m)
	if err != nil {
		panic(err)
	}
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		panic(err)
	}
	return xds.Resource{TypeURL: typeURLs[t], Name: name, Version: fmt.Sprintf("%x%s", hashOf(b), extra), Body: body}
}

func hashOf(b []byte) []byte {
	sum := digest([]*version{newVersion(xds.Resource{Version: string(b)})})
	return []byte(sum)
}

func emptyProto(typeURL, name string) (xds.Resource, bool) {
	switch typeURL {
	case xds.EndpointType:
		return pack(endpoints, name, &endpoint.ClusterLoadAssignment{ClusterName: name}, ""), true
	case xds.RouteType:
		return pack(routes, name, &route.RouteConfiguration{Name: name}, ""), true
	}
	return xds.Resource{}, false
}

func overADS() *core.ConfigSource {
	return &core.ConfigSource{
		ResourceApiVersion:    core.ApiVersion_V3,
		ConfigSourceSpecifier: &core.ConfigSource_Ads{Ads: &core.AggregatedConfigSource{}},
		InitialFetchTimeout:   durationpb.New(0), // forever: nothing may hang on a timeout of Envoy
	}
}

func address(ip string, port uint32) *core.Address {
	return &core.Address{Address: &core.Address_SocketAddress{SocketAddress: &core.SocketAddress{
		Address: ip, PortSpecifier: &core.SocketAddress_PortValue{PortValue: port},
	}}}
}

func edsCluster(name string, timeout time.Duration) *cluster.Cluster {
	return &cluster.Cluster{
		Name: name, ConnectTimeout: durationpb.New(timeout),
		ClusterDiscoveryType: &cluster.Cluster_Type{Type: cluster.Cluster_EDS},
		EdsClusterConfig:     &cluster.Cluster_EdsClusterConfig{EdsConfig: overADS()},
	}
}

func assignment(name, ip string, port uint32) *endpoint.ClusterLoadAssignment {
	return &endpoint.ClusterLoadAssignment{ClusterName: name, Endpoints: []*endpoint.LocalityLbEndpoints{{
		LbEndpoints: []*endpoint.LbEndpoint{{HostIdentifier: &endpoint.LbEndpoint_Endpoint{
			Endpoint: &endpoint.Endpoint{Address: address(ip, port)},
		}}},
	}}}
}

func httpListener(name string, port uint32) *listener.Listener {
	filter, err := anypb.New(&router.Router{})
	if err != nil {
		panic(err)
	}
	manager, err := anypb.New(&hcm.HttpConnectionManager{
		StatPrefix:     "test",
		RouteSpecifier: &hcm.HttpConnectionManager_Rds{Rds: &hcm.Rds{ConfigSource: overADS(), RouteConfigName: name}},
		HttpFilters:    []*hcm.HttpFilter{{Name: "router", ConfigType: &hcm.HttpFilter_TypedConfig{TypedConfig: filter}}},
	})
	if err != nil {
		panic(err)
	}
	return tcpListener(name, port, manager)
}

func tcpListener(name string, port uint32, filter *anypb.Any) *listener.Listener {
	return &listener.Listener{Name: name, Address: address("127.0.0.1", port), FilterChains: []*listener.FilterChain{{
		Filters: []*listener.Filter{{Name: "filter", ConfigType: &listener.Filter_TypedConfig{TypedConfig: filter}}},
	}}}
}

func routeTo(name, cluster string, domains ...string) *route.RouteConfiguration {
	return &route.RouteConfiguration{Name: name, VirtualHosts: []*route.VirtualHost{{
		Name: "all", Domains: append([]string{"*"}, domains...),
		Routes: []*route.Route{{
			Match: &route.RouteMatch{PathSpecifier: &route.RouteMatch_Prefix{Prefix: "/"}},
			Action: &route.Route_Route{Route: &route.RouteAction{
				ClusterSpecifier: &route.RouteAction_Cluster{Cluster: cluster},
			}},
		}},
	}}}
}

// A mesh is a service as real resources.
type mesh struct {
	name        string
	port        uint32 // of the listener
	backend     uint32
	backendIP   string
	timeout     time.Duration
	domains     []string
	filterless  bool // the listener has a filter that does not exist
	clusterless bool // neither cluster nor endpoints
}

func (m mesh) resources() []xds.Resource {
	l := httpListener(m.name, m.port)
	if m.filterless {
		l = tcpListener(m.name, m.port, &anypb.Any{TypeUrl: "type.googleapis.com/no.such.Filter"})
	}
	c := edsCluster(m.name, m.timeout)
	cr := pack(clusters, m.name, c, "")
	all := []xds.Resource{pack(listeners, m.name, l, ""), pack(routes, m.name, routeTo(m.name, m.name, m.domains...), "")}
	if !m.clusterless {
		all = append(all, cr, pack(endpoints, m.name, assignment(m.name, m.backendIP, m.backend), "+"+cr.Version))
	}
	return all
}

// serveHTTP answers with name at a port of the namespace.
func serveHTTP(t *testing.T, ns netnstest.Namespace, name string) uint32 {
	t.Helper()
	l, err := ns.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{
		ReadHeaderTimeout: patience,
		Handler:           http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, name) }),
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = srv.Serve(l) // until Close
	}()
	t.Cleanup(func() {
		_ = srv.Close()
		<-done
	})
	return uint32(l.Addr().(*net.TCPAddr).Port)
}

// ask returns what a GET through the listener at port is answered.
func ask(ctx context.Context, ns netnstest.Namespace, port uint32) string {
	client := http.Client{Timeout: patience, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			return ns.Dial(ctx, network, addr)
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://127.0.0.1:%d/", port), nil)
	if err != nil {
		return err.Error()
	}
	resp, err := client.Do(req)
	if err != nil {
		return err.Error()
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return err.Error()
	}
	if resp.StatusCode != http.StatusOK {
		return resp.Status
	}
	return string(b)
}

func inNetns(path string, f func() error) error { return netnstest.Namespace{Netns: path}.Do(f) }

// startReal runs a server for the pod in ns, with two services.
func startReal(t *testing.T, ns netnstest.Namespace, set func(*rig)) *rig {
	t.Helper()
	r := &rig{t: t, logs: &logs{}}
	s, err := New(Options{Log: slog.New(slog.NewTextHandler(r.logs, nil)), Empty: emptyProto, InNetns: inNetns})
	if err != nil {
		t.Fatal(err)
	}
	r.Server = s
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	var stopped bool
	r.stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	}
	t.Cleanup(r.stop)
	set(r)
	r.set("pod")
	r.SetReady()
	if err := s.Open("pod", ns.Netns, envoyUID); err != nil {
		t.Fatal(err)
	}
	return r
}

func (r *rig) synced() bool {
	s := r.Status()
	return len(s) == 1 && synced(s)
}

func (r *rig) rejected() (names []string) {
	for _, rej := range r.Status()[0].Rejected {
		t, _ := typeOf(rej.TypeURL)
		names = append(names, typeNames[t]+" "+rej.Name)
	}
	slices.Sort(names)
	return names
}

func TestRealEnvoy(t *testing.T) {
	need.Root(t)
	need.Envoy(t)
	ns := netnstest.New(t, "xds")
	one, two := serveHTTP(t, ns, "one"), serveHTTP(t, ns, "two")
	first := mesh{name: "first", port: 18001, backend: one, backendIP: "127.0.0.1", timeout: time.Second}
	second := mesh{name: "second", port: 18002, backend: two, backendIP: "127.0.0.1", timeout: time.Second}
	share := func(r *rig, all ...mesh) {
		for _, m := range all {
			r.SetShared("service/"+m.name, m.resources(), time.Now())
		}
	}
	r := startReal(t, ns, func(r *rig) { share(r, first, second) })

	// The socket serves the proxy only, not even root.
	if err := ns.Do(func() error {
		c, err := net.Dial("unix", "@sluice/xds")
		if err != nil {
			return err
		}
		defer func() { _ = c.Close() }()
		if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
			return err
		}
		if n, err := c.Read(make([]byte, 1)); n > 0 || err == nil || strings.Contains(err.Error(), "timeout") {
			return fmt.Errorf("served root: %d bytes, %w", n, err)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}

	envoy := envoytest.Start(t, envoytest.Options{Netns: ns.Netns, Config: xds.Bootstrap()})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := envoy.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	check := func(want ...string) {
		t.Helper()
		for i, w := range want {
			if got := ask(ctx, ns, uint32(18001+i)); got != w {
				t.Errorf("listener %d answered %q, want %q", i+1, got, w)
			}
		}
	}
	settle := func(rejected ...string) {
		t.Helper()
		r.until("Envoy has everything", r.synced)
		if diff := cmp.Diff(rejected, r.rejected()); diff != "" {
			t.Errorf("rejected resources (-want +got):\n%s", diff)
		}
		for _, rej := range r.Status()[0].Rejected {
			t.Logf("%s: %s", rej.Name, rej.Error)
		}
		if n := envoy.Stats(ctx, `^cluster_manager\.warming_clusters$`)["cluster_manager.warming_clusters"]; n != 0 {
			t.Errorf("%d clusters wait for endpoints", n)
		}
	}
	settle()
	check("one", "two")

	// A cluster that changes needs its endpoints again, changed or not.
	second.timeout = 2 * time.Second
	share(r, second)
	settle()
	check("one", "two")

	// Bad resources of every type beside good changes: only they are kept
	// back, and what they replace stays.
	bad := func(change func(m *mesh), want ...string) {
		t.Helper()
		m := first
		change(&m)
		second.timeout += time.Millisecond
		share(r, m, second)
		settle(want...)
		check("one", "two")
		share(r, first)
		settle()
	}
	bad(func(m *mesh) { m.filterless = true }, "listener first")
	bad(func(m *mesh) { m.port = second.port }, "listener first")
	bad(func(m *mesh) { m.backendIP = "no address" }, "endpoint first")
	bad(func(m *mesh) { m.domains = []string{"*"} }, "route first")
	bad(func(m *mesh) { m.timeout = -time.Second }, "cluster first")

	// A new agent: Envoy reconnects, and is sent nothing.
	r.stop()
	check("one", "two")
	r = startReal(t, ns, func(r *rig) { share(r, first, second) })
	r.until("Envoy has reconnected", func() bool { return r.synced() && len(r.Status()[0].Types) == numTypes })
	for ty, c := range r.metrics.pushes {
		if n := testutil.ToFloat64(c); n != 0 {
			t.Errorf("%v %s responses to an Envoy that had everything", n, typeNames[ty])
		}
	}
	check("one", "two")
	first.backend = two
	share(r, first)
	settle()
	check("two", "two")

	// A new service whose listener is bad, and one that is good.
	third := mesh{name: "third", port: 18003, backend: one, backendIP: "127.0.0.1", timeout: time.Second}
	fourth := mesh{name: "fourth", port: 18004, backend: two, backendIP: "127.0.0.1", timeout: time.Second, filterless: true}
	share(r, third, fourth)
	settle("listener fourth")
	check("two", "two", "one")
	r.SetShared("service/fourth", nil, time.Now())
	settle()

	// Removal: the cluster goes last, and nothing stalls.
	r.SetShared("service/third", nil, time.Now())
	r.until("the cluster has gone", func() bool {
		_, all, err := envoy.Get(ctx, "/clusters")
		if err != nil {
			t.Fatal(err)
		}
		return !bytes.Contains(all, []byte("third::"))
	})
}

// TestRealEnvoyWorld: an Envoy that asks for the state of the world is served
// the same changes, rejections and removals.
func TestRealEnvoyWorld(t *testing.T) {
	need.Root(t)
	ns := netnstest.New(t, "world")
	one, two := serveHTTP(t, ns, "one"), serveHTTP(t, ns, "two")
	first := mesh{name: "first", port: 18001, backend: one, backendIP: "127.0.0.1", timeout: time.Second}
	second := mesh{name: "second", port: 18002, backend: two, backendIP: "127.0.0.1", timeout: time.Second}
	r := startReal(t, ns, func(r *rig) {
		for _, m := range []mesh{first, second} {
			r.SetShared("service/"+m.name, m.resources(), time.Now())
		}
	})
	config := bytes.Replace(xds.Bootstrap(), []byte("DELTA_GRPC"), []byte("GRPC"), 1)
	if bytes.Equal(config, xds.Bootstrap()) {
		t.Fatal("the bootstrap does not ask for delta xDS")
	}
	envoy := envoytest.Start(t, envoytest.Options{Netns: ns.Netns, Config: config})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := envoy.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	answers := func(port uint32, want string) {
		t.Helper()
		r.until(fmt.Sprintf("port %d answers %q", port, want), func() bool { return ask(ctx, ns, port) == want })
	}
	answers(18001, "one")
	answers(18002, "two")

	// Endpoints and cluster change together.
	first.backend, first.timeout = two, 2*time.Second
	r.SetShared("service/first", first.resources(), time.Now())
	answers(18001, "two")

	// A bad listener is named; what it replaces stays, others change.
	bad := second
	bad.filterless = true
	r.SetShared("service/second", bad.resources(), time.Now())
	r.until("the bad listener is rejected", func() bool { return slices.Equal(r.rejected(), []string{"listener second"}) })
	first.backend = one
	r.SetShared("service/first", first.resources(), time.Now())
	answers(18001, "one")
	answers(18002, "two")

	r.SetShared("service/second", nil, time.Now())
	r.until("the removed service has gone", func() bool {
		_, all, err := envoy.Get(ctx, "/clusters")
		if err != nil {
			t.Fatal(err)
		}
		return !bytes.Contains(all, []byte("second::")) && len(r.rejected()) == 0
	})
	answers(18001, "one")
}
