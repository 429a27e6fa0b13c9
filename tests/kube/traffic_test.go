package kube

import (
	"encoding/json"
	"fmt"
	"math"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

const outside = "sluice-e2e-outside"

// trafficSettles is how long statistics may take to show what was sent: Envoy
// hands its workers' counters to the main thread every five seconds.
const trafficSettles = 15 * time.Second

// A stat is a counter of a pod that must rise by at least so much.
type stat struct {
	pod     corev1.Pod
	proxy   bool // of its sidecar, else of the agent
	name    string
	labels  []string
	atLeast float64
}

func (st stat) value(s *suite, t *testing.T) float64 {
	labels := append([]string{"namespace=" + st.pod.Namespace, "pod=" + st.pod.Name}, st.labels...)
	if st.proxy {
		return s.proxies(t, st.pod.Spec.NodeName).sum(st.name, labels...)
	}
	return s.metrics(t, st.pod.Spec.NodeName).sum(st.name, labels...)
}

// rising does f and expects these counters to rise by it.
func (s *suite) rising(t *testing.T, stats []stat, f func()) {
	t.Helper()
	before := make([]float64, len(stats))
	for i, st := range stats {
		before[i] = st.value(s, t)
	}
	f()
	for i, st := range stats {
		s.eventually(t, trafficSettles, fmt.Sprintf("%s %v of %s/%s rises", st.name, st.labels, st.pod.Namespace, st.pod.Name), func() error {
			if rose := st.value(s, t) - before[i]; rose < st.atLeast {
				return fmt.Errorf("by %g, want %g", rose, st.atLeast)
			}
			return nil
		})
	}
}

func captured(p corev1.Pod, direction string, atLeast float64) stat {
	return stat{pod: p, name: "sluice_connections_total", labels: []string{"direction=" + direction, "verdict=redirected"}, atLeast: atLeast}
}

func served(p corev1.Pod, atLeast float64) stat {
	return stat{pod: p, proxy: true, name: "envoy_http_downstream_rq_total", atLeast: atLeast}
}

func sent(p corev1.Pod, atLeast float64) stat {
	return stat{pod: p, proxy: true, name: "envoy_cluster_upstream_rq_total", atLeast: atLeast}
}

// behindProxies fails the test if a server that has a sidecar was reached past
// it. Servers of the namespace outside have none.
func behindProxies(t *testing.T, a answer) {
	t.Helper()
	host, _, _ := net.SplitHostPort(a.Peer)
	if host != appPeer && a.Version != "outside" {
		t.Errorf("%s on %s saw %s, want its own proxy, %s", a.Service, a.Host, a.Peer, appPeer)
	}
	for _, c := range a.Calls {
		behindProxies(t, c.Answer)
	}
}

// everyPod fails the test if the calls did not reach all these pods.
func everyPod(t *testing.T, r callReport, pods []corev1.Pod) {
	t.Helper()
	for _, p := range pods {
		if r.Hosts[p.Name] == 0 {
			t.Errorf("no answer of %s on %s: %v", p.Name, p.Spec.NodeName, r.Hosts)
		}
	}
}

func (s *suite) byNode(t *testing.T, pods []corev1.Pod) {
	t.Helper()
	nodes := map[string]bool{}
	for _, p := range pods {
		nodes[p.Spec.NodeName] = true
	}
	if !nodes[s.a] || !nodes[s.b] {
		t.Fatalf("pods are on %v, want both %s and %s", nodes, s.a, s.b)
	}
}

// adopted: the pod that is older than Sluice has become ready and is captured.
func (s *suite) adopted(t *testing.T) {
	s.allReady(t, 2*time.Minute, "sluice-e2e-older", "", 1)
	p := s.pod(t, "sluice-e2e-older", "older")
	s.redirected(t, p)
	s.rising(t, []stat{captured(p, "inbound", 5), served(p, 5), captured(p, "outbound", 5)}, func() {
		r := s.call(t, outside, "plain-b", 5, "http://"+p.Status.PodIP+":9080/", "new-connections=true")
		behindProxies(t, *r.Last)
		s.call(t, "sluice-e2e-older", "older", 5, "http://details.bookshop.svc.cluster.local:9080/", "new-connections=true")
	})
}

// redirected waits until the agent has said so in the pod's status.
func (s *suite) redirected(t *testing.T, p corev1.Pod) {
	t.Helper()
	s.eventually(t, 30*time.Second, "condition of "+p.Name, func() error {
		now := s.pod(t, p.Namespace, p.Name)
		c := condition(&now, "sluice.dev/Redirected")
		if c == nil || c.Status != corev1.ConditionTrue {
			return fmt.Errorf("sluice.dev/Redirected is %+v", c)
		}
		return nil
	})
}

// calls: the bookshop, pods of both nodes at every hop.
func (s *suite) calls(t *testing.T) {
	page, details := s.pods(t, "bookshop", "app=productpage"), s.pods(t, "bookshop", "app=details")
	ratings := s.pods(t, "bookshop", "app=ratings")
	s.byNode(t, page)
	s.byNode(t, details)
	for _, p := range slices.Concat(page, details) {
		s.redirected(t, p)
	}
	client := s.pod(t, loadNamespace, quietA)
	const n = 60
	var r callReport
	stats := []stat{sent(client, n), captured(client, "outbound", n)}
	for _, p := range page {
		stats = append(stats, served(p, 1), sent(p, 2), captured(p, "inbound", 1))
	}
	s.rising(t, stats, func() {
		r = s.call(t, loadNamespace, quietA, n, "http://productpage.bookshop.svc.cluster.local:9080/", "new-connections=true", "c=4")
	})
	behindProxies(t, *r.Last)
	everyPod(t, r, slices.Concat(page, details, ratings))
	if r.By["productpage v1"] != n || r.By["details v1"] != n || r.By["reviews v1"]+r.By["reviews v2"]+r.By["reviews v3"] != n {
		t.Errorf("answers: %v, want %d of each", r.By, n)
	}
	s.note("p50 %.1f ms, p99 %.1f ms", float64(r.P50.Microseconds())/1000, float64(r.P99.Microseconds())/1000)
}

// services of every kind, from a pod with a sidecar. The client does nothing else:
// what its counters rise by are these calls.
func (s *suite) services(t *testing.T) {
	shelf := s.pods(t, "bookshop", "app=shelf")
	client := s.pod(t, loadNamespace, quietA)
	// through is a request that the client's Envoy sent by that cluster of its own.
	through := func(cluster string, n float64) []stat {
		by := sent(client, n)
		by.labels = []string{"envoy_cluster_name=" + cluster}
		return []stat{captured(client, "outbound", n), by}
	}
	call := func(n int, host string) callReport {
		return s.call(t, loadNamespace, quietA, n, "http://"+host+".svc.cluster.local:9080/", "new-connections=true")
	}
	for _, p := range shelf {
		s.rising(t, []stat{captured(client, "outbound", 10), captured(p, "inbound", 10), served(p, 10)}, func() {
			r := call(10, p.Name+".shelf.bookshop")
			behindProxies(t, *r.Last)
			if r.Hosts[p.Name] != 10 {
				t.Errorf("the name of %s led to %v", p.Name, r.Hosts)
			}
		})
	}
	s.rising(t, []stat{captured(client, "outbound", 30)}, func() {
		r := call(30, "shelf.bookshop")
		behindProxies(t, *r.Last)
		// Which of the addresses it dials is the client's business.
		if r.By["details v1"] != 30 {
			t.Errorf("headless: answers of %v", r.By)
		}
	})
	for _, host := range []string{"publisher.bookshop", "details.outside"} {
		s.rising(t, through("out/outside/details/9080", 10), func() {
			r := call(10, host)
			if r.By["details outside"] != 10 {
				t.Errorf("%s: answers of %v", host, r.By)
			}
			if peer, _, _ := net.SplitHostPort(r.Last.Peer); peer != client.Status.PodIP {
				t.Errorf("%s: a server without a sidecar saw %s, want %s", host, r.Last.Peer, client.Status.PodIP)
			}
		})
	}
	s.rising(t, append(through("out/"+loadNamespace+"/self/80", 10), served(client, 20)), func() {
		r := s.call(t, loadNamespace, quietA, 10, "http://self.sluice-e2e.svc.cluster.local/", "new-connections=true")
		behindProxies(t, *r.Last)
		if r.Hosts[quietA] != 10 {
			t.Errorf("own service: answers of %v", r.Hosts)
		}
	})
	// The proxy may have kept the connection to itself that it made for an earlier call.
	if self := s.metrics(t, s.a).sum("sluice_connections_total", "namespace="+loadNamespace, "pod="+quietA, "reason=self_call"); self == 0 {
		t.Errorf("the proxy of %s never called its own pod through its inbound side", quietA)
	}
	s.note("headless, StatefulSet, ExternalName, no sidecars, own Service")
}

// doors: ways into a pod with a sidecar for those who have none.
func (s *suite) doors(t *testing.T) {
	page := s.pods(t, "bookshop", "app=productpage")
	echoA, echoB := s.pod(t, loadNamespace, "echo-a"), s.pod(t, loadNamespace, "echo-b")
	doors := s.pod(t, "sluice-e2e-doors", "doors")
	var svc corev1.Service
	if err := s.get("/api/v1/namespaces/sluice-e2e-doors/services/doors", &svc); err != nil {
		t.Fatal(err)
	}
	nodePort := svc.Spec.Ports[0].NodePort
	s.rising(t, []stat{captured(page[0], "inbound", 1), captured(page[1], "inbound", 1)}, func() {
		for _, pod := range []string{"plain-a", "plain-b"} {
			r := s.call(t, outside, pod, 20, "http://productpage.bookshop.svc.cluster.local:9080/", "new-connections=true")
			behindProxies(t, *r.Last)
			everyPod(t, r, page)
		}
	})
	// The port is also probed: a connection from the node is captured if it is not the kubelet's.
	for _, p := range []corev1.Pod{echoA, echoB} {
		s.rising(t, []stat{captured(p, "inbound", 10), served(p, 10)}, func() {
			b, err := s.proxy(outside, "host-a", 19080, "/call?n=10&new-connections=true&url="+url.QueryEscape("http://"+p.Status.PodIP+":9080/"))
			if err != nil {
				t.Fatal(err)
			}
			var r callReport
			if err := json.Unmarshal(b, &r); err != nil || r.Failed > 0 || r.Last == nil {
				t.Fatalf("from the node's network to %s: %s, %v", p.Name, b, err)
			}
			s.current.requests += r.Requests
			behindProxies(t, *r.Last)
		})
	}
	s.rising(t, []stat{captured(doors, "inbound", 30), served(doors, 30)}, func() {
		for _, target := range []string{
			fmt.Sprintf("http://%s:%d/", s.nodeIP(t, s.a), nodePort), fmt.Sprintf("http://%s:%d/", s.nodeIP(t, s.b), nodePort),
			fmt.Sprintf("http://%s:19088/", s.nodeIP(t, s.b)),
		} {
			r := s.call(t, outside, "plain-a", 10, target, "new-connections=true")
			behindProxies(t, *r.Last)
			if r.Hosts["doors"] != 10 {
				t.Errorf("%s: answers of %v", target, r.Hosts)
			}
		}
	})
	// Pods on the node's network and of excluded namespaces are left alone.
	for _, p := range slices.Concat(s.pods(t, outside, ""), s.pods(t, "kube-system", "")) {
		if c := condition(&p, "sluice.dev/Redirected"); c != nil {
			t.Errorf("%s/%s has a condition: %+v", p.Namespace, p.Name, c)
		}
		for _, direction := range []string{"inbound", "outbound"} {
			if n := captured(p, direction, 0).value(s, t); n > 0 {
				t.Errorf("%s/%s: %g %s connections were redirected", p.Namespace, p.Name, n, direction)
			}
		}
	}
	s.note("no sidecar, hostNetwork, NodePort on both nodes, hostPort")
}

// dualStack: the same pods by their IPv6 addresses, of the same node and the other,
// for clients with a sidecar and without.
func (s *suite) dualStack(t *testing.T) {
	details := s.pods(t, "bookshop", "app=details")
	s.byNode(t, details)
	for _, p := range details {
		six := ""
		for _, ip := range p.Status.PodIPs {
			if strings.Contains(ip.IP, ":") {
				six = ip.IP
			}
		}
		if six == "" {
			s.note("%s has no IPv6 address: %v", p.Name, p.Status.PodIPs)
			if s.lab != "" {
				t.Fatal("the lab's pods have addresses of both families")
			}
			t.Skip("the cluster's pods have IPv4 alone")
		}
		for _, from := range []struct{ namespace, pod string }{{loadNamespace, quietA}, {outside, "plain-a"}} {
			stats := []stat{captured(p, "inbound", 1), served(p, 10)}
			if from.namespace == loadNamespace {
				client := s.pod(t, loadNamespace, from.pod)
				stats = append(stats, captured(client, "outbound", 10))
			}
			s.rising(t, stats, func() {
				r := s.call(t, from.namespace, from.pod, 10, "http://["+six+"]:9080/", "new-connections=true")
				if r.Hosts[p.Name] != 10 {
					t.Errorf("%s: answers of %v, want %s", six, r.Hosts, p.Name)
				}
				// The proxy dials the application by that family's address of its own.
				if peer, _, _ := net.SplitHostPort(r.Last.Peer); peer != appPeer6 {
					t.Errorf("%s saw %s, want its own proxy, %s", p.Name, peer, appPeer6)
				}
			})
		}
	}
	s.note("same node and across, with a sidecar and without")
}

func (s *suite) nodeIP(t *testing.T, node string) string {
	t.Helper()
	var n corev1.Node
	if err := s.get("/api/v1/nodes/"+node, &n); err != nil {
		t.Fatal(err)
	}
	for _, a := range n.Status.Addresses {
		if a.Type == corev1.NodeInternalIP {
			return a.Address
		}
	}
	t.Fatalf("node %s has no internal address", node)
	return ""
}

// egress: an address that the cluster knows nothing of, which is this machine's.
func (s *suite) egress(t *testing.T) {
	api, err := url.Parse(s.base)
	if err != nil {
		t.Fatal(err)
	}
	probe, err := net.Dial("udp", net.JoinHostPort(api.Hostname(), "9"))
	if err != nil {
		t.Fatal(err)
	}
	own, _, _ := net.SplitHostPort(probe.LocalAddr().String())
	_ = probe.Close()
	l, err := net.Listen("tcp", net.JoinHostPort(own, "0"))
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{ReadHeaderTimeout: 5 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_ = json.NewEncoder(w).Encode(map[string]string{"service": "elsewhere", "version": "outside", "peer": r.RemoteAddr})
	})}
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(l) }()
	defer func() { _ = server.Close(); <-done }()
	target := "http://" + l.Addr().String() + "/"
	if r, err := s.tryCall(outside, "plain-a", 1, target); err != nil || r.Failed > 0 {
		s.note("pods without a sidecar do not reach %s either", l.Addr())
		t.Skipf("no way from the pods to this machine: %v %v", err, r.Errors)
	}
	for _, from := range []string{quietA, quietB} {
		client := s.pod(t, loadNamespace, from)
		s.rising(t, []stat{captured(client, "outbound", 10), {pod: client, proxy: true, name: "envoy_cluster_upstream_cx_total", labels: []string{"envoy_cluster_name=passthrough"}, atLeast: 10}}, func() {
			r := s.call(t, loadNamespace, from, 10, target, "new-connections=true")
			if r.By["elsewhere outside"] != 10 {
				t.Errorf("answers of %v", r.By)
			}
		})
	}
}

