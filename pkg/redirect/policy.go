package redirect

import (
	"encoding/json"
	"hash/fnv"
	"net/netip"
)

// A Backend names a way to redirect.
type Backend string

// The backends. BackendAuto takes eBPF where the node has all that it needs.
const (
	BackendAuto     Backend = "auto"
	BackendEBPF     Backend = "ebpf"
	BackendIPTables Backend = "iptables"
)

// A Policy says which connections of a pod are captured. Both backends give it
// the same meaning:
//
//	outbound: captured unless the port is in ExcludePorts or the address in
//	          ExcludeCIDRs, if the port is in IncludePorts or the address in
//	          IncludeCIDRs
//	inbound:  captured unless the port is in ExcludePorts, if it is in IncludePorts
//
// Excluding wins over including. Loopback and the pod's own addresses are never
// captured outbound, connections of the proxy neither. HealthPort is never
// captured inbound.
//
// The zero Policy captures nothing; DefaultPolicy captures everything.
type Policy struct {
	// ProxyUID is the user ID of the proxy's process.
	ProxyUID uint32
	// Backend is the pod's own choice; empty and BackendAuto mean the node's.
	Backend Backend
	// Accelerate is the pod's own choice; empty means the node's. Only the
	// backend ebpf can do it.
	Accelerate Accelerate `json:",omitempty"`
	Outbound   OutboundPolicy
	Inbound    InboundPolicy
	// ExcludeInterfaces are interfaces of the pod whose traffic is not
	// captured, in either direction. Sorted, without duplicates.
	ExcludeInterfaces []string
}

// An OutboundPolicy selects what the pod dials.
type OutboundPolicy struct {
	// IncludePorts are captured whatever the address.
	IncludePorts Ports
	ExcludePorts Ports
	IncludeCIDRs CIDRs
	ExcludeCIDRs CIDRs
}

// An InboundPolicy selects what others dial in the pod.
type InboundPolicy struct {
	IncludePorts Ports
	ExcludePorts Ports
}

// Ports is a set of TCP ports. The zero value is empty.
type Ports struct {
	// All means every port; List is then empty.
	All bool
	// List is sorted, without duplicates and without 0.
	List []uint16
}

// CIDRs is a set of address ranges of both families. The zero value is empty.
type CIDRs struct {
	// All means every address of both families; List is then empty.
	All bool
	// List holds masked prefixes, unmapped, sorted, without duplicates.
	List []netip.Prefix
}

// DefaultPolicy captures every connection both ways.
func DefaultPolicy() Policy {
	return Policy{
		ProxyUID: DefaultProxyUID,
		Backend:  BackendAuto,
		Outbound: OutboundPolicy{IncludeCIDRs: CIDRs{All: true}},
		Inbound:  InboundPolicy{IncludePorts: Ports{All: true}},
	}
}

// Digest returns the hash that Installed.Digest is compared with. The netns
// path is left out: the same namespace may be reached by several.
func (w Workload) Digest() Digest {
	w.Netns = ""
	b, err := json.Marshal(w)
	if err != nil {
		panic(err) // a Workload holds nothing that cannot be marshalled
	}
	h := fnv.New64a()
	h.Write(b)
	return Digest(h.Sum64())
}
