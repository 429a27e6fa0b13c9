package server

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/google/go-cmp/cmp"

	"github.com/sluicemesh/sluice/pkg/xds"
)

// A model does what Envoy does with what it is sent: for each cluster it asks
// for endpoints, for each listener for the route that its text names. It checks
// that no route leads to a cluster that is not there with its endpoints.
type model struct {
	*client
	done chan struct{} // closed when the stream was read to its end

	mu   sync.Mutex
	have [numTypes]map[string]string
	errs []string
}

func (m *model) run() {
	defer close(m.done)
	for resp := range m.in {
		m.mu.Lock()
		m.apply(resp)
		m.mu.Unlock()
	}
}

func (m *model) apply(resp *discovery.DeltaDiscoveryResponse) {
	t, _ := typeOf(resp.GetTypeUrl())
	next := [numTypes]int{clusters: endpoints, listeners: routes}
	for _, x := range resp.GetResources() {
		old, had := m.have[t][x.GetName()]
		if !m.wants(t, x.GetName()) {
			continue // it crossed the request that gave the name up
		}
		text := textOf(x.GetResource())
		m.have[t][x.GetName()] = text
		if n := next[t]; n != 0 {
			if t == listeners && old != text && had {
				m.dropRoute(old)
			}
			name := x.GetName()
			if t == listeners {
				name = text
			}
			if _, ok := m.have[n][name]; !ok || t == clusters {
				m.trySend(&discovery.DeltaDiscoveryRequest{TypeUrl: typeURLs[n], ResourceNamesSubscribe: []string{name}})
			}
		}
	}
	for _, name := range resp.GetRemovedResources() {
		text := m.have[t][name]
		delete(m.have[t], name)
		switch t {
		case clusters:
			m.drop(endpoints, name)
		case listeners:
			m.dropRoute(text)
		}
	}
	for name, text := range m.have[routes] {
		for c := range strings.FieldsSeq(text) {
			if !strings.Contains(c, "/") {
				continue // version
			}
			if m.have[clusters][c] == "" || m.have[endpoints][c] == "" || m.have[endpoints][c] == "empty" {
				m.errs = append(m.errs, fmt.Sprintf("after %q: route %s=%q leads to %s, which is %q with endpoints %q", describe(resp), name, text, c,
					m.have[clusters][c], m.have[endpoints][c]))
			}
		}
	}
	m.trySend(&discovery.DeltaDiscoveryRequest{TypeUrl: resp.GetTypeUrl(), ResponseNonce: resp.GetNonce()})
}

// wants says whether the client is still subscribed to a name.
func (m *model) wants(t int, name string) bool {
	switch {
	case name == "none":
		return true
	case t == endpoints:
		return m.have[clusters][name] != ""
	case t == routes:
		return slices.Contains(slices.Collect(maps.Values(m.have[listeners])), name)
	}
	return true
}

func (m *model) drop(t int, name string) {
	if _, ok := m.have[t][name]; ok {
		delete(m.have[t], name)
		m.trySend(&discovery.DeltaDiscoveryRequest{TypeUrl: typeURLs[t], ResourceNamesUnsubscribe: []string{name}})
	}
}

// dropRoute drops a route unless some listener leads to it.
func (m *model) dropRoute(name string) {
	if !slices.Contains(slices.Collect(maps.Values(m.have[listeners])), name) {
		m.drop(routes, name)
	}
}

// trySend ignores errors: the stream may be the one that the test just ended.
func (m *model) trySend(req *discovery.DeltaDiscoveryRequest) { _ = m.g.Send(req) }

// connect asks for everything, and says what m has.
func (m *model) connect(r *rig, pod string) {
	m.client = r.delta(pod)
	for t := range m.have {
		req := &discovery.DeltaDiscoveryRequest{TypeUrl: typeURLs[t], InitialResourceVersions: maps.Clone(m.have[t])}
		switch t {
		case endpoints:
			req.ResourceNamesSubscribe = append(sorted(m.have[clusters]), "none")
		case routes:
			req.ResourceNamesSubscribe = append(slices.Sorted(maps.Values(m.have[listeners])), "none")
		}
		m.send(req)
	}
	m.done = make(chan struct{})
	go m.run()
}