// routes: the Gateway API's kinds come after Sluice, or are there before it.
func (s *suite) routes(t *testing.T) {
	var crd struct{ Metadata struct{ Name string } }
	err := s.get("/apis/apiextensions.k8s.io/v1/customresourcedefinitions/httproutes.gateway.networking.k8s.io", &crd)
	switch {
	case notFound(err):
		out, err := command(s.ctx, "", "go", "list", "-m", "-f", "{{.Dir}}", "sigs.k8s.io/gateway-api")
		if err != nil {
			t.Fatal(err)
		}
		s.kubectl(t, "", "apply", "--server-side", "-f", strings.TrimSpace(out)+"/config/crd/standard/gateway.networking.k8s.io_httproutes.yaml")
		s.eventually(t, 30*time.Second, "HTTPRoutes are served", func() error {
			// What kubectl asks for lags behind what is served.
			out, err := command(s.ctx, "", "kubectl", "api-resources", "--api-group=gateway.networking.k8s.io", "--no-headers")
			if err == nil && !strings.Contains(out, "HTTPRoute") {
				err = fmt.Errorf("kubectl knows %q", out)
			}
			return err
		})
		s.note("CRDs installed after Sluice")
	case err != nil:
		t.Fatal(err)
	default:
		s.note("CRDs were there before Sluice")
	}
	began := time.Now()
	s.apply(t, s.bookshop(t, "routes.yaml"))
	const page = "http://productpage.bookshop.svc.cluster.local:9080/"
	s.eventually(t, time.Minute, "the route is in force", func() error {
		r, err := s.tryCall(loadNamespace, "load-a", 20, page, "cookie=user%3Dtester")
		if err == nil && r.By["reviews v2"] != 20 {
			err = fmt.Errorf("answers: %v, errors: %v", r.By, r.Errors)
		}
		return err
	})
	s.note("in force after %.1f s", time.Since(began).Seconds())
	const n = 500
	r := s.call(t, loadNamespace, "load-b", n, page, "c=8")
	if r.By["reviews v2"] > 0 {
		t.Errorf("reviews v2 answered %d times without the cookie", r.By["reviews v2"])
	}
	// Four standard deviations of a binomial distribution.
	if off := math.Abs(float64(r.By["reviews v3"]) - n/10); off > 4*math.Sqrt(n*0.1*0.9) {
		t.Errorf("reviews v3 answered %d of %d, want about 10%%", r.By["reviews v3"], n)
	}
	s.note("weights 90/10: %d/%d", r.By["reviews v1"], r.By["reviews v3"])
}
