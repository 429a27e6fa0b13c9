package podwatch

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/klog/v2"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
)

// A logLines is a log that can be asked.
type logLines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logLines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

// with returns the lines that have all the parts.
func (l *logLines) with(parts ...string) []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.DeleteFunc(strings.Split(strings.TrimSpace(l.b.String()), "\n"), func(line string) bool {
		return slices.ContainsFunc(parts, func(p string) bool { return !strings.Contains(line, p) })
	})
}

// A k8sTest is a source that runs against an apiServer.
type k8sTest struct {
	t      *testing.T
	api    *apiServer
	store  *Store
	source *Kubernetes
	log    *logLines
	stop   func()
}

// newK8s makes a source and does not run it.
func newK8s(t *testing.T, api *apiServer, retry time.Duration) *k8sTest {
	t.Helper()
	k := &k8sTest{t: t, api: api, store: NewStore(StoreOptions{}), log: &logLines{}}
	log := slog.New(slog.NewTextHandler(k.log, nil))
	var err error
	k.source, err = newKubernetes(KubernetesOptions{Store: k.store, Node: "n1", Log: log, Version: "1.2.3"}, api.config(), retry)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// run runs f until the test ends, and fails if that does not end it.
func (k *k8sTest) run(f func(context.Context) error) (stop func()) {
	k.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	stop = sync.OnceFunc(func() {
		k.t.Helper()
		cancel()
		select {
		case err := <-done:
			if err != nil {
				k.t.Errorf("Run = %v", err)
			}
		case <-time.After(5 * time.Second):
			k.t.Errorf("Run has not ended 5 s after its context:\n%s", stacks())
		}
	})
	k.t.Cleanup(stop)
	return stop
}

func startK8s(t *testing.T, api *apiServer) *k8sTest {
	t.Helper()
	k := newK8s(t, api, 10*time.Millisecond)
	t.Cleanup(func() { noGoroutines(t) })
	k.stop = k.run(k.source.Run)
	return k
}

func stacks() string {
	buf := make([]byte, 1<<20)
	return string(buf[:runtime.Stack(buf, true)])
}

// noGoroutines waits until nothing of the source runs any more.
func noGoroutines(t *testing.T) {
	t.Helper()
	ours := func() (left []string) {
		for _, g := range strings.Split(stacks(), "\n\n") {
			if strings.Contains(g, "client-go/tools/cache.") || strings.Contains(g, "podwatch.(*Kubernetes)") ||
				strings.Contains(g, "podwatch.(*Reporter)") || strings.Contains(g, "podwatch.(*Removal)") || strings.Contains(g, "podwatch.reflection") {
				left = append(left, g)
			}
		}
		return left
	}
	deadline := time.Now().Add(5 * time.Second)
	for len(ours()) > 0 && time.Now().Before(deadline) {
		time.Sleep(5 * time.Millisecond) // a poll
	}
	if left := ours(); len(left) > 0 {
		t.Errorf("%d goroutines are left:\n%s", len(left), strings.Join(left, "\n\n"))
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within 10 s", what)
		}
		time.Sleep(2 * time.Millisecond) // a poll
	}
}

func (k *k8sTest) synced() bool {
	select {
	case <-k.store.Synced():
		return true
	default:
		return false
	}
}

func (k *k8sTest) waitSynced() {
	k.t.Helper()
	eventually(k.t, "synced", k.synced)
	k.changes()
}

// changes takes the keys that have changed since the last call.
func (k *k8sTest) changes() []Key {
	k.store.mu.Lock()
	defer k.store.mu.Unlock()
	var keys []Key
	for key := range k.store.pending {
		keys = append(keys, key)
	}
	clear(k.store.pending)
	slices.SortFunc(keys, compareKeys)
	return keys
}

func (k *k8sTest) health(kind Kind) KindHealth {
	for _, h := range k.source.Health() {
		if h.Kind == kind {
			return h
		}
	}
	return KindHealth{}
}

