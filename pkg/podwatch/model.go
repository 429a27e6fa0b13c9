package podwatch

import (
	"net/netip"
	"time"
)

// A Kind is a kind of object.
type Kind string

// The kinds that a Store holds.
const (
	KindNode          Kind = "Node"
	KindNamespace     Kind = "Namespace"
	KindPod           Kind = "Pod"
	KindService       Kind = "Service"
	KindEndpointSlice Kind = "EndpointSlice"
	KindHTTPRoute     Kind = "HTTPRoute"
)

// A Key names one object. Namespace is empty for a Namespace and a Node.
type Key struct {
	Kind            Kind
	Namespace, Name string
}

// An Object is one of the typed objects below, always handled by pointer and
// never changed once it is in a Store.
type Object interface{ Key() Key }

// Meta is what all objects have.
type Meta struct {
	Namespace, Name string
	UID             string
	Created         time.Time
	Labels          map[string]string
	Annotations     map[string]string
	// Terminating is set once deletion was asked for.
	Terminating bool
}

// A Node is a Kubernetes Node.
type Node struct {
	Meta
	// Zone is the label topology.kubernetes.io/zone, empty if it has none.
	Zone string
}

// A Namespace is a Kubernetes Namespace.
type Namespace struct{ Meta }

// A Pod is a Kubernetes Pod.
type Pod struct {
	Meta
	// RuntimeUID is the UID that kubelet, runtime and CNI know the pod by. It is
	// Meta.UID, but for a static pod that of its file.
	RuntimeUID     string
	Node           string
	HostNetwork    bool
	ServiceAccount string
	Workload       Workload
	// Containers are the containers, init containers that restart (native
	// sidecars) included.
	Containers []Container
	// Addrs are the pod's addresses, empty until it has one.
	Addrs []netip.Addr
	// Ready is the pod's Ready condition.
	Ready bool
	// Finished is set in phases Succeeded and Failed.
	Finished bool
}

// A Container is a container of a pod.
type Container struct {
	Name  string
	Ports []ContainerPort
	// User is the user ID that the pod says it runs as; 0 if it says none, which
	// leaves that to the image, or says root.
	User int64
	// RuntimeID is the ID that the runtime gave the container when it last
	// started, empty until the pod's status names it.
	RuntimeID string
}

// A ContainerPort is a TCP port that a container declares.
type ContainerPort struct {
	Name string
	Port uint16
}

// A Service is a Kubernetes Service.
type Service struct {
	Meta
	// ClusterIPs is empty for headless services.
	ClusterIPs   []netip.Addr
	Headless     bool
	ExternalName string
	// Selector is empty for services whose endpoints others write.
	Selector map[string]string
	// Ports are the TCP ports.
	Ports                    []ServicePort
	PublishNotReadyAddresses bool
	InternalTrafficLocal     bool
}

// A ServicePort is a TCP port of a service.
type ServicePort struct {
	Name string
	Port uint16
	// TargetPort is a number, or the name of a container port if TargetName is set.
	TargetPort  uint16
	TargetName  string
	AppProtocol string
}

// An EndpointSlice is a Kubernetes EndpointSlice.
type EndpointSlice struct {
	Meta
	// Service is the service's name, from the label kubernetes.io/service-name.
	Service   string
	Ports     []EndpointPort
	Endpoints []Endpoint
}

// An EndpointPort is a TCP port of an EndpointSlice.
type EndpointPort struct {
	Name        string
	Port        uint16
	AppProtocol string
}

// An Endpoint is one backend of an EndpointSlice.
type Endpoint struct {
	Addrs       []netip.Addr
	Ready       bool
	Serving     bool
	Terminating bool
	Node        string
	Zone        string
	// ForZones and ForNodes are the hints: where this endpoint is best used
	// from. Empty if there is no hint.
	ForZones, ForNodes []string
	// Pod is the pod's name, if the target is a pod of the same namespace.
	Pod string
}

// An HTTPRoute is a Gateway API HTTPRoute (v1), as written: nothing resolved.
type HTTPRoute struct {
	Meta
	Parents []RouteParent
	Rules   []HTTPRouteRule
}

// A RouteParent is a Service that a route is attached to.
type RouteParent struct {
	Namespace, Name string
	// Port 0 means all ports, unless SectionName names one.
	Port        uint16
	SectionName string
}

// An HTTPRouteRule is one rule of an HTTPRoute.
type HTTPRouteRule struct {
	Name            string
	Matches         []HTTPRouteMatch
	RequestHeaders  HeaderModifier
	ResponseHeaders HeaderModifier
	Backends        []HTTPBackend
	RequestTimeout  time.Duration
	BackendTimeout  time.Duration
	// Unsupported names the filter that the rule has and Sluice cannot apply
	// ("filters[0]: URLRewrite"). The Gateway API has such a rule answer 500.
	Unsupported string
}

// MatchTypes of paths, headers and query parameters, as the Gateway API spells them.
const (
	MatchExact  = "Exact"
	MatchPrefix = "PathPrefix"
	MatchRegex  = "RegularExpression"
)

// An HTTPRouteMatch matches when all of its parts do.
type HTTPRouteMatch struct {
	// PathType is empty when every path matches.
	PathType, Path string
	Method         string
	Headers        []NamedMatch
	Queries        []NamedMatch
}

// A NamedMatch compares a header or query parameter.
type NamedMatch struct{ Type, Name, Value string }

// A HeaderModifier changes headers.
type HeaderModifier struct {
	Set, Add []Header
	Remove   []string
}

// A Header is a name and a value.
type Header struct{ Name, Value string }

// An HTTPBackend is a backendRef.
type HTTPBackend struct {
	// Group and Kind are "" and "Service" for all that can be served.
	Group, Kind     string
	Namespace, Name string
	Port            uint16
	Weight          uint32
	RequestHeaders  HeaderModifier
	ResponseHeaders HeaderModifier
	// Unsupported is as in HTTPRouteRule, for this backend's share.
	Unsupported string
}

// Key implements Object.
func (o *Node) Key() Key { return Key{Kind: KindNode, Name: o.Name} }

// Key implements Object.
func (o *Namespace) Key() Key { return Key{Kind: KindNamespace, Name: o.Name} }

// Key implements Object.
func (o *Pod) Key() Key { return Key{Kind: KindPod, Namespace: o.Namespace, Name: o.Name} }

// Key implements Object.
func (o *Service) Key() Key { return Key{Kind: KindService, Namespace: o.Namespace, Name: o.Name} }

// Key implements Object.
func (o *EndpointSlice) Key() Key {
	return Key{Kind: KindEndpointSlice, Namespace: o.Namespace, Name: o.Name}
}

// Key implements Object.
func (o *HTTPRoute) Key() Key { return Key{Kind: KindHTTPRoute, Namespace: o.Namespace, Name: o.Name} }
