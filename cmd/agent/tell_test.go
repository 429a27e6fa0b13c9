package main

import (
	"fmt"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/sluicemesh/sluice/pkg/podwatch"
	"github.com/sluicemesh/sluice/pkg/redirect"
)

// A fakeReporter notes what is told of pods.
type fakeReporter struct{ j *journal }

func (r fakeReporter) Report(pod podwatch.PodRef, c podwatch.Condition) {
	r.j.told(fmt.Sprintf("%s/%s %s is %t: %s: %s", pod.Namespace, pod.Name, pod.UID, c.Status, c.Reason, c.Message))
}

func (r fakeReporter) Withdraw(pod podwatch.PodRef, c podwatch.Condition) {
	r.j.told(fmt.Sprintf("%s/%s %s has no condition but %s", pod.Namespace, pod.Name, pod.UID, c.Reason))
}

func (r fakeReporter) Event(pod podwatch.PodRef, kind, reason, message string) {
	r.j.told(fmt.Sprintf("%s/%s %s %s %s: %s", pod.Namespace, pod.Name, pod.UID, kind, reason, message))
}

func (j *journal) told(text string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.reports = append(j.reports, text)
}

// reported returns what was told since it was last called.
func (j *journal) reported() []string {
	j.mu.Lock()
	defer j.mu.Unlock()
	out := slices.Clone(j.reports)
	j.reports = nil
	return out
}

// A fakeBackend is a node that fell back to iptables.
type fakeBackend struct{}

func (fakeBackend) BackendOf(redirect.ID) redirect.Backend { return redirect.BackendIPTables }
func (fakeBackend) Backend() redirect.Backend              { return redirect.BackendIPTables }
func (fakeBackend) Reason() string                         { return "this kernel is too old" }

// People are told what changes, once.
func TestWhatIsToldOfAPod(t *testing.T) {
	const port = "sluice.dev/exclude-outbound-ports"
	redirected := "shop/web uid-web is true: Redirected: TCP connections lead through the sidecar (iptables)"
	web := newPod("shop", "web", port, "9090")
	n := readyNode(t, shop(), web)
	mustAdd(t, n, attach(web))
	compare := func(what string, want ...string) {
		t.Helper()
		if diff := cmp.Diff(want, n.j.reported()); diff != "" {
			t.Errorf("%s: -want +got:\n%s", what, diff)
		}
	}
	compare("redirected", "shop/web uid-web Warning BackendFallback: redirected by iptables: this kernel is too old", redirected)

	mustAdd(t, n, attach(web))
	compare("added once more")

	bad := `pod shop/web: sluice.dev/exclude-outbound-ports: "9o90": want a port from 1 to 65535`
	n.change(t, "share service/shop/a", newPod("shop", "web", port, "9o90"), newService("a", 80))
	n.change(t, "share service/shop/b", newPod("shop", "web", port, "9o90", "other.example/key", "1"), newService("b", 80))
	compare("bad annotation", "shop/web uid-web Warning BadAnnotation: "+bad, "shop/web uid-web is true: BadAnnotation: "+bad)

	n.change(t, "redirect uid-web", newPod("shop", "web", port, "9091"))
	n.change(t, "share service/shop/c", newService("c", 80))
	compare("mended", redirected)

	off := newPod("shop", "web")
	off.Labels[redirect.RedirectKey] = redirect.RedirectDisabled
	n.change(t, "unconfigure uid-web", off)
	n.change(t, "share service/shop/d", newService("d", 80))
	compare("switched off", "shop/web uid-web is false: NotRequested: the pod no longer asks to be redirected")
}

// A pod that is to be left alone gets no condition, and loses the one that an
// earlier agent gave it.
func TestNothingIsToldOfOthers(t *testing.T) {
	web := newPod("other", "web")
	n := readyNode(t, web, &podwatch.Namespace{Meta: podwatch.Meta{Name: "other"}})
	mustAdd(t, n, attach(web))
	want := []string{"other/web uid-web has no condition but NotRequested"}
	if diff := cmp.Diff(want, n.j.reported()); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}