func apiPod(name, node string, change ...func(*corev1.Pod)) *corev1.Pod {
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "shop", Name: name, UID: types.UID("uid-" + name), Labels: map[string]string{"app": name},
			Annotations: map[string]string{"sluice.dev/a": "1", corev1.LastAppliedConfigAnnotation: "large"},
		},
		Spec:   corev1.PodSpec{NodeName: node, Containers: []corev1.Container{{Name: "app", Ports: []corev1.ContainerPort{{ContainerPort: 80}}}}},
		Status: corev1.PodStatus{PodIPs: []corev1.PodIP{{IP: "10.1.0.1"}}},
	}
	for _, f := range change {
		f(p)
	}
	return p
}

func apiService(name, ip string) *corev1.Service {
	return &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, UID: types.UID("uid-" + name), Labels: map[string]string{"team": "a"}},
		Spec:       corev1.ServiceSpec{ClusterIP: ip, Selector: map[string]string{"app": name}, Ports: []corev1.ServicePort{{Port: 80}}},
	}
}

func apiSlice(name, service string, ips ...string) *discoveryv1.EndpointSlice {
	number, node := int32(8080), "n2"
	s := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: "shop", Name: name, UID: types.UID("uid-" + name), Labels: map[string]string{discoveryv1.LabelServiceName: service}},
		AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{{Port: &number}},
	}
	for _, ip := range ips {
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{
			Addresses: []string{ip}, NodeName: &node,
			Hints: &discoveryv1.EndpointHints{ForZones: []discoveryv1.ForZone{{Name: "north"}}},
		})
	}
	return s
}

func apiRoute(name string) *gatewayv1.HTTPRoute {
	return &gatewayv1.HTTPRoute{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, UID: types.UID("uid-" + name)},
		Spec: gatewayv1.HTTPRouteSpec{Rules: []gatewayv1.HTTPRouteRule{{
			Filters: []gatewayv1.HTTPRouteFilter{{Type: gatewayv1.HTTPRouteFilterURLRewrite}},
		}}},
	}
}

func apiNamespace(name string) *corev1.Namespace {
	return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, UID: types.UID("uid-" + name), Labels: map[string]string{"sluice.dev/inject": "enabled"}}}
}

func apiNode(name, zone string) *corev1.Node {
	return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, UID: types.UID("uid-" + name), Labels: map[string]string{corev1.LabelTopologyZone: zone}}}
}

func apiMeta(kind, namespace, name, uid string) *metav1.PartialObjectMetadata {
	return &metav1.PartialObjectMetadata{
		TypeMeta:   metav1.TypeMeta{Kind: kind},
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, UID: types.UID(uid)},
	}
}

func routeDefinition(uid string) *metav1.PartialObjectMetadata {
	return apiMeta(string(KindCRD), "", routeCRD, uid)
}

// shopAPI is a server with a few objects of each kind.
func shopAPI(t testing.TB) *apiServer {
	api := newAPIServer(t)
	api.put(
		apiNamespace("shop"), apiNode("n1", "north"), apiNode("n2", "south"),
		apiPod("web", "n1"), apiPod("elsewhere", "n2"), apiPod("nowhere", ""),
		apiService("web", "10.96.0.1"), apiSlice("web-1", "web", "10.1.0.1", "10.1.0.2"),
	)
	return api
}

