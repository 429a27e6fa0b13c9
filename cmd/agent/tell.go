package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/sluicemesh/sluice/pkg/podwatch"
	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/pkg/xds/server"
)

// A reporter tells people about pods. *podwatch.Reporter is one; a nil one
// reports nothing.
type reporter interface {
	Report(pod podwatch.PodRef, c podwatch.Condition)
	Withdraw(pod podwatch.PodRef, c podwatch.Condition)
	Event(pod podwatch.PodRef, kind, reason, message string)
}

// A backendChoice knows which backend a pod has and why the node has not another
// one. *redirect.Chosen is one.
type backendChoice interface {
	BackendOf(redirect.ID) redirect.Backend
	Backend() redirect.Backend
	Reason() string
}

// Reasons of conditions and events.
const (
	reasonRedirected     = "Redirected"
	reasonNotRequested   = "NotRequested"
	reasonFailed         = "RedirectionFailed"
	reasonBadAnnotation  = "BadAnnotation"
	reasonPartlyServed   = "ConfigIncomplete"
	reasonConfigRejected = "ConfigRejected"
	reasonFallback       = "BackendFallback"
	reasonAdopted        = "Adopted"
)

// told is what a pod's condition and events said last. Only what changes is said:
// a bad annotation must not become an event at every check.
type told struct {
	condition       podwatch.Condition
	failure, partly string
	fallback        bool
}

// tell reports the outcome of bring. A pod that never asked for redirection is
// left alone: nobody looks for the condition there.
func (a *agent) tell(box sandbox, state *podState, err, partly error) {
	pod := podwatch.PodRef{Namespace: box.Namespace, Name: box.Name, UID: box.PodUID}
	event := func(last *string, err error, reason string) {
		text := ""
		if err != nil {
			text = inOneLine(err.Error())
		}
		if text != "" && text != *last {
			a.reporter.Event(pod, podwatch.EventWarning, reason, text)
		}
		*last = text
	}
	event(&state.told.failure, err, failureReason(err))
	event(&state.told.partly, partly, reasonPartlyServed)

	var c podwatch.Condition
	switch {
	case err != nil:
		c = podwatch.Condition{Reason: failureReason(err), Message: inOneLine(err.Error())}
		if state.workload != nil {
			c.Status = true // as it was before
		}
	case state.workload != nil:
		used := a.backend.BackendOf(box.id())
		c = podwatch.Condition{Status: true, Reason: reasonRedirected, Message: fmt.Sprintf("TCP connections lead through the sidecar (%s)", used)}
		if why := a.backend.Reason(); why != "" && used == a.backend.Backend() && !state.told.fallback {
			state.told.fallback = true
			a.reporter.Event(pod, podwatch.EventWarning, reasonFallback, fmt.Sprintf("redirected by %s: %s", used, why))
		}
	default:
		c = podwatch.Condition{Reason: reasonNotRequested, Message: "the pod no longer asks to be redirected"}
		if state.told.condition == (podwatch.Condition{}) {
			a.reporter.Withdraw(pod, c) // what an earlier agent said
			return
		}
	}
	if c != state.told.condition {
		state.told.condition = c
		a.reporter.Report(pod, c)
	}
}

// tellRejections makes events of what sidecars refuse to take.
func (a *agent) tellRejections() {
	for _, s := range a.sidecars.Status() {
		for _, r := range s.Rejected {
			uid, _, _ := strings.Cut(s.Pod.UID, "@") // see redirect.ID
			a.reporter.Event(podwatch.PodRef{Namespace: s.Pod.Namespace, Name: s.Pod.Name, UID: uid}, podwatch.EventWarning, reasonConfigRejected,
				"the sidecar "+rejection(r))
		}
	}
}

// failureReason is the reason that goes with an error, empty for nil.
func failureReason(err error) string {
	if err == nil {
		return ""
	}
	var bad *redirect.AnnotationError
	if errors.As(err, &bad) {
		return reasonBadAnnotation
	}
	return reasonFailed
}

// rejection says what a sidecar does not take.
func rejection(r server.Rejection) string {
	kind := r.TypeURL[strings.LastIndexByte(r.TypeURL, '.')+1:]
	return fmt.Sprintf("rejects %s %s: %s", kind, r.Name, inOneLine(r.Error))
}

func inOneLine(text string) string { return strings.ReplaceAll(text, "\n", "; ") }
