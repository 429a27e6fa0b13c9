package translate

import (
	"cmp"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/sluicemesh/sluice/pkg/xds"
)

// httpOptionsKey is where a cluster looks for its HTTP protocol options.
const httpOptionsKey = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"

// cluster returns what all clusters have in common.
func (t *Translator) cluster(name string) *clusterv3.Cluster {
	return &clusterv3.Cluster{
		Name:           name,
		ConnectTimeout: durationpb.New(t.opts.ConnectTimeout),
		// Envoy's own limits are 1024 connections, pending requests and
		// requests, and 3 retries at a time; the application knows better.
		CircuitBreakers: &clusterv3.CircuitBreakers{Thresholds: []*clusterv3.CircuitBreakers_Thresholds{{
			MaxConnections:     u32(math.MaxUint32),
			MaxPendingRequests: u32(math.MaxUint32),
			MaxRequests:        u32(math.MaxUint32),
			MaxRetries:         u32(math.MaxUint32),
		}}},
		// Idle connections are never given up, so a peer that has vanished
		// without a word must be noticed. The application's own keepalive
		// ends at its proxy.
		UpstreamConnectionOptions: &clusterv3.UpstreamConnectionOptions{TcpKeepalive: keepalive()},
	}
}

func keepalive() *corev3.TcpKeepalive {
	return &corev3.TcpKeepalive{KeepaliveTime: u32(60), KeepaliveInterval: u32(15), KeepaliveProbes: u32(4)}
}

// serviceCluster balances over the endpoints of a service port.
func (t *Translator) serviceCluster(name string, p xds.Protocol) *clusterv3.Cluster {
	c := t.cluster(name)
	c.ClusterDiscoveryType = &clusterv3.Cluster_Type{Type: clusterv3.Cluster_EDS}
	c.EdsClusterConfig = &clusterv3.Cluster_EdsClusterConfig{EdsConfig: overADS(nil)}
	c.LbPolicy = clusterv3.Cluster_ROUND_ROBIN
	options := t.downstreamHTTP
	if p == xds.ProtocolHTTP2 || p == xds.ProtocolGRPC {
		options = t.http2
	}
	c.TypedExtensionProtocolOptions = map[string]*anypb.Any{httpOptionsKey: options}
	return c
}

// originalDst leads each connection to where the client wanted it to go.
func (t *Translator) originalDst(name string) *clusterv3.Cluster {
	c := t.cluster(name)
	c.ClusterDiscoveryType = &clusterv3.Cluster_Type{Type: clusterv3.Cluster_ORIGINAL_DST}
	c.LbPolicy = clusterv3.Cluster_CLUSTER_PROVIDED
	return c
}

// inbound leads to the pod's own application. The source address is how the
// data plane tells these connections from those that the proxy makes as a
// client, which must come back in through port 15006.
func (t *Translator) inbound(name string, addrs []netip.Addr) *clusterv3.Cluster {
	c := t.originalDst(name)
	bind := &corev3.BindConfig{}
	for _, a := range addrs {
		source := socketAddress(netip.AddrPortFrom(loopback(a), 0))
		if bind.SourceAddress == nil {
			bind.SourceAddress = source
			continue
		}
		bind.ExtraSourceAddresses = append(bind.ExtraSourceAddresses, &corev3.ExtraSourceAddress{Address: source})
	}
	c.UpstreamBindConfig = bind
	return c
}

// inboundPort is inbound for one port, which has only as many destinations as
// the pod has addresses: they are kept, instead of found again after 5 s.
func (t *Translator) inboundPort(port uint16, addrs []netip.Addr) *clusterv3.Cluster {
	c := t.inbound(InboundName(port), addrs)
	c.CleanupInterval = durationpb.New(24 * time.Hour)
	c.TypedExtensionProtocolOptions = map[string]*anypb.Any{httpOptionsKey: t.downstreamHTTP}
	return c
}

// loopback is the proxy's own loopback address in the family of a.
func loopback(a netip.Addr) netip.Addr {
	if a.Is4() {
		return netip.AddrFrom4([4]byte{127, 0, 0, 6})
	}
	return netip.AddrFrom16([16]byte{15: 6})
}

// endpoints groups by zone and sorts, whatever the order they came in.
func endpoints(name string, eps []xds.Endpoint) (*endpointv3.ClusterLoadAssignment, error) {
	eps = slices.Clone(eps)
	slices.SortFunc(eps, func(a, b xds.Endpoint) int {
		return cmp.Or(cmp.Compare(a.Zone, b.Zone), a.Addr.Compare(b.Addr))
	})
	eps = slices.Compact(eps)
	cla := &endpointv3.ClusterLoadAssignment{ClusterName: name}
	var bad error
	for i, ep := range eps {
		if !ep.Addr.IsValid() || ep.Addr.Port() == 0 {
			bad = fmt.Errorf("endpoint %s: no address and port", ep.Addr)
			continue
		}
		if n := len(cla.Endpoints); n == 0 || eps[i].Zone != cla.Endpoints[n-1].GetLocality().GetZone() {
			group := &endpointv3.LocalityLbEndpoints{}
			if ep.Zone != "" {
				group.Locality = &corev3.Locality{Zone: ep.Zone}
			}
			cla.Endpoints = append(cla.Endpoints, group)
		}
		group := cla.Endpoints[len(cla.Endpoints)-1]
		group.LbEndpoints = append(group.LbEndpoints, &endpointv3.LbEndpoint{
			HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{
				Address: address(ep.Addr),
			}},
		})
	}
	return cla, bad
}