// TestKubernetesReads reads and follows all kinds, in each way that a list and
// an encoding can come.
func TestKubernetesReads(t *testing.T) {
	for name, change := range map[string]func(*apiServer){
		"streamed":             func(*apiServer) {},
		"streamed as protobuf": func(s *apiServer) { s.protobuf = true },
		"listed":               func(s *apiServer) { s.noStreaming = true },
		"listed as protobuf":   func(s *apiServer) { s.noStreaming, s.protobuf = true, true },
	} {
		t.Run(name, func(t *testing.T) {
			api := shopAPI(t)
			change(api)
			k := startK8s(t, api)
			eventually(t, "synced", k.synced)

			want := []Object{
				&Namespace{Meta: Meta{Name: "shop", UID: "uid-shop", Labels: map[string]string{"sluice.dev/inject": "enabled"}}},
				&Node{Meta: Meta{Name: "n1", UID: "uid-n1"}, Zone: "north"},
				&Pod{
					Meta:       Meta{Namespace: "shop", Name: "web", UID: "uid-web", Labels: map[string]string{"app": "web"}, Annotations: map[string]string{"sluice.dev/a": "1"}},
					RuntimeUID: "uid-web", Node: "n1", ServiceAccount: "default",
					Containers: []Container{{Name: "app", Ports: []ContainerPort{{Port: 80}}}}, Addrs: addrs("10.1.0.1"),
				},
				&Service{
					Meta: Meta{Namespace: "shop", Name: "web", UID: "uid-web"}, ClusterIPs: addrs("10.96.0.1"),
					Selector: map[string]string{"app": "web"}, Ports: []ServicePort{{Port: 80, TargetPort: 80}},
				},
				&EndpointSlice{
					Meta: Meta{Namespace: "shop", Name: "web-1"}, Service: "web", Ports: []EndpointPort{{Port: 8080}},
					Endpoints: []Endpoint{
						{Addrs: addrs("10.1.0.1"), Ready: true, Serving: true, Node: "n2", ForZones: []string{"north"}},
						{Addrs: addrs("10.1.0.2"), Ready: true, Serving: true, Node: "n2", ForZones: []string{"north"}},
					},
				},
			}
			if diff := cmp.Diff(want, k.all(), equateAddrs); diff != "" {
				t.Errorf("objects (-want +got):\n%s", diff)
			}
			k.changes()

			api.put(apiPod("new", "n1"), apiService("web", "10.96.0.9"), apiNode("n1", "south"))
			api.remove(apiSlice("web-1", "web"))
			wantChanges := []Key{{KindEndpointSlice, "shop", "web-1"}, {KindNode, "", "n1"}, {KindPod, "shop", "new"}, {KindService, "shop", "web"}}
			var got []Key
			eventually(t, "changes", func() bool { got = append(got, k.changes()...); return len(got) >= len(wantChanges) })
			slices.SortFunc(got, compareKeys)
			if diff := cmp.Diff(wantChanges, got); diff != "" {
				t.Errorf("changes (-want +got):\n%s", diff)
			}
			if n, _ := Get[*Node](k.store, "", "n1"); n.Zone != "south" {
				t.Errorf("zone = %s, want south", n.Zone)
			}
			api.mu.Lock()
			defer api.mu.Unlock()
			if !api.agents["sluice-agent/1.2.3"] || len(api.agents) != 1 {
				t.Errorf("user agents %v, want sluice-agent/1.2.3 alone", api.agents)
			}
			for i, accept := range api.accepted {
				if wantProto := !strings.Contains(api.requests[i], "httproutes"); strings.HasPrefix(accept, protobufType) != wantProto {
					t.Errorf("%s accepts %q", api.requests[i], accept)
				}
			}
		})
	}
}

// all returns everything in the store.
func (k *k8sTest) all() []Object {
	var all []Object
	add := func(kind Kind) {
		keys := k.store.keys(kind)
		slices.SortFunc(keys, compareKeys)
		for _, key := range keys {
			o, _ := k.store.Get(key)
			all = append(all, o)
		}
	}
	for _, kind := range []Kind{KindNamespace, KindNode, KindPod, KindService, KindEndpointSlice, KindHTTPRoute} {
		add(kind)
	}
	return all
}

