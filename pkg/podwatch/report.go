package podwatch

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
)

const (
	// maxWanted and maxEvents bound what waits to be reported, while the API
	// server is away for example. A node has fewer pods; of events the newest are
	// dropped.
	maxWanted, maxEvents = 2048, 256
	// maxEventAge is how old an event may get before it is of no interest.
	maxEventAge = 10 * time.Minute
	// maxMessage is how many bytes of a message are sent.
	maxMessage = 1024
	// reportTimeout is for one request.
	reportTimeout = 10 * time.Second
	// eventComponent is who events are from.
	eventComponent = "sluice-agent"
)

// A PodRef names a pod. UID is the one that CNI knows it by, or that of the API.
type PodRef struct{ Namespace, Name, UID string }

// EventTypes.
const (
	EventNormal  = corev1.EventTypeNormal
	EventWarning = corev1.EventTypeWarning
)

// ReporterOptions configure a Reporter.
type ReporterOptions struct {
	Source *Kubernetes
	// Log may be nil: discards.
	Log *slog.Logger
}

// ReporterStats count since the start.
type ReporterStats struct {
	// Conditions and Events are requests that the API server took.
	Conditions, Events uint64
	// Failed requests are tried again if that may help.
	Failed uint64
	// Dropped reports will not be sent: too many waited, they are too old, or the
	// server will not have them.
	Dropped uint64
	// Waiting is how many are to be sent just now.
	Waiting int
}

// A Reporter tells the API server about pods of this node: by the condition
// sluice.dev/Redirected in their status, and by Events. Report and Event only
// take note and never block; Run sends. A nil Reporter reports nothing, for
// sources that have nobody to report to.
type Reporter struct {
	source     *Kubernetes
	log        *slog.Logger
	counts     *eventCounts // of the goroutine that sends events
	retryFirst time.Duration

	mu     sync.Mutex
	wanted map[PodRef]Condition
	order  []PodRef // of wanted, the oldest first
	events []*reportedEvent
	stats  ReporterStats
	// logged are the errors that are in the log, by their text.
	logged map[string]struct{}

	wakeConditions, wakeEvents chan struct{} // each with room for one signal
}

type reportedEvent struct {
	pod                   PodRef
	kind, reason, message string
	at                    time.Time
	// occurrence is nil until it was counted.
	occurrence *occurrence
}

// NewReporter returns a Reporter; Run does the work.
func NewReporter(o ReporterOptions) (*Reporter, error) {
	if o.Source == nil {
		return nil, errors.New("report to the API server: no source given")
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return &Reporter{
		source: o.Source, log: o.Log, retryFirst: o.Source.reflection.retryFirst,
		counts: newEventCounts(),
		wanted: map[PodRef]Condition{}, logged: map[string]struct{}{},
		wakeConditions: make(chan struct{}, 1), wakeEvents: make(chan struct{}, 1),
	}, nil
}

// Report says what the condition of a pod is now. Only the last counts, and
// nothing is sent if the pod has it.
func (r *Reporter) Report(pod PodRef, c Condition) {
	if r == nil {
		return
	}
	c.Message = shorten(c.Message)
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.wanted[pod]; !ok {
		if len(r.wanted) >= maxWanted {
			r.stats.Dropped++
			return
		}
		r.order = append(r.order, pod)
	}
	r.wanted[pod] = c
	signal(r.wakeConditions)
}

// Withdraw is Report for a pod that has no such condition unless an earlier agent
// gave it one: then that is replaced, else nothing happens.
func (r *Reporter) Withdraw(pod PodRef, c Condition) {
	if r == nil {
		return
	}
	if p := r.target(pod); p != nil {
		if _, has := r.source.conditions.of(nsName{pod.Namespace, pod.Name}, p.UID); has {
			r.Report(pod, c)
		}
	}
}

// Event tells what happened to a pod. kind is EventNormal or EventWarning, reason
// one word in CamelCase. Equal events are counted, not repeated, and of many
// about one pod some are left out.
func (r *Reporter) Event(pod PodRef, kind, reason, message string) {
	if r == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.events) >= maxEvents {
		r.stats.Dropped++
		return
	}
	r.events = append(r.events, &reportedEvent{pod: pod, kind: kind, reason: reason, message: shorten(message), at: time.Now()})
	signal(r.wakeEvents)
}

func signal(wake chan<- struct{}) {
	select {
	case wake <- struct{}{}:
	default: // the last signal is still there
	}
}

