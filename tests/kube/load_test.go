package kube

import (
	"encoding/json"
	"fmt"
	"sort"
	"strings"
	"testing"
	"time"
)

// appPeer is whom a server behind a sidecar sees, its own proxy, and appPeer6 if the
// client came by IPv6.
const appPeer, appPeer6 = "127.0.0.6", "::6"

const loadNamespace = "sluice-e2e"

// quietA and quietB are pods with a sidecar, one on each node, that only call when
// told to: their counters are those of a scenario's own calls.
const quietA, quietB = "quiet-a", "quiet-b"

// loaders are the pods that put load on others.
func (s *suite) loaders() []string { return append([]string{"load-a", "load-b"}, s.extra...) }

// These mirror the report of deploy/demo/bookshop load.
type (
	loadReport struct {
		Started time.Time
		Loads   map[string]counts
	}
	counts struct {
		Kind, Target              string
		Done, Failed, Connections int
		Peers, Errors             map[string]int
		LastError                 time.Time `json:"last_error"`
		Slowest                   time.Duration
	}
	// callReport is what /call of a load answers.
	callReport struct {
		Requests, Failed int
		Errors, By       map[string]int
		Hosts            map[string]int
		Local, Remote    string
		Last             *answer
		P50, P99, Max    time.Duration
	}
	answer struct {
		Service, Version, Host, Peer string
		Calls                        []struct {
			URL, Local, Remote string
			Answer             answer
		}
	}
)

func (s *suite) report(pod string) (loadReport, error) {
	var r loadReport
	b, err := s.proxy(loadNamespace, pod, 9080, "/report?reset")
	if err == nil {
		err = json.Unmarshal(b, &r)
	}
	return r, err
}

// reports of all loaders, as "pod/load".
func (s *suite) reports(t *testing.T) map[string]counts {
	t.Helper()
	out := map[string]counts{}
	for _, pod := range s.loaders() {
		var r loadReport
		s.eventually(t, 30*time.Second, "report of "+pod, func() (err error) {
			r, err = s.report(pod)
			return err
		})
		for name, c := range r.Loads {
			// A process that started anew has nothing to do with the one before.
			out[fmt.Sprintf("%s/%s@%d", pod, name, r.Started.UnixNano())] = c
		}
	}
	return out
}

// all is for underLoad: every load must be unharmed.
func all(string) bool { return true }

// underLoad does f while load is on, and fails the test if any load that clean
// says must be unharmed lost a request or a connection meanwhile, stood still, or
// reached a server past its sidecar. The scenario's numbers are those of these
// loads.
func (s *suite) underLoad(t *testing.T, clean func(load string) bool, f func()) {
	t.Helper()
	before := s.reports(t)
	f()
	// What began under the fault ends now.
	reached := s.reports(t)
	s.eventually(t, 30*time.Second, "every load goes on", func() error {
		now := s.reports(t)
		for name, c := range now {
			if clean(name) && c.Done <= reached[name].Done && c.Failed == reached[name].Failed {
				return fmt.Errorf("%s stands still at %d", name, c.Done)
			}
		}
		return nil
	})
	after := s.reports(t)
	names := make([]string, 0, len(after))
	for name := range after {
		names = append(names, name)
	}
	sort.Strings(names)
	var slowest time.Duration
	other := 0
	for _, name := range names {
		now, was := after[name], before[name]
		failed := now.Failed - was.Failed
		for peer, n := range now.Peers {
			if n -= was.Peers[peer]; n > 0 && peer != appPeer && !s.bypass {
				t.Errorf("%s: %d answers of servers that saw %s and not their proxy: reached past the sidecar", name, n, peer)
			}
		}
		if !clean(name) {
			other += failed
			continue
		}
		s.current.requests += now.Done - was.Done + failed
		slowest = max(slowest, reached[name].Slowest)
		broken := 0
		if now.Kind != "fresh" {
			broken = now.Connections - was.Connections
		}
		if _, known := before[name]; !known {
			t.Errorf("%s: the load started anew", name)
			continue
		}
		s.current.failed += max(failed, broken)
		if failed > 0 || broken > 0 {
			t.Errorf("%s (%s to %s): %d of %d failed, %d connections made anew: %s", name, now.Kind, now.Target, failed, now.Done-was.Done+failed, broken, newErrors(was, now))
		}
	}
	s.note("slowest %d ms", slowest.Milliseconds())
	if other > 0 {
		s.note("%d failed that may", other)
	}
}

func newErrors(was, now counts) string {
	var out []string
	for text, n := range now.Errors {
		if n -= was.Errors[text]; n > 0 {
			out = append(out, fmt.Sprintf("%dx %q", n, text))
		}
	}
	sort.Strings(out)
	return strings.Join(out, ", ")
}

// call makes a pod that runs bookshop load send n requests and counts them in
// the scenario's line.
func (s *suite) call(t *testing.T, namespace, pod string, n int, target string, query ...string) callReport {
	t.Helper()
	r, err := s.tryCall(namespace, pod, n, target, query...)
	if err != nil {
		t.Fatalf("call %s from %s/%s: %v", target, namespace, pod, err)
	}
	s.current.requests += r.Requests
	s.current.failed += r.Failed
	if r.Failed > 0 || r.Requests != n {
		t.Errorf("call %s from %s/%s: %d of %d failed: %v", target, namespace, pod, r.Failed, n, r.Errors)
	}
	if r.Last == nil {
		r.Last = &answer{}
	}
	return r
}

func (s *suite) tryCall(namespace, pod string, n int, target string, query ...string) (callReport, error) {
	var r callReport
	path := fmt.Sprintf("/call?n=%d&url=%s", n, target)
	for _, q := range query {
		path += "&" + q
	}
	b, err := s.proxy(namespace, pod, 9080, path)
	if err == nil {
		err = json.Unmarshal(b, &r)
	}
	return r, err
}
