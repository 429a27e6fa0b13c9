package redirect

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
)

// Ports of the sidecar Envoy that redirection leads to. They are fixed: the
// Envoy bootstrap, the generated listeners and the data plane must agree.
const (
	// OutboundPort receives what the pod's processes dial.
	OutboundPort uint16 = 15001
	// InboundPort receives what others dial in the pod.
	InboundPort uint16 = 15006
	// HealthPort answers readiness probes of the sidecar; never captured.
	HealthPort uint16 = 15021
	// AdminPort is Envoy's admin interface on the pod's loopback.
	AdminPort uint16 = 15000
	// DefaultProxyUID is the UID that the proxy runs as unless a pod says otherwise.
	DefaultProxyUID uint32 = 1337
)

// Errors that callers may test for with errors.Is. All others only describe.
var (
	// ErrNotSupported: this kernel or machine lacks something that the backend
	// needs; the message names it. Another backend may still work.
	ErrNotSupported = errors.New("not supported on this node")
	// ErrGone: the pod's network namespace has vanished. Do not retry.
	ErrGone = errors.New("network namespace is gone")
)

// An ID identifies one pod in one network namespace. The same pod UID with
// another namespace is another workload: a sandbox that was made again.
type ID struct {
	PodUID string
	// NetnsInode is the inode number of the namespace in nsfs, unique on a
	// node among the namespaces that live at the same time.
	NetnsInode uint64
}

// String returns "<pod uid>@<netns inode>".
func (id ID) String() string { return fmt.Sprintf("%s@%d", id.PodUID, id.NetnsInode) }

// A Workload is one pod whose TCP connections are to be steered to its proxy.
type Workload struct {
	ID ID
	// Pod is "namespace/name", for logs and metrics only.
	Pod string
	// Netns is a path that opens the namespace, /run/netns/x or /proc/PID/ns/net.
	Netns string
	// Addrs are the pod's addresses, unmapped, at most one per family, at
	// least one in all. A family without an address is not captured: a pod
	// cannot be reached or dial out over it.
	Addrs []netip.Addr
	// Interfaces are the names, inside the pod, of the interfaces that carry
	// Addrs. Traffic that arrives on any other interface is not captured.
	Interfaces []string
	Policy     Policy
	// HostProxyUID is Policy.ProxyUID as the node's own user namespace knows it;
	// 0 if that is the same. It is another one in a pod that has a user namespace
	// (hostUsers: false), and NoUID while that is not known.
	HostProxyUID uint32 `json:",omitempty"`
	// ProxyCgroup is the cgroup of the proxy's container, as a path below the
	// root of the cgroup v2 hierarchy: of the processes with the proxy's user ID
	// only those in there, or in a cgroup below, are the proxy. Empty: that is
	// not known, and the user ID alone counts.
	ProxyCgroup string `json:",omitempty"`
}

// NoUID is the user ID that nobody has (chown(2) takes it for "do not change").
const NoUID = ^uint32(0)

// A Digest is a hash over everything in a Workload that the data plane
// depends on. Equal digests mean that nothing needs to be done.
type Digest uint64

// An Installed is a workload as the kernel has it.
type Installed struct {
	ID     ID
	Pod    string
	Netns  string
	Digest Digest
	// Problem is nil while the redirection is whole. Else it names the part
	// that is missing or was changed by others; Add mends it.
	Problem error
}

// Whole says whether i is w, with nothing missing.
func (i Installed) Whole(w Workload) bool {
	return i.ID == w.ID && i.Problem == nil && i.Digest == w.Digest()
}

// A Redirector steers the TCP connections of workloads on this node to their
// Envoy. Methods are idempotent and safe for concurrent use. They return an
// error wrapping ErrGone if the pod's network namespace has vanished; do not
// retry those.
type Redirector interface {
	// Add installs w, or changes what is installed under the same ID to w,
	// live and without touching established connections. No-op if an equal
	// workload is present and whole.
	Add(ctx context.Context, w Workload) error
	// Remove ends the redirection of id and leaves nothing of it behind,
	// also when the namespace is gone already. No-op if absent.
	Remove(ctx context.Context, id ID) error
	// List reads back from the kernel, not from memory, what is installed,
	// sorted by ID, also what an earlier agent installed. With an error it
	// returns what it could read.
	List(ctx context.Context) ([]Installed, error)
	// Close frees handles and leaves the redirection in place.
	Close() error
}

// A Yielder is a Redirector that can give a workload to another backend: all of
// Sluice's are.
type Yielder interface {
	// Yield is Remove for a workload that another backend has already: what
	// both need in the pod's namespace, ::6 on lo, stays for that one, which
	// removes it in the end.
	Yield(ctx context.Context, id ID) error
}

// A Direction says from where a counted connection came.
type Direction string

// The directions of a connection, seen from the pod.
const (
	Inbound  Direction = "inbound"
	Outbound Direction = "outbound"
)

// A Counter says how many connections of one pod ended in one verdict.
// Counters never fall while the workload is installed.
type Counter struct {
	ID        ID
	Pod       string
	Direction Direction
	// Verdict is what happened: "redirected", "bypassed" or "denied".
	Verdict string
	// Reason is why, in snake_case: "captured", "excluded_port", "proxy_down", ...
	Reason string
	Value  uint64
}

// A MapUsage is the occupancy of one kernel map of a backend.
type MapUsage struct {
	Name     string
	Entries  int
	Capacity int
}

// A Meter is a Redirector that counts. All backends are Meters.
type Meter interface {
	// Counters returns the counters of all installed workloads.
	Counters(ctx context.Context) ([]Counter, error)
	// MapUsage returns nil where a backend has no maps.
	MapUsage(ctx context.Context) ([]MapUsage, error)
}