// Stats returns the counters; zero for nil.
func (r *Reporter) Stats() ReporterStats {
	if r == nil {
		return ReporterStats{}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.stats
	s.Waiting = len(r.wanted) + len(r.events)
	return s
}

// Run sends what is reported until ctx ends, then returns nil. What is not sent
// by then is lost: conditions are reported anew by the next agent.
func (r *Reporter) Run(ctx context.Context) error {
	if r == nil {
		<-ctx.Done()
		return nil
	}
	// Apart, so that a right that one of them lacks does not hold up the other.
	var wg sync.WaitGroup
	wg.Go(func() { r.send(ctx, r.wakeConditions, r.nextCondition) })
	wg.Go(func() { r.send(ctx, r.wakeEvents, r.nextEvent) })
	wg.Wait()
	return nil
}

// send calls next, which sends one report and says whether there was one, until
// there is none, and again at the next signal. An error is that of a report that
// is still there: the next attempt is made later.
func (r *Reporter) send(ctx context.Context, wake <-chan struct{}, next func(context.Context) (bool, error)) {
	retry := r.retryFirst
	for ctx.Err() == nil {
		limited, cancel := context.WithTimeout(ctx, reportTimeout)
		more, err := next(limited)
		cancel()
		switch {
		case err != nil:
			select {
			case <-ctx.Done():
			case <-time.After(retry + rand.N(retry)):
			}
			retry = min(2*retry, retryMax)
			continue
		case !more:
			select {
			case <-ctx.Done():
			case <-wake:
			}
		}
		retry = r.retryFirst
	}
}

// nextCondition sends the condition that waits the longest for its turn.
func (r *Reporter) nextCondition(ctx context.Context) (bool, error) {
	r.mu.Lock()
	if len(r.order) == 0 {
		r.mu.Unlock()
		return false, nil
	}
	pod := r.order[0]
	condition := r.wanted[pod]
	r.mu.Unlock()

	sent, err := r.sendCondition(ctx, pod, condition)
	if errors.Is(ctx.Err(), context.Canceled) {
		return false, nil // we are ending
	}

	r.mu.Lock()
	defer r.mu.Unlock()
	again := r.failed(err, retriable(err))
	r.order = r.order[1:]
	if again {
		// Last in the queue: what is refused for one pod holds up no other.
		r.order = append(r.order, pod)
		return true, err
	}
	if sent {
		r.stats.Conditions++
	}
	if r.wanted[pod] != condition { // it changed meanwhile
		r.order = append(r.order, pod)
	} else {
		delete(r.wanted, pod)
	}
	return true, nil
}

// nextEvent sends the event that waits the longest for its turn.
func (r *Reporter) nextEvent(ctx context.Context) (bool, error) {
	r.mu.Lock()
	if len(r.events) == 0 {
		r.mu.Unlock()
		return false, nil
	}
	event := r.events[0]
	r.mu.Unlock()

	sent, err := r.sendEvent(ctx, event)
	if errors.Is(ctx.Err(), context.Canceled) {
		return false, nil // we are ending
	}

	r.mu.Lock()
	defer r.mu.Unlock()
	again := r.failed(err, retriable(err) && time.Since(event.at) < maxEventAge)
	r.events = r.events[1:]
	if again {
		r.events = append(r.events, event) // as above
		return true, err
	}
	if sent {
		r.stats.Events++
	}
	return true, nil
}

// failed counts and logs an error, and says whether the report stays. It is
// called with mu held.
func (r *Reporter) failed(err error, again bool) bool {
	if err == nil {
		return false
	}
	r.stats.Failed++
	if _, ok := r.logged[err.Error()]; !ok && len(r.logged) < maxEvents { // once each
		r.logged[err.Error()] = struct{}{}
		r.log.Warn("cannot report to the API server", "err", err, "again", again)
	}
	if !again {
		r.stats.Dropped++
	}
	return again
}

// retriable says whether another attempt may end differently.
func retriable(err error) bool {
	var status apierrors.APIStatus
	if !errors.As(err, &status) {
		return true // no answer
	}
	switch code := status.Status().Code; code {
	case http.StatusUnauthorized, http.StatusForbidden:
		// For a moment after its start the server knows of no role.
		return true
	case http.StatusConflict:
		// Others write the pod without pause. Another pod of its name is no error.
		return true
	default:
		return code >= http.StatusInternalServerError || code == http.StatusTooManyRequests
	}
}

// target is the pod as the API has it, nil if it is gone or another one.
func (r *Reporter) target(ref PodRef) *Pod {
	p, ok := Get[*Pod](r.source.store, ref.Namespace, ref.Name)
	if !ok || !r.source.store.IsPod(p, ref.UID) {
		return nil
	}
	return p
}

// A conditionPatch is a strategic merge patch of a pod's status. The UID makes
// the server refuse it for another pod of that name.
type conditionPatch struct {
	Metadata struct {
		UID string `json:"uid"`
	} `json:"metadata"`
	Status struct {
		Conditions []patchedCondition `json:"conditions"`
	} `json:"status"`
}

type patchedCondition struct {
	Type    string `json:"type"`
	Status  string `json:"status"`
	Reason  string `json:"reason"`
	Message string `json:"message"`
	// LastTransitionTime is left as it is when the status stays.
	LastTransitionTime *metav1.Time `json:"lastTransitionTime,omitempty"`
}

func (r *Reporter) sendCondition(ctx context.Context, ref PodRef, c Condition) (sent bool, err error) {
	pod := r.target(ref)
	if pod == nil {
		return false, nil
	}
	known, has := r.source.conditions.of(nsName{ref.Namespace, ref.Name}, pod.UID)
	if has && known == c {
		return false, nil
	}
	patched := patchedCondition{Type: ConditionRedirected, Status: string(corev1.ConditionFalse), Reason: c.Reason, Message: c.Message}
	if c.Status {
		patched.Status = string(corev1.ConditionTrue)
	}
	if !has || known.Status != c.Status {
		now := metav1.Now()
		patched.LastTransitionTime = &now
	}
	var patch conditionPatch
	patch.Metadata.UID = pod.UID
	patch.Status.Conditions = []patchedCondition{patched}
	body, err := json.Marshal(patch)
	if err != nil {
		return false, fmt.Errorf("encode condition of pod %s/%s: %w", ref.Namespace, ref.Name, err)
	}
	err = r.source.access.report.Patch(types.StrategicMergePatchType).
		Namespace(ref.Namespace).Resource("pods").Name(ref.Name).SubResource("status").
		Body(body).Do(ctx).Error()
	if apierrors.IsNotFound(err) || apierrors.IsConflict(err) && strings.Contains(err.Error(), "UID in precondition") {
		return false, nil // the pod is gone, and another one may be there
	}
	if err != nil {
		return false, r.source.access.explain("patch", schema.GroupResource{Resource: "pods/status"}, err)
	}
	r.source.conditions.set(nsName{ref.Namespace, ref.Name}, pod.UID, c)
	return true, nil
}

func (r *Reporter) sendEvent(ctx context.Context, e *reportedEvent) (sent bool, err error) {
	if e.occurrence == nil { // is counted once, however often it is tried
		if e.occurrence = r.counts.count(e); e.occurrence == nil {
			return false, nil
		}
	}
	client, o := r.source.access.report, e.occurrence
	verb, resource := "patch", schema.GroupResource{Resource: "events"}
	if o.count > 1 {
		var patch eventPatch
		patch.Count, patch.LastTimestamp = o.count, metav1.NewTime(e.at)
		body, err := json.Marshal(patch)
		if err != nil {
			return false, fmt.Errorf("encode event %s of pod %s/%s: %w", e.reason, e.pod.Namespace, e.pod.Name, err)
		}
		err = client.Patch(types.MergePatchType).Namespace(e.pod.Namespace).Resource("events").Name(o.name).Body(body).Do(ctx).Error()
		if err == nil {
			return true, nil
		}
		if !apierrors.IsNotFound(err) {
			return false, r.source.access.explain(verb, resource, err)
		}
		// It has expired, as they do after an hour.
	}
	verb = "create"
	err = client.Post().Namespace(e.pod.Namespace).Resource("events").Body(r.newEvent(e)).Do(ctx).Error()
	switch {
	case err == nil || apierrors.IsAlreadyExists(err): // the answer to an earlier attempt was lost
		return true, nil
	case apierrors.IsNotFound(err) || apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause):
		return false, nil // the namespace is gone, or going
	}
	return false, r.source.access.explain(verb, resource, err)
}

