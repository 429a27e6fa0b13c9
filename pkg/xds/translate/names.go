package translate

import (
	"fmt"

	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"

	"github.com/sluicemesh/sluice/pkg/xds"
)

// Names of resources that every sidecar has. Those of a service port are
// ServiceName, those of an inbound port InboundName.
const (
	// OutboundListener receives, on port 15001, what the pod's processes dial.
	OutboundListener = "outbound-15001"
	// InboundListener receives, on port 15006, what others dial in the pod.
	InboundListener = "inbound-15006"
	// ReadyListener answers /healthz/ready on port 15021.
	ReadyListener = "ready-15021"
	// PassthroughCluster leads to the original destination.
	PassthroughCluster = "passthrough"
	// InboundPassthroughCluster leads to the original destination, from the
	// proxy's own loopback address.
	InboundPassthroughCluster = "in-passthrough"
	// BlackholeCluster leads nowhere.
	BlackholeCluster = "blackhole"
	// InvalidCluster is the name of a cluster that never exists: requests that
	// are routed to it are answered 500.
	InvalidCluster = "invalid-backend"
)

// MetadataKey is the key of the filter metadata, fields kind, namespace and
// name, by which listeners, clusters and routes say which object they came of.
const MetadataKey = "sluice.dev"

// ServiceName is the name of the listener, the route configuration, the
// cluster and the endpoints of a service port.
func ServiceName(ref xds.ServicePortRef) string {
	return fmt.Sprintf("out/%s/%s/%d", ref.Namespace, ref.Name, ref.Port)
}

// InboundName is the name of the listener and the cluster of a port of the pod.
func InboundName(port uint16) string { return fmt.Sprintf("in/%d", port) }

// Empty returns what answers an Envoy that asks by name for endpoints or
// routes that do not exist: no endpoints, or routes that answer 404. Left
// without an answer, the cluster or listener that asks would never become
// ready. False means that resources of this type are not asked for by name.
func Empty(typeURL, name string) (xds.Resource, bool) {
	var m message
	switch typeURL {
	case xds.EndpointType:
		m = &endpointv3.ClusterLoadAssignment{ClusterName: name}
	case xds.RouteType:
		m = &routev3.RouteConfiguration{Name: name}
	default:
		return xds.Resource{}, false
	}
	r, err := resource(typeURL, name, m)
	return r, err == nil
}