// seed is TEST_SEED, or random.
func seed(t *testing.T) uint64 {
	n := uint64(time.Now().UnixNano())
	if s := os.Getenv("TEST_SEED"); s != "" {
		var err error
		if n, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("TEST_SEED=%d", n)
	return n
}

func TestClientsEndUpWithTheStore(t *testing.T) {
	rnd := rand.New(rand.NewPCG(seed(t), 1))
	// Nothing may come about by a timeout.
	r := start(t, Options{RemoveTimeout: time.Minute}).ready()
	want := map[string][numTypes]map[string]string{} // by owner
	models := map[string]*model{}
	for _, pod := range []string{"a", "b", "c"} {
		r.set(pod)
		m := &model{}
		for ty := range m.have {
			m.have[ty] = map[string]string{}
		}
		m.connect(r, pod)
		models[pod] = m
	}
	// change replaces a service: up to four clusters, and a route over them
	// that some listeners lead to.
	change := func(i int) {
		owner := fmt.Sprintf("s%d", rnd.IntN(6))
		var w [numTypes]map[string]string
		for ty := range w {
			w[ty] = map[string]string{}
		}
		if rnd.IntN(4) > 0 {
			text := fmt.Sprint(i)
			for k := range 4 {
				if rnd.IntN(2) == 0 {
					c := fmt.Sprintf("%s/%d", owner, k)
					w[clusters][c] = fmt.Sprintf("c%d", rnd.IntN(2))
					w[endpoints][c] = fmt.Sprintf("e%d+%s", rnd.IntN(3), w[clusters][c])
					text += " " + c
				}
			}
			w[routes][owner] = text
			for k := range rnd.IntN(3) {
				w[listeners][fmt.Sprintf("%s-%d", owner, k)] = owner
			}
		}
		want[owner] = w
		r.share(owner, flatten(w)...)
	}
	for i := range 400 {
		change(i)
		if rnd.IntN(40) == 0 { // a connection breaks at any point
			for _, pod := range sorted(models) {
				if rnd.IntN(2) == 0 {
					m := models[pod]
					m.end()
					<-m.done
					m.connect(r, pod)
				}
			}
		}
		if rnd.IntN(5) == 0 {
			// Sometimes everything calms down, mostly changes pile up.
			r.until("all pods have everything", func() bool { return synced(r.Status()) })
		}
	}
	for _, pod := range sorted(models) {
		m := models[pod]
		var diff string
		end := time.Now().Add(patience)
		for {
			m.mu.Lock()
			diff = cmp.Diff(expected(want), m.have)
			errs := m.errs
			m.mu.Unlock()
			if len(errs) > 0 {
				t.Fatalf("pod %s: %d times broken, first: %s", pod, len(errs), errs[0])
			}
			if diff == "" {
				break
			}
			if time.Now().After(end) {
				t.Fatalf("pod %s has not what the store has (-want +got):\n%s\n%+v", pod, diff, r.Status())
			}
			time.Sleep(time.Millisecond)
		}
	}
}

func synced(all []PodStatus) bool {
	for _, p := range all {
		if p.Streams == 0 || len(p.Types) < numTypes {
			return false
		}
		for _, ty := range p.Types {
			if !ty.Synced {
				return false
			}
		}
	}
	return true
}

func flatten(w [numTypes]map[string]string) (all []xds.Resource) {
	for t := range w {
		for _, name := range sorted(w[t]) {
			all = append(all, res(t, name, w[t][name]))
		}
	}
	return all
}

// expected is what a client has in the end.
func expected(want map[string][numTypes]map[string]string) (all [numTypes]map[string]string) {
	for t := range all {
		all[t] = map[string]string{}
	}
	all[endpoints]["none"], all[routes]["none"] = "empty", "empty"
	for owner, w := range want {
		maps.Copy(all[clusters], w[clusters])
		maps.Copy(all[endpoints], w[endpoints])
		maps.Copy(all[listeners], w[listeners])
		if len(w[listeners]) > 0 {
			all[routes][owner] = w[routes][owner]
		}
	}
	return all
}
