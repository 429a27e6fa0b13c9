package podwatch

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

func startReporter(t *testing.T, k *k8sTest) *Reporter {
	t.Helper()
	r, err := NewReporter(ReporterOptions{Source: k.source, Log: k.source.log})
	if err != nil {
		t.Fatal(err)
	}
	k.run(r.Run)
	return r
}

// condition is ours of a pod at the server.
func (s *apiServer) condition(pod string) *corev1.PodCondition {
	s.mu.Lock()
	defer s.mu.Unlock()
	p, ok := s.objects["pods"][nsName{"shop", pod}].(*corev1.Pod)
	if !ok {
		return nil
	}
	for i := range p.Status.Conditions {
		if p.Status.Conditions[i].Type == ConditionRedirected {
			return &p.Status.Conditions[i]
		}
	}
	return nil
}

func (s *apiServer) events() []*corev1.Event {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []*corev1.Event
	for _, o := range s.objects["events"] {
		all = append(all, o.(*corev1.Event))
	}
	return all
}

// idle waits until nothing waits to be reported.
func idle(t *testing.T, r *Reporter) {
	t.Helper()
	eventually(t, "idle", func() bool { return r.Stats().Waiting == 0 })
}

var (
	webRef = PodRef{"shop", "web", "uid-web"}
	good   = Condition{Status: true, Reason: "Redirected", Message: "by ebpf"}
	bad    = Condition{Reason: "BadAnnotation", Message: "port 0"}
)

// TestReportCondition: only what is new is sent, and the time of the last
// transition is that of the status.
func TestReportCondition(t *testing.T) {
	api := shopAPI(t)
	api.put(apiPod("web", "n1", func(p *corev1.Pod) {
		p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
	}))
	k := startK8s(t, api)
	k.waitSynced()
	r := startReporter(t, k)
	for range 3 {
		r.Report(webRef, good)
		idle(t, r)
	}
	if n := api.count("patch pods/status"); n != 1 {
		t.Errorf("%d patches for one condition, want 1", n)
	}
	c := api.condition("web")
	if c == nil || c.Status != corev1.ConditionTrue || c.Reason != "Redirected" || c.Message != "by ebpf" || c.LastTransitionTime.IsZero() {
		t.Fatalf("condition = %+v", c)
	}
	first := c.LastTransitionTime
	r.Report(webRef, Condition{Status: true, Reason: "Redirected", Message: "by iptables"})
	idle(t, r)
	if c := api.condition("web"); c.Message != "by iptables" || c.LastTransitionTime != first {
		t.Errorf("condition = %+v, want another message and the same time", c)
	}
	if body := api.sent()[1]; strings.Contains(body, "lastTransitionTime") {
		t.Errorf("patch %s has a time although the status has not changed", body)
	}
	r.Report(webRef, bad)
	idle(t, r)
	if c := api.condition("web"); c.Status != corev1.ConditionFalse || c.Reason != "BadAnnotation" {
		t.Errorf("condition = %+v, want false", c)
	}
	if body := api.sent()[2]; !strings.Contains(body, "lastTransitionTime") {
		t.Errorf("patch %s has no time although the status has changed", body)
	}
	// What others took away is put back at the next report.
	api.put(apiPod("web", "n1"))
	eventually(t, "loss", func() bool { _, ok := k.source.conditions.of(nsName{"shop", "web"}, "uid-web"); return !ok })
	r.Report(webRef, bad)
	idle(t, r)
	if api.condition("web") == nil {
		t.Error("condition is not put back")
	}
}

// TestReportAfterRestart: a new agent knows what the one before it reported.
func TestReportAfterRestart(t *testing.T) {
	api := shopAPI(t)
	api.put(apiPod("web", "n1", func(p *corev1.Pod) {
		p.Status.Conditions = []corev1.PodCondition{{Type: ConditionRedirected, Status: corev1.ConditionTrue, Reason: good.Reason, Message: good.Message}}
	}))
	k := startK8s(t, api)
	k.waitSynced()
	r := startReporter(t, k)
	r.Report(webRef, good)
	idle(t, r)
	if n := api.count("patch pods/status"); n != 0 {
		t.Errorf("%d patches, want none", n)
	}
	r.Report(webRef, bad)
	idle(t, r)
	if n := api.count("patch pods/status"); n != 1 {
		t.Errorf("%d patches, want 1", n)
	}
}