// TestKubernetesCut: a watch that ends is taken up where it was.
func TestKubernetesCut(t *testing.T) {
	api := shopAPI(t)
	api.noStreaming = true
	k := startK8s(t, api)
	k.waitSynced()
	eventually(t, "watches", func() bool { return api.count("watch services") == 2 }) // the first was to be a streamed list
	for i := range 3 {
		api.bookmark() // so that the watch had something to say
		contact := k.health(KindService).LastContact
		eventually(t, "bookmark", func() bool { return k.health(KindService).LastContact.After(contact) })
		api.put(apiService(fmt.Sprint("s", i), "10.96.0.7"))
		eventually(t, "service", func() bool { return len(k.store.Services()) == 2+i })
		api.cutWatches()
		eventually(t, "next watch", func() bool { return api.count("watch services") == 3+i })
	}
	api.put(apiService("last", "10.96.0.8"))
	eventually(t, "last service", func() bool { return len(k.store.Services()) == 5 })
	if n := api.count("list services"); n != 1 {
		t.Errorf("listed %d times, want once", n)
	}
	if lines := k.log.with(""); len(lines) > 1 || lines[0] != "" {
		t.Errorf("log: %q, want nothing", lines)
	}
}

// TestKubernetesAway stops the server for so long that all must be listed anew:
// what was deleted meanwhile goes, what is as before is no change.
func TestKubernetesAway(t *testing.T) {
	for name, streaming := range map[string]bool{"streamed": true, "listed": false} {
		t.Run(name, func(t *testing.T) {
			api := shopAPI(t)
			api.noStreaming = !streaming
			for i := range 50 {
				api.put(apiService(fmt.Sprint("s", i), "10.96.0.7"), apiSlice(fmt.Sprint("e", i), "s", "10.1.0.1"))
			}
			k := startK8s(t, api)
			k.waitSynced()
			before := k.all()

			api.down()
			eventually(t, "error", func() bool { return k.health(KindPod).Err != nil && k.health(KindService).Err != nil })
			if err := k.health(KindPod).Err.Error(); !strings.Contains(err, "reach API server http://"+api.address) {
				t.Errorf("error %q, want it to say which server cannot be reached", err)
			}
			if err := k.health(KindPod).Err; !NoAnswer(err) {
				t.Errorf("error %q of a server that is away is no lack of an answer", err)
			}
			if diff := cmp.Diff(before, k.all(), equateAddrs); diff != "" {
				t.Errorf("the last state has not stayed (-want +got):\n%s", diff)
			}
			last := k.health(KindService).LastContact
			api.remove(apiService("s7", ""), apiPod("web", ""))
			api.put(apiPod("web", "n1", func(p *corev1.Pod) { p.UID = "another" }), apiNamespace("more"))
			api.remove(apiSlice("e3", "s"))
			api.compact()
			api.up()

			want := []Key{{KindEndpointSlice, "shop", "e3"}, {KindNamespace, "", "more"}, {KindPod, "shop", "web"}, {KindService, "shop", "s7"}}
			eventually(t, "recovery", func() bool {
				return !slices.ContainsFunc(k.source.Health(), func(h KindHealth) bool { return h.Err != nil || !h.LastContact.After(last) }) &&
					len(k.store.Namespaces()) == 2 && len(k.store.Services()) == 50 && len(k.store.EndpointSlices()) == 50
			})
			var got []Key
			eventually(t, "pod", func() bool {
				got = append(got, k.changes()...)
				p, _ := Get[*Pod](k.store, "shop", "web")
				return p != nil && p.UID == "another" && len(got) >= len(want)
			})
			slices.SortFunc(got, compareKeys)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("changes after the outage (-want +got):\n%s", diff)
			}
			if lines := k.log.with("level=WARN"); len(lines) != 1 {
				t.Errorf("%d warnings, want one for the outage:\n%s", len(lines), strings.Join(lines, "\n"))
			}
			if lines := k.log.with("can be read again"); len(lines) != 1 {
				t.Errorf("%d lines on the end, want one:\n%s", len(lines), strings.Join(lines, "\n"))
			}
		})
	}
}

