package translate

import (
	"fmt"
	"net/netip"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	healthv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/health_check/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/sluicemesh/sluice/pkg/xds"
)

// connectAttempts bounds how many endpoints a TCP connection tries.
const connectAttempts = 3

// Base returns what every sidecar with this policy has, whatever the services
// and the pod: the listener of captured outbound connections, the clusters of
// those that no service answers for, and the readiness listener. The names are
// the same for both policies.
func (t *Translator) Base(p xds.OutboundPolicy) ([]xds.Resource, error) {
	var out list
	out.add(xds.ClusterType, PassthroughCluster, t.originalDst(PassthroughCluster))
	blackhole := t.cluster(BlackholeCluster)
	blackhole.ClusterDiscoveryType = &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC}
	out.add(xds.ClusterType, BlackholeCluster, blackhole)

	families := []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}
	if t.opts.IPv4Only {
		families = families[:1]
	}
	unknown := PassthroughCluster
	switch p {
	case "", xds.OutboundPassthrough:
	case xds.OutboundBlock:
		unknown = BlackholeCluster
	default:
		return nil, fmt.Errorf("translate outbound policy %q: there is none of this name", p)
	}
	l, err := t.bound(OutboundListener, xds.PortOutbound, families, corev3.TrafficDirection_OUTBOUND, unknown)
	if err != nil {
		out.fail(fmt.Errorf("translate %s: %w", OutboundListener, err))
	} else {
		out.add(xds.ListenerType, OutboundListener, l)
	}
	if l, err = t.ready(families); err != nil {
		out.fail(fmt.Errorf("translate %s: %w", ReadyListener, err))
	} else {
		out.add(xds.ListenerType, ReadyListener, l)
	}
	return out.result()
}

// ready answers readiness probes. That it listens at all says that Envoy has
// its listeners and clusters: workers start once all of the first ones are
// warm. It answers 503 after a POST to /healthcheck/fail.
func (t *Translator) ready(families []netip.Addr) (*listenerv3.Listener, error) {
	health, err := pack(&healthv3.HealthCheck{
		PassThroughMode: wrapperspb.Bool(false),
		Headers: []*routev3.HeaderMatcher{{
			Name: ":path",
			HeaderMatchSpecifier: &routev3.HeaderMatcher_StringMatch{StringMatch: &matcherv3.StringMatcher{
				MatchPattern: &matcherv3.StringMatcher_Exact{Exact: "/healthz/ready"},
			}},
		}},
	})
	if err != nil {
		return nil, err
	}
	filter, err := httpFilter(&hcmv3.HttpConnectionManager{
		StatPrefix: "ready",
		HttpFilters: []*hcmv3.HttpFilter{
			{Name: "health_check", ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: health}},
			t.router,
		},
		RouteSpecifier: &hcmv3.HttpConnectionManager_RouteConfig{RouteConfig: &routev3.RouteConfiguration{}},
	})
	if err != nil {
		return nil, err
	}
	l := t.socketListener(ReadyListener, xds.PortHealth, families)
	l.DefaultFilterChain = &listenerv3.FilterChain{Name: httpChain, Filters: []*listenerv3.Filter{filter}}
	return l, nil
}

// Service returns the resources of one service: for each port a cluster and its
// endpoints and, if the service has addresses, a listener and its routes. They
// depend on nothing but s.
func (t *Translator) Service(s xds.Service) ([]xds.Resource, error) {
	var out list
	vips := s.VIPs
	if err := checkAddrs(vips); err != nil {
		out.fail(fmt.Errorf("translate service %s/%s: %w", s.Namespace, s.Name, err))
		vips = nil
	}
	seen := map[uint16]bool{}
	for _, p := range s.Ports {
		if seen[p.Port] || p.Port == 0 {
			out.fail(fmt.Errorf("translate service %s/%s: port %d (%s) is zero or given twice", s.Namespace, s.Name, p.Port, p.Name))
			continue
		}
		seen[p.Port] = true
		t.servicePort(&out, s, vips, p)
	}
	return out.result()
}

func (t *Translator) servicePort(out *list, s xds.Service, vips []netip.Addr, p xds.ServicePort) {
	name := ServiceName(xds.ServicePortRef{Namespace: s.Namespace, Name: s.Name, Port: p.Port})
	protocol := p.Protocol
	if len(p.Routes) > 0 {
		switch protocol {
		case xds.ProtocolAuto:
			// Who attaches an HTTPRoute says that the port speaks HTTP; what
			// looked like something else would get around the routes.
			protocol = xds.ProtocolHTTP
		case xds.ProtocolTCP:
			out.fail(fmt.Errorf("translate %s: HTTP routes are attached to a port of protocol tcp", name))
		}
	}
	if err := checkProtocol(protocol); err != nil {
		out.fail(fmt.Errorf("translate %s: %w", name, err))
		return
	}

	cluster := t.serviceCluster(name, protocol)
	cluster.Metadata = metadata("Service", s.Namespace, s.Name)
	clusters := len(out.resources)
	out.add(xds.ClusterType, name, cluster)
	if len(out.resources) == clusters {
		return
	}
	cla, err := endpoints(name, p.Endpoints)
	if err != nil {
		out.fail(fmt.Errorf("translate %s: %w", name, err))
	}
	if r, err := resource(xds.EndpointType, name, cla); err != nil {
		out.fail(fmt.Errorf("translate endpoints of %s: %w", name, err))
	} else {
		r.Version = version(r.Body.Value, out.resources[clusters].Body.Value)
		out.resources = append(out.resources, r)
	}
	if len(vips) == 0 {
		return
	}

	addrs := make([]netip.AddrPort, len(vips))
	for i, vip := range vips {
		addrs[i] = netip.AddrPortFrom(vip, p.Port)
	}
	http := t.hcm(corev3.TrafficDirection_OUTBOUND, s.Name+"."+s.Namespace)
	http.RouteSpecifier = &hcmv3.HttpConnectionManager_Rds{Rds: &hcmv3.Rds{
		ConfigSource:    overADS(never()),
		RouteConfigName: name,
	}}
	l, err := t.virtual(name, addrs, corev3.TrafficDirection_OUTBOUND, protocol, http, name, connectAttempts)
	if err != nil {
		out.fail(fmt.Errorf("translate listener %s: %w", name, err))
		return
	}
	l.Metadata = metadata("Service", s.Namespace, s.Name)
	out.add(xds.ListenerType, name, l)
	if protocol == xds.ProtocolTCP {
		return
	}
	routes, err := t.routes(name, p.Routes)
	if err != nil {
		out.fail(err)
	}
	out.add(xds.RouteType, name, routes)
}

func checkProtocol(p xds.Protocol) error {
	switch p {
	case xds.ProtocolAuto, xds.ProtocolTCP, xds.ProtocolHTTP, xds.ProtocolHTTP2, xds.ProtocolGRPC:
		return nil
	}
	return fmt.Errorf("protocol %q is not known", p)
}
