package translate

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"

	"github.com/sluicemesh/sluice/pkg/xds"
)

// Pod returns what only the sidecar of p has: the listener of captured inbound
// connections and, for each declared port, a listener and a cluster. Beside
// them it needs Base(p.OutboundPolicy) and the services.
//
// The declared ports are listeners of their own, on the pod's addresses: when
// one comes or goes, the connections of the others are not drained.
func (t *Translator) Pod(p xds.Pod) ([]xds.Resource, error) {
	var out list
	err := checkAddrs(p.Addrs)
	if len(p.Addrs) == 0 {
		err = errors.New("it has no address")
	}
	if err != nil {
		return nil, fmt.Errorf("translate pod %s/%s: %w", p.Namespace, p.Name, err)
	}
	out.add(xds.ClusterType, InboundPassthroughCluster, t.inbound(InboundPassthroughCluster, p.Addrs))
	l, err := t.bound(InboundListener, xds.PortInbound, p.Addrs, corev3.TrafficDirection_INBOUND, InboundPassthroughCluster)
	if err != nil {
		out.fail(fmt.Errorf("translate %s: %w", InboundListener, err))
	} else {
		out.add(xds.ListenerType, InboundListener, l)
	}

	ports := slices.Clone(p.Inbound)
	slices.SortFunc(ports, func(a, b xds.InboundPort) int {
		return cmp.Or(cmp.Compare(a.Port, b.Port), cmp.Compare(a.Protocol, b.Protocol))
	})
	ports = slices.Compact(ports)
	for i, port := range ports {
		if err := t.inboundResources(&out, p, port, i > 0 && ports[i-1].Port == port.Port); err != nil {
			out.fail(fmt.Errorf("translate port %d of pod %s/%s: %w", port.Port, p.Namespace, p.Name, err))
		}
	}
	return out.result()
}

func (t *Translator) inboundResources(out *list, p xds.Pod, port xds.InboundPort, twice bool) error {
	switch port.Port {
	case 0, xds.PortAdmin, xds.PortOutbound, xds.PortInbound, xds.PortHealth:
		return errors.New("the port belongs to the sidecar")
	}
	if twice {
		return fmt.Errorf("protocol %s: another was given before", port.Protocol)
	}
	if err := checkProtocol(port.Protocol); err != nil {
		return err
	}
	name := InboundName(port.Port)
	http := t.hcm(corev3.TrafficDirection_INBOUND, "localhost")
	http.LocalReplyConfig = repeatableReply()
	http.RouteSpecifier = &hcmv3.HttpConnectionManager_RouteConfig{RouteConfig: inboundRoutes(name)}
	addrs := make([]netip.AddrPort, len(p.Addrs))
	for i, a := range p.Addrs {
		addrs[i] = netip.AddrPortFrom(a, port.Port)
	}
	l, err := t.virtual(name, addrs, corev3.TrafficDirection_INBOUND, port.Protocol, http, name, 1)
	if err != nil {
		return err
	}
	l.Metadata = metadata("Pod", p.Namespace, p.Name)
	cluster := t.inboundPort(port.Port, p.Addrs)
	cluster.Metadata = metadata("Pod", p.Namespace, p.Name)
	out.add(xds.ClusterType, name, cluster)
	out.add(xds.ListenerType, name, l)
	return nil
}

// inboundRoutes lead every request to the application. A connection that the
// application closed while idle is noticed before a request is sent on it, or
// the request is sent again on another if it was not. So is a stream that the
// application refused: its limit may be below upstreamStreams, which Envoy learns
// only once a connection is there.
func inboundRoutes(cluster string) *routev3.RouteConfiguration {
	return &routev3.RouteConfiguration{
		Name: cluster,
		VirtualHosts: []*routev3.VirtualHost{{
			Name:    cluster,
			Domains: []string{"*"},
			Routes: []*routev3.Route{{
				Name:  "default",
				Match: &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: "/"}},
				Action: &routev3.Route_Route{Route: &routev3.RouteAction{
					ClusterSpecifier: &routev3.RouteAction_Cluster{Cluster: cluster},
					Timeout:          never(),
					RetryPolicy: &routev3.RetryPolicy{
						RetryOn:      "refused-stream,reset-before-request",
						NumRetries:   u32(3),
						RetryBackOff: backOff(),
					},
				}},
			}},
		}},
	}
}

// repeatableReply marks the answers that Envoy gives in place of an application
// when the request may be sent to another one; see repeatableHeader.
//
//   - UF: there was no connection.
//   - UC: the application closed the connection before it answered, as it does
//     with idle ones when it ends, just when the next request was on its way. It
//     may have seen the request, so only idempotent ones are marked (RFC 9110,
//     9.2.2: a proxy may repeat these).
func repeatableReply() *hcmv3.LocalReplyConfig {
	mark := []*corev3.HeaderValueOption{setHeader(repeatableHeader, "1")}
	closed := &accesslogv3.AccessLogFilter{FilterSpecifier: &accesslogv3.AccessLogFilter_AndFilter{
		AndFilter: &accesslogv3.AndFilter{Filters: []*accesslogv3.AccessLogFilter{
			responseFlag("UC"),
			{FilterSpecifier: &accesslogv3.AccessLogFilter_HeaderFilter{HeaderFilter: &accesslogv3.HeaderFilter{
				Header: &routev3.HeaderMatcher{Name: ":method", HeaderMatchSpecifier: &routev3.HeaderMatcher_StringMatch{
					StringMatch: &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_SafeRegex{
						SafeRegex: &matcherv3.RegexMatcher{Regex: "GET|HEAD|OPTIONS|TRACE|PUT|DELETE"},
					}},
				}},
			}}},
		}},
	}}
	return &hcmv3.LocalReplyConfig{Mappers: []*hcmv3.ResponseMapper{
		{Filter: responseFlag("UF"), HeadersToAdd: mark},
		{Filter: closed, HeadersToAdd: mark},
	}}
}

func responseFlag(flag string) *accesslogv3.AccessLogFilter {
	return &accesslogv3.AccessLogFilter{FilterSpecifier: &accesslogv3.AccessLogFilter_ResponseFlagFilter{
		ResponseFlagFilter: &accesslogv3.ResponseFlagFilter{Flags: []string{flag}},
	}}
}