// TestKubernetesAwayAtStart: nothing is read, it is known why, and it goes on
// when the server is there.
func TestKubernetesAwayAtStart(t *testing.T) {
	api := shopAPI(t)
	api.down()
	k := startK8s(t, api)
	eventually(t, "errors", func() bool {
		h := k.source.Health()
		return len(h) == 6 && !slices.ContainsFunc(h, func(h KindHealth) bool { return h.Err == nil || h.Synced || !h.LastContact.IsZero() })
	})
	if k.synced() {
		t.Error("synced without a server")
	}
	api.up()
	k.waitSynced()
	eventually(t, "health", func() bool {
		return !slices.ContainsFunc(k.source.Health(), func(h KindHealth) bool { return h.Err != nil || !h.Synced || h.LastContact.IsZero() })
	})
}

// TestKubernetesEndsWhileAway: Run does not wait for the next attempt.
func TestKubernetesEndsWhileAway(t *testing.T) {
	for name, streaming := range map[string]bool{"streamed": true, "listed": false} {
		t.Run(name, func(t *testing.T) {
			api := shopAPI(t)
			api.noStreaming = !streaming
			k := newK8s(t, api, time.Hour)
			t.Cleanup(func() { noGoroutines(t) })
			stop := k.run(k.source.Run)
			k.waitSynced()
			eventually(t, "watch", func() bool { return api.count("watch pods") > 0 && (streaming || api.count("watch pods") > 1) })
			contact := k.health(KindPod).LastContact
			api.bookmark() // after a watch that said nothing it would be listed at the next attempt
			eventually(t, "bookmark", func() bool { return k.health(KindPod).LastContact.After(contact) })
			api.down()
			eventually(t, "error", func() bool { return k.health(KindPod).Err != nil })
			stop()
		})
	}
}

// TestKubernetesRefused: what is wrong with the credentials or the role is said
// by name, and nothing counts as read before it was.
func TestKubernetesRefused(t *testing.T) {
	for name, tc := range map[string]struct {
		refuse map[string]int
		kind   Kind
		want   []string
	}{
		"no right to list": {
			map[string]int{"list endpointslices": http.StatusForbidden, "watch endpointslices": http.StatusForbidden},
			KindEndpointSlice,
			[]string{"403", `verb "list"`, `resource "endpointslices"`, `API group "discovery.k8s.io"`},
		},
		"no right to see what is defined": {
			map[string]int{"list customresourcedefinitions": http.StatusForbidden, "watch customresourcedefinitions": http.StatusForbidden},
			KindCRD,
			[]string{"403", `verb "list"`, `resource "customresourcedefinitions"`, `API group "apiextensions.k8s.io"`},
		},
		"bad credentials": {
			map[string]int{"list pods": http.StatusUnauthorized, "watch pods": http.StatusUnauthorized},
			KindPod,
			[]string{"401", "credentials", "http://127.0.0.1:"},
		},
		"a server that fails": {
			map[string]int{"list nodes": http.StatusInternalServerError, "watch nodes": http.StatusInternalServerError},
			KindNode,
			[]string{"list nodes", "asked to fail"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			api := shopAPI(t)
			api.refuse = tc.refuse
			k := startK8s(t, api)
			eventually(t, "several attempts", func() bool {
				return api.count("list "+strings.ToLower(string(tc.kind))+"s") >= 3 && k.health(tc.kind).Err != nil
			})
			for _, part := range tc.want {
				eventually(t, "error with "+part, func() bool {
					err := k.health(tc.kind).Err
					return err != nil && strings.Contains(err.Error(), part)
				})
			}
			if k.synced() {
				t.Error("synced although a kind was not read")
			}
			// One for each verb, however often it was tried.
			if lines := k.log.with("level=WARN"); len(lines) > 2 {
				t.Errorf("%d warnings:\n%s", len(lines), strings.Join(lines, "\n"))
			}
			api.set(func() { api.refuse = nil })
			k.waitSynced()
		})
	}
}

