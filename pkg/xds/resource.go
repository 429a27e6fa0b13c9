package xds

import "google.golang.org/protobuf/types/known/anypb"

// Type URLs of the resources that are served, in the order in which additions
// are sent; removals go the other way round.
const (
	ClusterType  = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
	EndpointType = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
	ListenerType = "type.googleapis.com/envoy.config.listener.v3.Listener"
	RouteType    = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration"
)

// A Resource is one xDS resource, marshalled deterministically once and shared,
// read-only, by all pods of the node.
type Resource struct {
	TypeURL string
	Name    string
	// Version is the hash of the content, so that it survives a restart of
	// the agent. An endpoint resource's version also covers its cluster,
	// because Envoy needs the endpoints again when the cluster has changed.
	Version string
	Body    *anypb.Any
}