// TestReportOtherPod: a report of a pod that is gone reaches no other of its name.
func TestReportOtherPod(t *testing.T) {
	api := shopAPI(t)
	k := startK8s(t, api)
	k.waitSynced()
	r := startReporter(t, k)
	r.Report(PodRef{"shop", "web", "another"}, good)
	r.Report(PodRef{"shop", "absent", "x"}, good)
	idle(t, r)
	if n := api.count("patch pods/status"); n != 0 {
		t.Errorf("%d patches, want none: the source knows that these are no pods", n)
	}
	// The source does not know yet that the pod was made again, or has gone.
	api.set(func() { api.objects["pods"][nsName{"shop", "web"}].(*corev1.Pod).UID = "new" })
	r.Report(webRef, good)
	idle(t, r)
	api.set(func() { clear(api.objects["pods"]) })
	r.Report(webRef, bad)
	idle(t, r)
	if n, s := api.count("patch pods/status"), r.Stats(); n != 2 || s.Failed != 0 || s.Conditions != 0 {
		t.Errorf("%d patches and %+v, want two that are refused and no matter", n, s)
	}
	if c := api.condition("web"); c != nil {
		t.Errorf("condition %+v of another pod", c)
	}
}

// TestReportConflict: a pod that others write all the time gets its condition as
// soon as it can be had.
func TestReportConflict(t *testing.T) {
	api := shopAPI(t)
	api.refuse["patch pods/status"] = http.StatusConflict
	k := startK8s(t, api)
	k.waitSynced()
	r := startReporter(t, k)
	r.Report(webRef, good)
	eventually(t, "attempts", func() bool { return r.Stats().Failed > 1 })
	api.set(func() { clear(api.refuse) })
	idle(t, r)
	if api.condition("web") == nil {
		t.Error("no condition")
	}
}

// TestWithdraw: only a pod that has the condition is told that it has it no more.
func TestWithdraw(t *testing.T) {
	api := shopAPI(t)
	api.put(apiPod("other", "n1", func(p *corev1.Pod) {
		p.Status.Conditions = []corev1.PodCondition{{Type: ConditionRedirected, Status: corev1.ConditionTrue, Reason: good.Reason, Message: good.Message}}
	}))
	k := startK8s(t, api)
	k.waitSynced()
	r := startReporter(t, k)
	off := Condition{Reason: "NotRequested", Message: "no more"}
	r.Withdraw(webRef, off)
	r.Withdraw(PodRef{"shop", "other", "uid-other"}, off)
	r.Withdraw(PodRef{"shop", "absent", "x"}, off)
	idle(t, r)
	if c := api.condition("other"); c == nil || c.Status != corev1.ConditionFalse || c.Reason != off.Reason {
		t.Errorf("condition = %+v, want %+v", c, off)
	}
	if n, c := api.count("patch pods/status"), api.condition("web"); n != 1 || c != nil {
		t.Errorf("%d patches, want 1; condition of the other pod %+v", n, c)
	}
}