// TestKubernetesWatchForbidden: a role with list alone reads, but does not follow.
func TestKubernetesWatchForbidden(t *testing.T) {
	api := shopAPI(t)
	api.refuse = map[string]int{"watch services": http.StatusForbidden}
	k := startK8s(t, api)
	k.waitSynced()
	eventually(t, "attempts", func() bool { return api.count("watch services") > 4 })
	if err := k.health(KindService).Err; err == nil || !strings.Contains(err.Error(), `verb "watch" on resource "services"`) {
		t.Errorf("error %v, want the verb that is missing", err)
	}
	if lines := k.log.with("level=WARN"); len(lines) != 1 {
		t.Errorf("%d warnings, want one:\n%s", len(lines), strings.Join(lines, "\n"))
	}
}

// TestKubernetesSlow: one slow kind holds up no other, but all that wait for
// everything to be read; and not the end.
func TestKubernetesSlow(t *testing.T) {
	api := shopAPI(t)
	stall := make(chan int)
	api.stall["watch services"] = stall
	k := startK8s(t, api)
	eventually(t, "the others", func() bool { return len(k.store.EndpointSlices()) == 1 && len(k.store.Pods()) == 1 })
	if k.synced() || k.health(KindService).Synced {
		t.Error("synced although services were not read")
	}
	api.set(func() { delete(api.stall, "watch services") })
	close(stall)
	k.waitSynced()

	api.set(func() { api.stall["watch pods"], api.stall["list pods"] = make(chan int), make(chan int) })
	api.cutWatches()
	eventually(t, "watch", func() bool { return api.count("watch pods") > 1 })
	k.stop()
}

// TestKubernetesRoutes: HTTPRoutes come and go with their definition.
func TestKubernetesRoutes(t *testing.T) {
	api := shopAPI(t)
	k := startK8s(t, api)
	k.waitSynced()
	for round := range 2 {
		// The definition is there a moment before the API serves it.
		api.put(routeDefinition(fmt.Sprint("crd", round)), apiRoute("r"))
		seen := api.count("list httproutes")
		eventually(t, "attempts", func() bool { return api.count("list httproutes") > seen+1 })
		api.set(func() { delete(api.unserved, "httproutes") })
		eventually(t, "route", func() bool { return len(k.store.Routes()) == 1 })
		want := []Problem{{Object: "HTTPRoute shop/r", Field: "spec.rules[0].filters[0].type", Message: "Forbidden: URLRewrite is not supported: the rule answers 500"}}
		if diff := cmp.Diff(want, k.source.Problems()); diff != "" {
			t.Errorf("problems (-want +got):\n%s", diff)
		}
		api.put(apiRoute("later"))
		eventually(t, "later route", func() bool { return len(k.store.Routes()) == 2 })

		// When it is deleted, the server takes its objects away first, or the
		// watch is cut before that is seen.
		if round == 0 {
			api.remove(apiRoute("r"), apiRoute("later"))
		} else {
			api.set(func() { clear(api.objects["httproutes"]) })
		}
		api.set(func() { api.unserved["httproutes"] = true })
		api.cutWatches()
		api.remove(routeDefinition(""))
		eventually(t, "no routes", func() bool { return len(k.store.Routes()) == 0 && k.health(KindHTTPRoute).Kind == "" })
		if p := k.source.Problems(); len(p) > 0 {
			t.Errorf("problems of routes that are gone: %v", p)
		}
		asked := api.count("list httproutes") + api.count("watch httproutes")
		api.bookmark()
		eventually(t, "contact", func() bool { return k.health(KindCRD).Err == nil })
		if now := api.count("list httproutes") + api.count("watch httproutes"); now != asked {
			t.Errorf("HTTPRoutes are asked for although there are none")
		}
	}
	if lines := k.log.with("level=WARN"); len(lines) > 0 {
		t.Errorf("log:\n%s", strings.Join(lines, "\n"))
	}
}

