package xds

import (
	"net/netip"
	"time"
)

// A Protocol says how the sidecars treat a port.
type Protocol string

// The protocols. ProtocolAuto looks at the first bytes of the client.
const (
	ProtocolAuto  Protocol = "auto"
	ProtocolTCP   Protocol = "tcp"
	ProtocolHTTP  Protocol = "http"
	ProtocolHTTP2 Protocol = "http2"
	ProtocolGRPC  Protocol = "grpc"
)

// An OutboundPolicy says what becomes of connections to unknown destinations.
type OutboundPolicy string

// The outbound policies. The empty one means OutboundPassthrough.
const (
	OutboundPassthrough OutboundPolicy = "passthrough"
	OutboundBlock       OutboundPolicy = "block"
)

// A ServicePortRef names one port of one service.
type ServicePortRef struct {
	Namespace, Name string
	Port            uint16
}

// A Service is one service as every sidecar of the node sees it.
type Service struct {
	Namespace, Name string
	// VIPs are the service's addresses; a service without one gets clusters
	// (so that routes can lead to it) and no listeners.
	VIPs  []netip.Addr
	Ports []ServicePort
}

// A ServicePort is one TCP port of a service.
type ServicePort struct {
	Name     string
	Port     uint16
	Protocol Protocol
	// Endpoints are those that may get new connections now.
	Endpoints []Endpoint
	// Routes are the routes attached to this port, in the order of their
	// age, then namespace and name. Without routes everything goes to the
	// port's own endpoints; with routes what matches none is answered 404.
	Routes []HTTPRoute
}

// An Endpoint is one address behind a service port.
type Endpoint struct {
	Addr netip.AddrPort
	// Zone is empty where it is not known.
	Zone string
}

// An HTTPRoute is one route object, resolved: every reference in it was looked up.
type HTTPRoute struct {
	Namespace, Name string
	Created         time.Time
	Rules           []HTTPRule
}

// An HTTPRule is matched if any of Matches does; no Matches match everything.
type HTTPRule struct {
	Name            string
	Matches         []HTTPMatch
	RequestHeaders  HeaderModifier
	ResponseHeaders HeaderModifier
	Backends        []HTTPBackend
	// RequestTimeout bounds the whole exchange, 0 means no bound.
	RequestTimeout time.Duration
	// BackendTimeout bounds one try of a backend, 0 means no bound.
	BackendTimeout time.Duration
	// Unsupported is set, to the reason, when the rule asks for something that
	// is not served, such as a filter; what it matches is answered 500.
	Unsupported string
}

// An HTTPMatch matches when all of its parts do.
type HTTPMatch struct {
	Path    *StringMatch // nil: every path
	Method  string       // empty: every method
	Headers []NamedMatch
	Queries []NamedMatch
}

// A MatchType says how a StringMatch compares.
type MatchType string

// MatchPrefix is by path segments; MatchRegex is RE2 over the whole string.
const (
	MatchExact  MatchType = "exact"
	MatchPrefix MatchType = "prefix"
	MatchRegex  MatchType = "regex"
)

// A StringMatch compares one string.
type StringMatch struct {
	Type  MatchType
	Value string
}

// A NamedMatch compares the value of a header or query parameter.
type NamedMatch struct {
	Name string
	StringMatch
}

// A HeaderModifier changes headers; the zero value changes nothing.
type HeaderModifier struct {
	Set    []Header
	Add    []Header
	Remove []string
}

// A Header is a name and a value.
type Header struct{ Name, Value string }

// An HTTPBackend takes Weight of the sum of all weights of the requests.
type HTTPBackend struct {
	Ref    ServicePortRef
	Weight uint32
	// Invalid is set when Ref leads nowhere; its share is answered 500.
	Invalid         bool
	RequestHeaders  HeaderModifier
	ResponseHeaders HeaderModifier
}

// A Pod is what the sidecar of one pod needs beyond what all share.
type Pod struct {
	UID             string
	Namespace, Name string
	// Addrs are the pod's own addresses, at most one per family.
	Addrs []netip.Addr
	// Inbound are the declared container ports and those that services lead
	// to; all others pass through as TCP.
	Inbound        []InboundPort
	OutboundPolicy OutboundPolicy
}

// An InboundPort is one port that the pod's application serves.
type InboundPort struct {
	Port     uint16
	Protocol Protocol
}