// TestReportRetries: while the server is away only the last state of each pod is
// kept, and it is sent when the server is back.
func TestReportRetries(t *testing.T) {
	for name, fault := range map[string]struct{ begin, end func(*apiServer) }{
		"away": {(*apiServer).down, (*apiServer).up},
		"fails": {
			func(s *apiServer) {
				s.set(func() { s.refuse["patch pods/status"], s.refuse["create events"] = 500, 500 })
			},
			func(s *apiServer) { s.set(func() { clear(s.refuse) }) },
		},
	} {
		t.Run(name, func(t *testing.T) {
			api := shopAPI(t)
			k := startK8s(t, api)
			k.waitSynced()
			r := startReporter(t, k)
			fault.begin(api)
			r.Report(webRef, bad)
			r.Event(webRef, EventWarning, "RedirectionFailed", "no map")
			eventually(t, "attempts", func() bool { return r.Stats().Failed > 2 })
			start := time.Now()
			r.Report(webRef, good)
			if took := time.Since(start); took > time.Second {
				t.Errorf("Report took %v while the server is away", took)
			}
			fault.end(api)
			idle(t, r)
			if c := api.condition("web"); c == nil || c.Status != corev1.ConditionTrue {
				t.Errorf("condition = %+v, want the last one", c)
			}
			if e := api.events(); len(e) != 1 || e[0].Count != 1 {
				t.Errorf("events = %+v, want one that happened once", e)
			}
			if s := r.Stats(); s.Dropped != 0 || s.Conditions == 0 || s.Events != 1 {
				t.Errorf("stats = %+v", s)
			}
		})
	}
}

// TestReportForbidden: what the role lacks is said once, holds up nothing else,
// and is tried again: a server that has just started knows of no role yet.
func TestReportForbidden(t *testing.T) {
	api := shopAPI(t)
	api.refuse["patch pods/status"] = http.StatusForbidden
	k := startK8s(t, api)
	k.waitSynced()
	r := startReporter(t, k)
	r.Report(webRef, good)
	eventually(t, "attempts", func() bool { return r.Stats().Failed > 3 })
	r.Event(webRef, EventNormal, "Redirected", "again")
	eventually(t, "event", func() bool { return len(api.events()) == 1 })
	if lines := k.log.with("level=WARN", "patch", "pods/status", "verb"); len(lines) != 1 {
		t.Errorf("%d warnings, want one:\n%s", len(lines), strings.Join(lines, "\n"))
	}
	api.set(func() { clear(api.refuse) })
	idle(t, r)
	if api.condition("web") == nil {
		t.Error("condition is not reported although that is allowed now")
	}
}

// TestReportRefusedForOne: what the server refuses for one pod, by a policy or a
// quota say, holds up no other pod's reports, and is tried again.
func TestReportRefusedForOne(t *testing.T) {
	api := shopAPI(t)
	api.put(apiPod("other", "n1"))
	api.refuse["patch pods/status shop/web"] = http.StatusForbidden
	api.refuse["create events full/"] = http.StatusForbidden
	k := startK8s(t, api)
	k.waitSynced()
	r := startReporter(t, k)
	r.Report(webRef, good)
	r.Event(PodRef{"full", "web", "x"}, EventWarning, "RedirectionFailed", "no map")
	eventually(t, "attempts", func() bool { return r.Stats().Failed > 1 })
	r.Report(PodRef{"shop", "other", "uid-other"}, good)
	r.Event(webRef, EventWarning, "RedirectionFailed", "no map")
	eventually(t, "condition of the other pod", func() bool { return api.condition("other") != nil })
	eventually(t, "event of the other pod", func() bool { return len(api.events()) == 1 })
	api.set(func() { clear(api.refuse) })
	idle(t, r)
	if n := len(api.events()); n != 2 || api.condition("web") == nil {
		t.Errorf("%d events, want two; condition %+v, want one", n, api.condition("web"))
	}
}

// TestReportInvalid: a report that the server will never have is dropped.
func TestReportInvalid(t *testing.T) {
	api := shopAPI(t)
	api.refuse["patch pods/status"] = http.StatusUnprocessableEntity
	k := startK8s(t, api)
	k.waitSynced()
	r := startReporter(t, k)
	r.Report(webRef, good)
	idle(t, r)
	if s := r.Stats(); s.Dropped != 1 || s.Failed != 1 {
		t.Errorf("stats = %+v, want one that is dropped", s)
	}
}