// TestKubernetesRoutesAtStart: if there are routes, all is read only with them.
func TestKubernetesRoutesAtStart(t *testing.T) {
	api := shopAPI(t)
	delete(api.unserved, "httproutes")
	api.put(routeDefinition("crd"), apiRoute("r"))
	stall := make(chan int)
	api.stall["watch httproutes"] = stall
	k := startK8s(t, api)
	eventually(t, "the others", func() bool {
		return !slices.ContainsFunc(k.source.Health(), func(h KindHealth) bool { return h.Kind != KindHTTPRoute && !h.Synced })
	})
	eventually(t, "request", func() bool { return api.count("watch httproutes") == 1 })
	if k.synced() {
		t.Error("synced without the routes")
	}
	close(stall)
	k.waitSynced()
	wantNames(t, "routes", k.store.Routes(), "shop/r")
}

// TestKubernetesUnusable: a field that cannot be used is named, the rest is used.
func TestKubernetesUnusable(t *testing.T) {
	api := shopAPI(t)
	api.put(apiService("old", "010.96.0.1"), apiSlice("old-1", "old", "10.1.0.7", "010.1.0.1"))
	k := startK8s(t, api)
	k.waitSynced()
	want := []Problem{
		{Object: "EndpointSlice shop/old-1", Field: "endpoints[1].addresses[0]", Message: `Invalid value: "010.1.0.1": must be an IPv4 or IPv6 address`},
		{Object: "Service shop/old", Field: "spec.clusterIPs[0]", Message: `Invalid value: "010.96.0.1": must be an IPv4 or IPv6 address`},
	}
	if diff := cmp.Diff(want, k.source.Problems()); diff != "" {
		t.Errorf("problems (-want +got):\n%s", diff)
	}
	if s := k.store.SlicesOf("shop", "old"); len(s) != 1 || len(s[0].Endpoints) != 1 {
		t.Errorf("slices %+v, want the one good endpoint", s)
	}
	api.put(apiService("old", "10.96.0.1"))
	api.remove(apiSlice("old-1", "old"))
	eventually(t, "no problems", func() bool { return len(k.source.Problems()) == 0 })
}

// TestNewKubernetes: options that cannot work are refused at once.
func TestNewKubernetes(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	good := write("good", `{"clusters":[{"name":"c","cluster":{"server":"https://192.0.2.1:6443"}}],"contexts":[{"name":"x","context":{"cluster":"c"}}],"current-context":"x"}`)
	for name, tc := range map[string]struct {
		options KubernetesOptions
		want    string
	}{
		"good":           {KubernetesOptions{Kubeconfig: good, Store: NewStore(StoreOptions{}), Node: "n1"}, ""},
		"no store":       {KubernetesOptions{Kubeconfig: good, Node: "n1"}, "no store"},
		"no node":        {KubernetesOptions{Kubeconfig: good, Store: NewStore(StoreOptions{})}, "no name of this node"},
		"no such file":   {KubernetesOptions{Kubeconfig: dir + "/absent"}, "read kubeconfig " + dir + "/absent"},
		"no kubeconfig":  {KubernetesOptions{Kubeconfig: write("text", "hello")}, "read kubeconfig"},
		"not in cluster": {KubernetesOptions{}, "give a kubeconfig"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := NewKubernetes(tc.options)
			if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
				t.Errorf("NewKubernetes = %v, want %q", err, tc.want)
			}
		})
	}
}

// TestRedirectKlog: the client library's own lines are in our log.
func TestRedirectKlog(t *testing.T) {
	var lines logLines
	RedirectKlog(slog.New(slog.NewTextHandler(&lines, &slog.HandlerOptions{Level: slog.LevelDebug})))
	t.Cleanup(klog.ClearLogger)
	klog.Errorf("token of %s", "nobody")
	klog.InfoS("warming up")
	if got := lines.with("level=WARN", "token of nobody"); len(got) != 1 {
		t.Errorf("errors: %q, want one warning", got)
	}
	if got := lines.with("level=DEBUG", "warming up"); len(got) != 1 {
		t.Errorf("infos: %q, want one debug message", got)
	}
}

func addrs(list ...string) (out []netip.Addr) {
	for _, s := range list {
		out = append(out, addr(s))
	}
	return out
}