// An eventPatch is a merge patch: the event has happened again.
type eventPatch struct {
	Count         int32       `json:"count"`
	LastTimestamp metav1.Time `json:"lastTimestamp"`
}

func (r *Reporter) newEvent(e *reportedEvent) *corev1.Event {
	uid := e.pod.UID
	if pod := r.target(e.pod); pod != nil {
		uid = pod.UID
	}
	return &corev1.Event{
		ObjectMeta: metav1.ObjectMeta{Namespace: e.pod.Namespace, Name: e.occurrence.name},
		InvolvedObject: corev1.ObjectReference{
			Kind: string(KindPod), APIVersion: "v1",
			Namespace: e.pod.Namespace, Name: e.pod.Name, UID: types.UID(uid),
		},
		Type: e.kind, Reason: e.reason, Message: e.message,
		Source:         corev1.EventSource{Component: eventComponent, Host: r.source.node},
		FirstTimestamp: metav1.NewTime(e.occurrence.first), LastTimestamp: metav1.NewTime(e.at), Count: e.occurrence.count,
		ReportingController: eventComponent, ReportingInstance: r.source.node,
	}
}

// shorten cuts a message at maxMessage bytes.
func shorten(s string) string {
	if len(s) <= maxMessage {
		return s
	}
	const dots = "..."
	cut := maxMessage - len(dots)
	for cut > 0 && s[cut]&0xC0 == 0x80 { // within a character
		cut--
	}
	return s[:cut] + dots
}