// TestEvents: equal events are counted, and many are left out.
func TestEvents(t *testing.T) {
	api := shopAPI(t)
	k := startK8s(t, api)
	k.waitSynced()
	r := startReporter(t, k)
	for range 3 {
		r.Event(webRef, EventWarning, "BadAnnotation", "port 0")
		idle(t, r)
	}
	e := api.events()
	if len(e) != 1 {
		t.Fatalf("%d events, want one", len(e))
	}
	if e[0].Count != 3 || e[0].Type != "Warning" || e[0].Reason != "BadAnnotation" || e[0].Message != "port 0" ||
		e[0].InvolvedObject != (corev1.ObjectReference{Kind: "Pod", APIVersion: "v1", Namespace: "shop", Name: "web", UID: "uid-web"}) ||
		e[0].Source != (corev1.EventSource{Component: "sluice-agent", Host: "n1"}) || e[0].FirstTimestamp.IsZero() {
		t.Errorf("event = %+v", e[0])
	}
	// It expires, and happens once more.
	api.remove(e[0])
	r.Event(webRef, EventWarning, "BadAnnotation", "port 0")
	idle(t, r)
	if e := api.events(); len(e) != 1 || e[0].Count != 4 {
		t.Errorf("events = %+v, want it made anew", e)
	}
	for i := range 100 {
		r.Event(webRef, EventWarning, "Loop", fmt.Sprint("number ", i))
	}
	r.Event(PodRef{"shop", "other", "x"}, EventNormal, "Fine", "as ever")
	eventually(t, "the other pod's event", func() bool {
		return strings.Contains(strings.Join(api.sent(), "\n"), "as ever")
	})
	if n := len(api.events()); n > eventBurst+1 {
		t.Errorf("%d events, want at most %d for one pod", n, eventBurst)
	}
}

// TestEventCounts: a pod may have a few events at once, and later some more.
func TestEventCounts(t *testing.T) {
	c := newEventCounts()
	at := time.Unix(0, 0)
	tell := func(n int) (told int) {
		for i := range n {
			if c.count(&reportedEvent{pod: webRef, reason: fmt.Sprint(i), at: at}) != nil {
				told++
			}
		}
		return told
	}
	if n := tell(100); n != eventBurst {
		t.Errorf("%d events at once, want %d", n, eventBurst)
	}
	at = at.Add(2 * eventRefill)
	if n := tell(100); n != 2 {
		t.Errorf("%d events after twice the time for one, want 2", n)
	}
	for i := range 2 * maxCounted {
		c.count(&reportedEvent{pod: PodRef{Name: fmt.Sprint(i)}, at: at})
	}
	if len(c.occurrences) > maxCounted || len(c.budgets) > maxCounted {
		t.Errorf("%d events and %d pods are kept, want at most %d", len(c.occurrences), len(c.budgets), maxCounted)
	}
}

// TestReportBounds: a queue that nobody sends does not grow for ever.
func TestReportBounds(t *testing.T) {
	api := shopAPI(t)
	k := newK8s(t, api, time.Second)
	r, err := NewReporter(ReporterOptions{Source: k.source})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 2 * maxWanted {
		r.Report(PodRef{Name: fmt.Sprint(i)}, good)
		r.Event(PodRef{Name: fmt.Sprint(i)}, EventNormal, "A", strings.Repeat("ä", maxMessage))
	}
	if s := r.Stats(); s.Waiting != maxWanted+maxEvents || s.Dropped != uint64(2*2*maxWanted-maxWanted-maxEvents) {
		t.Errorf("stats = %+v", s)
	}
	if m := r.events[0].message; len(m) > maxMessage || !strings.HasSuffix(m, "ä...") {
		t.Errorf("message of %d bytes ends with %q", len(m), m[len(m)-6:])
	}
}

// TestNilReporter: without an API server there is nobody to tell.
func TestNilReporter(t *testing.T) {
	var r *Reporter
	r.Report(webRef, good)
	r.Event(webRef, EventNormal, "A", "b")
	if s := r.Stats(); s != (ReporterStats{}) {
		t.Errorf("stats = %+v, want none", s)
	}
}
