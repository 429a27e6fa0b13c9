package podwatch

import (
	"sync"

	corev1 "k8s.io/api/core/v1"
)

// ConditionRedirected is the type of the pod condition that says whether the
// pod's traffic is redirected as it asks for.
const ConditionRedirected = "sluice.dev/Redirected"

// A Condition is what a pod's status says of one matter.
type Condition struct {
	Status bool
	// Reason is one word in CamelCase, Message a sentence for people.
	Reason, Message string
}

// A knownCondition is the condition that a pod of the API server has.
type knownCondition struct {
	uid string // the pod's UID in the API
	Condition
}

// conditionOf returns our condition of a pod, nil if it has none.
func conditionOf(in *corev1.Pod) *knownCondition {
	for i := range in.Status.Conditions {
		if c := &in.Status.Conditions[i]; c.Type == ConditionRedirected {
			return &knownCondition{string(in.UID), Condition{c.Status == corev1.ConditionTrue, c.Reason, c.Message}}
		}
	}
	return nil
}

// conditions has the condition of each pod of this node as the API server last
// told, or as we last told it. They are not part of the model: our own report
// would be a change that something must be done about.
type conditions struct {
	mu    sync.Mutex
	known map[nsName]knownCondition
}

func newConditions() *conditions { return &conditions{known: map[nsName]knownCondition{}} }

// observe takes what was read; nil for pods that are gone.
func (c *conditions) observe(items map[Key]*item) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for k, i := range items {
		if k.Kind != KindPod {
			return // items are of one kind
		}
		if i == nil || i.condition == nil {
			delete(c.known, k.nsName())
			continue
		}
		c.known[k.nsName()] = *i.condition
	}
}

// set notes what was reported.
func (c *conditions) set(n nsName, uid string, to Condition) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.known[n] = knownCondition{uid, to}
}

// of returns the condition of a pod, if it has one.
func (c *conditions) of(n nsName, uid string) (Condition, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	k, ok := c.known[n]
	return k.Condition, ok && k.uid == uid
}
