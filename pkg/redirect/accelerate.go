package redirect

// Accelerate says whether connections within a node take the short way from
// socket to socket.
type Accelerate string

// The settings of a node and of a pod. A node's AccelerateOff holds for all its
// pods, a pod's for itself.
const (
	// AccelerateAuto: where this kernel does it right and it is faster.
	AccelerateAuto Accelerate = "auto"
	// AccelerateOn: where this kernel does it right.
	AccelerateOn  Accelerate = "on"
	AccelerateOff Accelerate = "off"
)

// A Place is a kind of connection that can be accelerated.
type Place string

// The places.
const (
	// PlacePeer is the connections between the proxies of two pods of a node.
	PlacePeer Place = "peer"
	// PlaceLoopback is the connections between an application and its proxy.
	PlaceLoopback Place = "loopback"
)

// An Acceleration says what became of one place on this node.
type Acceleration struct {
	Place Place
	// Right says that this kernel does it right, Faster that it is also faster
	// than without: then AccelerateAuto takes it.
	Right, Faster bool
	// Reason names the first thing that is missing or fails, or what was measured.
	Reason string
}

// In says whether a pod with this setting is accelerated in this place, on a
// node with that one; empty means AccelerateAuto for a pod, AccelerateOff for a
// node.
func (a Acceleration) In(node, pod Accelerate) bool {
	switch {
	case node == "" || node == AccelerateOff || pod == AccelerateOff:
		return false
	case node == AccelerateOn || pod == AccelerateOn:
		return a.Right
	}
	return a.Right && a.Faster
}

// An Accelerator is a Redirector that can accelerate.
type Accelerator interface {
	// Accelerations returns what became of each place, nil if the node's
	// setting is AccelerateOff.
	Accelerations() []Acceleration
	// AccelerationEvents returns what happened to accelerated connections, by
	// name. They never fall.
	AccelerationEvents() (map[string]uint64, error)
}
