package podwatch

import (
	"fmt"
	"time"
)

const (
	// A pod may have eventBurst requests for events at once, and one more for each
	// eventRefill: the numbers of Kubernetes' own components.
	eventBurst  = 25
	eventRefill = 5 * time.Minute
	// maxCounted is of how many events and pods the counts are kept.
	maxCounted = 4096
	// maxPodInName is how much of a pod's name is in that of an event, which must
	// not be longer than the pod's may be.
	maxPodInName = 230
)

// eventCounts knows which events there are already. client-go's correlator does
// the same and more, but brings fifteen modules.
type eventCounts struct {
	occurrences map[eventKey]*occurrence
	budgets     map[PodRef]*budget
}

// An eventKey is the same for events that are counted as one.
type eventKey struct {
	pod                   PodRef
	kind, reason, message string
}

// An occurrence is one event, however often it happened.
type occurrence struct {
	name  string
	first time.Time
	count int32
}

// A budget is how many requests for events a pod may still have.
type budget struct {
	left float64
	at   time.Time
}

func newEventCounts() *eventCounts {
	return &eventCounts{occurrences: map[eventKey]*occurrence{}, budgets: map[PodRef]*budget{}}
}

// count returns how often e has happened now, nil if that is not to be told.
func (c *eventCounts) count(e *reportedEvent) *occurrence {
	if len(c.occurrences) >= maxCounted {
		clear(c.occurrences) // the next of each is a new event
	}
	if len(c.budgets) >= maxCounted {
		clear(c.budgets)
	}
	k := eventKey{e.pod, e.kind, e.reason, e.message}
	o := c.occurrences[k]
	if o == nil {
		o = &occurrence{
			// As Kubernetes names them: sorted by time.
			name:  fmt.Sprintf("%s.%x", e.pod.Name[:min(len(e.pod.Name), maxPodInName)], e.at.UnixNano()),
			first: e.at,
		}
		c.occurrences[k] = o
	}
	o.count++
	if !c.spend(e.pod, e.at) {
		return nil
	}
	now := *o
	return &now
}

func (c *eventCounts) spend(pod PodRef, now time.Time) bool {
	b := c.budgets[pod]
	if b == nil {
		b = &budget{left: eventBurst, at: now}
		c.budgets[pod] = b
	}
	b.left = min(eventBurst, b.left+now.Sub(b.at).Seconds()/eventRefill.Seconds())
	b.at = now
	if b.left < 1 {
		return false
	}
	b.left--
	return true
}
