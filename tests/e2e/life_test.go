package e2e

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/vishvananda/netlink"

	"github.com/sluicemesh/sluice/tests/need"
	"github.com/sluicemesh/sluice/tests/netnstest"
	"github.com/sluicemesh/sluice/tests/sluicetest"
)

func TestMain(m *testing.M) { os.Exit(netnstest.VerifyNoLeaks(m)) }

// A load makes requests until it is stopped: half of its workers keep their
// connections, half make a new one for each request.
type load struct {
	stop     context.CancelFunc
	wg       sync.WaitGroup
	requests atomic.Int64
	mu       sync.Mutex
	failures []string
}

func startLoad(t *testing.T, client *sluicetest.Pod, url string) *load {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	l := &load{stop: cancel}
	for i := range 4 {
		l.wg.Go(func() {
			c := client.HTTPClient(i%2 == 0)
			for ctx.Err() == nil {
				code, body, _, err := fetch(c, url)
				l.requests.Add(1)
				if err != nil || code != http.StatusOK {
					l.mu.Lock()
					l.failures = append(l.failures, fmt.Sprintf("%s: %d %q %v", time.Now().Format("15:04:05.000"), code, body, err))
					l.mu.Unlock()
				}
			}
		})
	}
	t.Cleanup(func() { cancel(); l.wg.Wait() })
	return l
}

// more waits until a number of further requests was made.
func (l *load) more(t *testing.T, count int64) {
	t.Helper()
	want := l.requests.Load() + count
	sluicetest.Eventually(t, func() bool { return l.requests.Load() >= want }, func() string { return "the load makes no progress" })
}

// finish ends the load and fails the test if one request failed.
func (l *load) finish(t *testing.T) {
	t.Helper()
	l.stop()
	l.wg.Wait()
	t.Logf("%d requests, %d failed", l.requests.Load(), len(l.failures))
	if len(l.failures) > 0 {
		t.Errorf("%d of %d requests failed, first: %s", len(l.failures), l.requests.Load(), l.failures[0])
	}
}

// TestAgentKilled: while the agent is away, ended or killed, running connections
// and new ones go on as before; a new agent takes over without a gap.
func TestAgentKilled(t *testing.T) {
	sluicetest.EachBackend(t, func(t *testing.T, backend string) {
		n, client, _ := newPair(t, backend)
		held := dialFrom(t, client, vip4+":82")
		r := bufio.NewReader(held)
		mustEcho(t, held, r)
		inbound := n.Connections(t, `pod="server"`, `direction="inbound"`, `verdict="redirected"`)
		load := startLoad(t, client, "http://"+vip4+"/")
		load.more(t, 100)
		for i := range 3 {
			if i == 0 { // asked to end it leaves everything as it is, too
				n.EndAgent(t)
			} else {
				n.KillAgent()
			}
			load.more(t, 200)
			mustEcho(t, held, r)
			n.StartAgent(t)
			load.more(t, 200)
			mustEcho(t, held, r)
		}
		load.finish(t)
		if after := n.Connections(t, `pod="server"`, `direction="inbound"`, `verdict="redirected"`); after <= inbound {
			t.Errorf("redirected inbound connections were %v and are %v: counters were lost", inbound, after)
		}
		// The new agent serves changes to Envoys that knew the old one.
		n.Service(t, "later", "10.96.7.9", "fd00:96::79", `{name: http, port: 80, targetPort: 8080}`)
		client.WaitService(t, "later", 80, 0)
	})
}

// TestRollingEndpoints replaces the pod behind a service under load, as a
// Deployment does: the new one is there, the old one terminates and leaves the
// endpoints, then it dies.
func TestRollingEndpoints(t *testing.T) {
	sluicetest.EachBackend(t, func(t *testing.T, backend string) {
		n := sluicetest.New(t, backend)
		n.Service(t, "web", vip4, vip6, `{name: http, port: 80, targetPort: 8080}`)
		apply := func(name, metadata, ready string) {
			yaml := n.PodYAML(name, sluicetest.PodSpec{Metadata: ", labels: {app: web}" + metadata})
			n.Apply(t, "pod-"+name+".yaml", strings.TrimSuffix(yaml, "}")+fmt.Sprintf(", status: {conditions: [{type: Ready, status: %q}]}}", ready))
		}
		start := func(name string) *sluicetest.Pod { // ready once its application listens
			apply(name, "", "False")
			p := n.Sandbox(t, name)
			if err := p.Add(t); err != nil {
				t.Fatal(err)
			}
			p.StartEnvoy(t)
			serve(t, p)
			apply(name, "", "True")
			return p
		}
		client := n.Pod(t, "client", sluicetest.PodSpec{})
		old := start("web-0")
		client.WaitService(t, "web", 80, 1)
		load := startLoad(t, client, "http://"+vip4+"/")
		load.more(t, 100)
		for i := 1; i <= 3; i++ {
			next := start(fmt.Sprintf("web-%d", i))
			client.WaitService(t, "web", 80, 2)
			load.more(t, 100)

			changed := time.Now()
			apply(old.Name, `, deletionTimestamp: "2026-01-01T00:00:00Z"`, "True")
			client.WaitService(t, "web", 80, 1)
			took := time.Since(changed)
			t.Logf("the endpoint left the client's Envoy after %v", took.Round(time.Millisecond))
			if took > time.Second {
				t.Errorf("a change reached the client's Envoy after %v, want within a second", took)
			}
			load.more(t, 100)
			old.Envoy.Stop()
			old.Del(t)
			if err := os.Remove(filepath.Join(n.Source, "pod-"+old.Name+".yaml")); err != nil {
				t.Fatal(err)
			}
			load.more(t, 100)
			old = next
		}
		load.finish(t)
		old.Envoy.Stop()
		old.Del(t)
	})
}

// TestFailClosed: while a pod's Envoy does not listen, nobody reaches the bare
// application and the pod reaches nobody; both are counted; when Envoy is back
// everything works again.
func TestFailClosed(t *testing.T) {
	sluicetest.EachBackend(t, func(t *testing.T, backend string) {
		n, client, server := newPair(t, backend)
		plain := n.Pod(t, "plain", sluicetest.PodSpec{Plain: true})
		direct := netip.AddrPortFrom(server.Addr4, 8082).String()
		before := dialFrom(t, plain, direct)
		mustEcho(t, before, bufio.NewReader(before))

		server.Envoy.Stop()
		client.Envoy.Stop()
		for what, dial := range map[string]struct {
			from *sluicetest.Pod
			to   string
		}{"inbound": {plain, direct}, "outbound": {client, netip.AddrPortFrom(plain.Addr4, 9).String()}} {
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			c, err := dial.from.Dial(ctx, "tcp", dial.to)
			cancel()
			if err == nil {
				_ = c.Close()
				t.Errorf("%s: a connection was made while no Envoy listens", what)
			} else {
				t.Logf("%s: %v", what, err)
			}
		}
		if backend == "ebpf" {
			if denied := n.Connections(t, `pod="server"`, `direction="inbound"`, `verdict="denied"`); denied < 1 {
				t.Errorf("%v denied inbound connections were counted, want at least 1", denied)
			}
		}
		server.StartEnvoy(t)
		client.StartEnvoy(t)
		client.WaitService(t, "server", 82, 1)
		c := dialFrom(t, client, vip4+":82")
		mustEcho(t, c, bufio.NewReader(c))
	})
}

// TestInterfaceReplaced: what arrives on an interface that was deleted and made anew,
// under its name and addresses, goes to the proxy, and the agent mends the pod at once,
// not at the next check.
func TestInterfaceReplaced(t *testing.T) {
	sluicetest.EachBackend(t, func(t *testing.T, backend string) {
		n, _, server := newPair(t, backend)
		plain := n.Pod(t, "plain", sluicetest.PodSpec{Plain: true})
		captured := func() error {
			// A SYN that is dropped comes again after a second.
			c := &http.Client{Timeout: 3 * time.Second, Transport: plain.HTTPClient(false).Transport}
			_, _, header, err := fetch(c, "http://"+netip.AddrPortFrom(server.Addr4, 8080).String())
			if from := header.Get("X-Remote"); err == nil && !strings.HasPrefix(from, "127.0.0.6:") {
				t.Fatalf("the application is called from %s, past its proxy", from)
			}
			return err
		}
		if err := captured(); err != nil {
			t.Fatal(err)
		}
		replaceInterface(t, n, server)
		if err := captured(); err != nil {
			t.Fatal(err)
		}
		sluicetest.Eventually(t, func() bool {
			_, body, err := n.Get("/readyz")
			return err == nil && strings.Contains(body, " 0 with a problem")
		}, func() string { return "the pod has a problem" })
	})
}

// replaceInterface deletes a pod's eth0 and makes another that looks the same.
func replaceInterface(t *testing.T, n *sluicetest.Node, p *sluicetest.Pod) {
	t.Helper()
	inside := func(ns netnstest.Namespace, fn func(h *netlink.Handle) error) {
		t.Helper()
		err := ns.Do(func() error {
			h, err := netlink.NewHandle()
			if err != nil {
				return err
			}
			defer h.Close()
			return fn(h)
		})
		if err != nil {
			t.Fatalf("replace eth0 of pod %s: %v", p.Name, err)
		}
	}
	file, err := os.Open(p.Netns)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = file.Close() }()
	var mac net.HardwareAddr // neighbours know it
	var addrs []netlink.Addr
	var routes []netlink.Route
	inside(p.Namespace, func(h *netlink.Handle) error {
		eth0, err := h.LinkByName("eth0")
		if err != nil {
			return err
		}
		mac = eth0.Attrs().HardwareAddr
		if addrs, err = h.AddrList(eth0, netlink.FAMILY_ALL); err != nil {
			return err
		}
		if routes, err = h.RouteList(eth0, netlink.FAMILY_V4); err != nil {
			return err
		}
		return h.LinkDel(eth0)
	})
	inside(n.Namespace, func(h *netlink.Handle) error {
		bridge, err := h.LinkByName("cni0")
		if err != nil {
			return err
		}
		veth := &netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: "anew", MasterIndex: bridge.Attrs().Index, Flags: net.FlagUp},
			PeerName:  "eth0", PeerNamespace: netlink.NsFd(file.Fd()), PeerHardwareAddr: mac,
		}
		return h.LinkAdd(veth)
	})
	inside(p.Namespace, func(h *netlink.Handle) error {
		eth0, err := h.LinkByName("eth0")
		if err != nil {
			return err
		}
		errs := []error{h.LinkSetUp(eth0)}
		for _, a := range addrs {
			if a.IP.To4() != nil {
				errs = append(errs, h.AddrAdd(eth0, &netlink.Addr{IPNet: a.IPNet}))
			}
		}
		for _, r := range routes {
			if r.Gw != nil {
				r.LinkIndex = eth0.Attrs().Index
				errs = append(errs, h.RouteReplace(&r))
			}
		}
		return errors.Join(errs...)
	})
}

// TestPolicyChangesLive: an annotation takes effect on a running pod for new
// connections, and an established one does not notice.
func TestPolicyChangesLive(t *testing.T) {
	sluicetest.EachBackend(t, func(t *testing.T, backend string) {
		n, client, _ := newPair(t, backend)
		plain := n.Pod(t, "plain", sluicetest.PodSpec{Plain: true})
		plain.ServeTCP(t, 7000, func(c *net.TCPConn) { _, _ = io.Copy(c, c) })
		to := netip.AddrPortFrom(plain.Addr4, 7000).String()
		captured := func() bool {
			t.Helper()
			before := client.Stat(t, `^cluster\.passthrough.*\.upstream_cx_total$`)
			c := dialFrom(t, client, to)
			mustEcho(t, c, bufio.NewReader(c))
			_ = c.Close()
			return client.Stat(t, `^cluster\.passthrough.*\.upstream_cx_total$`) == before+1
		}
		held := dialFrom(t, client, to)
		r := bufio.NewReader(held)
		mustEcho(t, held, r)
		if !captured() {
			t.Fatal("a connection was not captured before the policy changed")
		}
		status := fmt.Sprintf(`"name":"client","uid":"uid-client","redirected":true,"backend":"%s","sidecar":"synced"`, backend)
		if _, body, err := n.Get("/status"); err != nil || !strings.Contains(body, status) {
			t.Errorf("/status lacks %s: %v\n%s", status, err, body)
		}
		for _, step := range []struct {
			annotations string
			want        bool
		}{
			{`sluice.dev/exclude-outbound-ports: "7000"`, false},
			{`traffic.sidecar.istio.io/excludeOutboundPorts: "7001"`, true},
			{fmt.Sprintf(`traffic.sidecar.istio.io/excludeOutboundIPRanges: "%s/32"`, plain.Addr4), false},
			{``, true},
		} {
			n.Apply(t, "pod-client.yaml", n.PodYAML("client", sluicetest.PodSpec{Metadata: ", labels: {app: client}, annotations: {" + step.annotations + "}"}))
			sluicetest.Eventually(t, func() bool { return captured() == step.want }, func() string {
				return fmt.Sprintf("with annotations {%s} captured is not %v", step.annotations, step.want)
			})
			mustEcho(t, held, r)
		}

		// A bad value is named and what was in force stays.
		n.Apply(t, "pod-client.yaml", n.PodYAML("client", sluicetest.PodSpec{Metadata: `, labels: {app: client}, annotations: {sluice.dev/exclude-outbound-ports: "7000,seven"}`}))
		sluicetest.Eventually(t, func() bool {
			_, body, err := n.Get("/readyz")
			return err == nil && strings.Contains(body, "sluice.dev/exclude-outbound-ports") && strings.Contains(body, "seven")
		}, func() string { return "/readyz does not name the annotation and the token" })
		if !captured() {
			t.Error("a policy with a bad value took effect in part")
		}

		// Capture off and on again.
		n.Apply(t, "pod-client.yaml", n.PodYAML("client", sluicetest.PodSpec{Metadata: `, labels: {app: client, sluice.dev/redirect: disabled}`}))
		sluicetest.Eventually(t, func() bool { return !captured() }, func() string { return "capture is not off" })
		n.Apply(t, "pod-client.yaml", n.PodYAML("client", sluicetest.PodSpec{}))
		sluicetest.Eventually(t, captured, func() string { return "capture is not on again" })
	})
}

// TestOutboundPolicy: a pod may be kept from what no service describes, and be
// let go again, while it runs.
func TestOutboundPolicy(t *testing.T) {
	sluicetest.EachBackend(t, func(t *testing.T, backend string) {
		n, client, _ := newPair(t, backend)
		plain := n.Pod(t, "plain", sluicetest.PodSpec{Plain: true})
		plain.ServeTCP(t, 7000, func(c *net.TCPConn) { _, _ = io.Copy(c, c) })
		reaches := func() bool {
			c := dialFrom(t, client, netip.AddrPortFrom(plain.Addr4, 7000).String())
			defer func() { _ = c.Close() }()
			_, _ = io.WriteString(c, "x\n")
			line, _ := bufio.NewReader(c).ReadString('\n')
			return line == "x\n"
		}
		for _, policy := range []string{"passthrough", "block", "passthrough"} {
			n.Apply(t, "pod-client.yaml", n.PodYAML("client", sluicetest.PodSpec{Metadata: ", labels: {app: client}, annotations: {sluice.dev/outbound-policy: " + policy + "}"}))
			sluicetest.Eventually(t, func() bool { return reaches() == (policy == "passthrough") }, func() string { return "outbound policy " + policy + " has no effect" })
			if code, body, _, err := fetch(client.HTTPClient(false), "http://"+vip4+"/"); err != nil || code != 200 {
				t.Errorf("with outbound policy %s a service answers %d %q, %v", policy, code, body, err)
			}
		}
	})
}

// TestCNIVerbs sends CHECK, GC and STATUS through the real chain.
func TestCNIVerbs(t *testing.T) {
	sluicetest.EachBackend(t, func(t *testing.T, backend string) {
		n, client, _ := newPair(t, backend)
		ask := func(f func() error) error { return n.Namespace.Do(f) }
		check := func() error {
			return ask(func() error { return n.CNI.CheckNetworkList(t.Context(), n.Chain, client.Runtime) })
		}
		status := func() error { return ask(func() error { return n.CNI.GetStatusNetworkList(t.Context(), n.Chain) }) }
		if err := check(); err != nil {
			t.Errorf("CHECK of a pod that is redirected: %v", err)
		}
		if err := status(); err != nil {
			t.Errorf("STATUS of an agent that is ready: %v", err)
		}
		// Someone takes a part of the redirection away.
		breakIt := client.Command(t, 0, "ip", "-6", "address", "del", "::6/128", "dev", "lo")
		if out, err := breakIt.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if err := check(); err == nil || !strings.Contains(err.Error(), "::6") {
			t.Errorf("CHECK of a pod without ::6: %v; want an error that names it", err)
		}
		redirected := func() bool {
			_, body, err := n.Get("/metrics")
			return err == nil && strings.Contains(body, "\nsluice_pods{state=\"redirected\"} 2\n")
		}
		if !redirected() {
			t.Error("not both pods are redirected")
		}
		gc := func(valid ...types.GCAttachment) error {
			return ask(func() error {
				return n.CNI.GCNetworkList(t.Context(), n.Chain, &libcni.GCArgs{ValidAttachments: valid})
			})
		}
		all := []types.GCAttachment{{ContainerID: "c-client", IfName: "eth0"}, {ContainerID: "c-server", IfName: "eth0"}}
		if err := gc(all...); err != nil || !redirected() {
			t.Errorf("GC that keeps all: %v, both redirected: %v", err, redirected())
		}
		if err := gc(all[1]); err != nil || redirected() {
			t.Errorf("GC that keeps the server alone: %v, both redirected: %v", err, redirected())
		}
		n.KillAgent()
		if err := status(); err == nil {
			t.Error("STATUS succeeds without an agent")
		}
	})
}

// TestBackendChangesLive moves a running pod from eBPF to iptables and back.
func TestBackendChangesLive(t *testing.T) {
	if only := os.Getenv("BACKEND"); only == "iptables" {
		t.Skip("BACKEND=iptables: needs a node with eBPF")
	}
	n, client, _ := newPair(t, "ebpf")
	load := startLoad(t, client, "http://"+vip4+"/")
	load.more(t, 50)
	rules := func() bool {
		out := client.Command(t, 0, "iptables-save", "-t", "nat")
		b, err := out.CombinedOutput()
		return err == nil && strings.Contains(string(b), "15001")
	}
	for _, backend := range []string{"iptables", "ebpf"} {
		n.Apply(t, "pod-client.yaml", n.PodYAML("client", sluicetest.PodSpec{Metadata: ", labels: {app: client}, annotations: {sluice.dev/backend: " + backend + "}"}))
		sluicetest.Eventually(t, func() bool { return rules() == (backend == "iptables") }, func() string { return "the pod did not move to " + backend })
		load.more(t, 100)
	}
	load.finish(t)
}

// TestRoutes follows an HTTPRoute: a weight, a cookie, a header change, and
// what matches nothing.
func TestRoutes(t *testing.T) {
	n := sluicetest.New(t, "auto")
	n.Service(t, "web", vip4, vip6, `{name: http, port: 80, targetPort: 8080}`)
	client := n.Pod(t, "client", sluicetest.PodSpec{})
	for i, name := range []string{"v1", "v2"} {
		n.Service(t, name, fmt.Sprintf("10.96.7.%d", 11+i), fmt.Sprintf("fd00:96::7%d", i+2), `{name: http, port: 80, targetPort: 8080}`)
		serve(t, n.Pod(t, name, sluicetest.PodSpec{}))
		client.WaitService(t, name, 80, 1)
	}
	n.Apply(t, "route.yaml", `
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: web, namespace: e2e}
spec:
  parentRefs: [{group: "", kind: Service, name: web}]
  rules:
  - matches: [{path: {type: PathPrefix, value: /shop}, headers: [{name: cookie, type: RegularExpression, value: "(.*; *)?user=ada(;.*)?"}]}]
    filters: [{type: ResponseHeaderModifier, responseHeaderModifier: {set: [{name: x-version, value: two}]}}]
    backendRefs: [{name: v2, port: 80}]
  - matches: [{path: {type: PathPrefix, value: /shop}}]
    backendRefs: [{name: v1, port: 80, weight: 90}, {name: v2, port: 80, weight: 10}]
  - matches: [{path: {type: Exact, value: /broken}}]
    backendRefs: [{name: missing, port: 80}]
`)
	c := client.HTTPClient(true)
	applied := time.Now()
	sluicetest.Eventually(t, func() bool {
		code, _, _, err := fetch(c, "http://"+vip4+"/nothing")
		return err == nil && code == http.StatusNotFound
	}, func() string { return "what matches no rule is not answered 404" })
	if took := time.Since(applied); took > time.Second {
		t.Errorf("the route took effect after %v, want within a second", took)
	}
	if code, _, _, err := fetch(c, "http://"+vip4+"/broken"); err != nil || code != http.StatusInternalServerError {
		t.Errorf("a backend that is not there answers %d, %v; want 500", code, err)
	}
	for range 20 {
		_, body, header, err := fetch(c, "http://"+vip4+"/shop/cart", "Cookie", "a=b; user=ada")
		if err != nil || !strings.HasPrefix(body, "v2 ") || header.Get("X-Version") != "two" {
			t.Fatalf("with the cookie: %q, x-version %q, %v; want v2", body, header.Get("X-Version"), err)
		}
	}
	const count = 1000
	second := 0
	for range count {
		code, body, _, err := fetch(c, "http://"+vip4+"/shop")
		if err != nil || code != 200 {
			t.Fatalf("answer %d %q, %v", code, body, err)
		}
		if strings.HasPrefix(body, "v2 ") {
			second++
		}
	}
	// Six standard deviations of a binomial distribution: fails by chance once in 10^9 runs.
	if slack := 6 * math.Sqrt(count*.1*.9); math.Abs(float64(second)-count*.1) > slack {
		t.Errorf("%d of %d requests went to the backend with weight 10 of 100", second, count)
	}
	t.Logf("%d of %d requests went to the backend with weight 10 of 100", second, count)
}

// TestBrokenDocument: it is reported with file, line and field, and what was
// there before stays.
func TestBrokenDocument(t *testing.T) {
	n, client, _ := newPair(t, "auto")
	n.Apply(t, "service-server.yaml", "apiVersion: v1\nkind: Service\nmetadata: {name: server, namespace: e2e}\nspec:\n  clusterIP: 10.96.7.1\n  ports:\n  - {name: http, port: eighty}\n")
	sluicetest.Eventually(t, func() bool {
		_, body, err := n.Get("/readyz")
		return err == nil && strings.Contains(body, "service-server.yaml:7") && strings.Contains(body, "spec.ports[0].port")
	}, func() string {
		_, body, _ := n.Get("/readyz")
		return "/readyz does not name file, line and field:\n" + body
	})
	if code, body, _, err := fetch(client.HTTPClient(false), "http://"+vip4+"/"); err != nil || code != 200 {
		t.Errorf("after a broken change the service answers %d %q, %v", code, body, err)
	}
}

// TestXDSSocketIsTheProxysAlone: any other process of the pod is refused.
func TestXDSSocketIsTheProxysAlone(t *testing.T) {
	n := sluicetest.New(t, "auto")
	p := n.Pod(t, "a", sluicetest.PodSpec{})
	err := p.Do(func() error {
		c, err := net.Dial("unix", "@sluice/xds")
		if err != nil {
			return fmt.Errorf("dial: %w", err)
		}
		defer func() { _ = c.Close() }()
		_ = c.SetDeadline(time.Now().Add(sluicetest.Deadline))
		if _, err := io.WriteString(c, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"); err != nil {
			return nil // refused before it was read
		}
		if n, err := c.Read(make([]byte, 1)); n > 0 || os.IsTimeout(err) {
			return errors.New("a process that is not the proxy was served")
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// TestFallback: on a node that cannot have eBPF, `auto` takes iptables, says why
// once in the log, in /readyz and in a metric, and everything works.
func TestFallback(t *testing.T) {
	need.Tool(t, "unshare")
	n := sluicetest.New(t, "auto")
	n.KillAgent()
	n.Uninstall(t)
	n.Service(t, "server", vip4, vip6, serverPorts)
	server, client := n.Sandbox(t, "server"), n.Sandbox(t, "client")
	// A mount namespace without cgroup v2. What is mounted later does not show
	// in it, so the sandboxes are there already.
	n.Wrap = []string{"unshare", "--mount", "--propagation", "slave", "sh", "-c", `umount --lazy --all --types cgroup2 && exec "$@"`, "sh"}
	n.StartAgent(t)
	for _, p := range []*sluicetest.Pod{server, client} {
		n.Apply(t, "pod-"+p.Name+".yaml", n.PodYAML(p.Name, sluicetest.PodSpec{}))
		if err := p.Add(t); err != nil {
			t.Fatal(err)
		}
		p.StartEnvoy(t)
		defer p.Del(t)
	}
	serve(t, server)
	client.WaitService(t, "server", 80, 1)
	if code, body, _, err := fetch(client.HTTPClient(false), "http://"+vip4+"/"); err != nil || code != 200 {
		t.Errorf("answer %d %q, %v", code, body, err)
	}
	const reason = "cgroup v2 mounted: root of the cgroup v2 hierarchy is not mounted"
	_, ready, err := n.Get("/readyz")
	if err != nil || !strings.Contains(ready, "backend iptables, since "+reason) {
		t.Errorf("/readyz does not say why the backend is iptables, %v:\n%s", err, ready)
	}
	_, metrics, err := n.Get("/metrics")
	if err != nil || !strings.Contains(metrics, `sluice_backend_info{backend="iptables",reason="`+reason) {
		t.Errorf("no metric says why the backend is iptables, %v", err)
	}
	log, err := os.ReadFile(n.Log)
	if err != nil {
		t.Fatal(err)
	}
	if count := strings.Count(string(log), "falling back to iptables"); count != 1 {
		t.Errorf("the log says %d times that it falls back, want once:\n%s", count, log)
	}
}

// TestAgentDown: a pod cannot be added without the agent, and is told why.
func TestAgentDown(t *testing.T) {
	n := sluicetest.New(t, "auto")
	n.Apply(t, "pod-a.yaml", n.PodYAML("a", sluicetest.PodSpec{}))
	n.KillAgent()
	p := n.Sandbox(t, "a")
	start := time.Now()
	err := p.Add(t)
	if err == nil || !strings.Contains(err.Error(), "agent") || time.Since(start) > 6*time.Second {
		t.Errorf("ADD without an agent: %v after %v; want an error that says so within 5 s", err, time.Since(start))
	}
	p.Del(t)
	n.StartAgent(t)
	if err := p.Add(t); err != nil {
		t.Errorf("ADD with the agent back: %v", err)
	}
	p.Del(t)
}

// TestUninstallLeavesNothing compares pod and machine with how they were before
// Sluice was there.
func TestUninstallLeavesNothing(t *testing.T) {
	sluicetest.EachBackend(t, func(t *testing.T, backend string) {
		before := kernelState(t)
		n := sluicetest.New(t, backend)
		n.Service(t, "server", vip4, vip6, serverPorts)
		n.Apply(t, "pod-a.yaml", n.PodYAML("a", sluicetest.PodSpec{}))
		p := n.Sandbox(t, "a")
		chain := n.Chain.Plugins
		n.Chain.Plugins = chain[:1] // the bridge alone
		if err := p.Add(t); err != nil {
			t.Fatal(err)
		}
		// Its address and the number of its interface are others each time.
		number := regexp.MustCompile(`Ifindex: \d+`)
		state := func() netnstest.State {
			s := p.State(t)
			for i := range s {
				s[i] = strings.NewReplacer(p.Addr4.String(), "V4", p.Addr6.String(), "V6").Replace(s[i])
				s[i] = number.ReplaceAllString(s[i], "Ifindex: N")
			}
			slices.Sort(s)
			return s
		}
		bare := state()
		p.Del(t)
		n.Chain.Plugins = chain
		if err := p.Add(t); err != nil {
			t.Fatal(err)
		}
		p.StartEnvoy(t)
		client := dialFrom(t, p, vip4+":82") // leaves state of a connection behind
		_ = client.Close()
		p.Envoy.Stop()
		if diff := bare.Diff(state()); diff == "" {
			t.Error("a redirected pod cannot be told from a bare one: this test would see nothing")
		}

		n.KillAgent()
		n.Uninstall(t)
		sluicetest.Eventually(t, func() bool { return bare.Diff(state()) == "" }, func() string {
			return "the pod is not as it was before, -before +after:\n" + bare.Diff(state())
		})
		var left []string // others on the machine may come and go; what stays is ours
		sluicetest.Eventually(t, func() bool {
			left = slices.DeleteFunc(kernelState(t), func(s string) bool { return slices.Contains(before, s) })
			return len(left) == 0
		}, func() string { return "left on the machine:\n" + strings.Join(left, "\n") })
		n.Chain.Plugins = chain[:1]
		p.Del(t)
	})
}

// kernelState lists the machine's eBPF programs, maps and links that Sluice's
// data plane could have made, and its pins.
func kernelState(t *testing.T) []string {
	t.Helper()
	maps := []string{"pods", "pod_ips", "pod_meta", "ports", "cidrs", "targets", "handover", "listeners", "stats", "layouts"}
	var state []string
	ours := map[ebpf.ProgramID]bool{}
	for id := ebpf.ProgramID(0); ; {
		next, err := ebpf.ProgramGetNextID(id)
		if err != nil {
			break // the last one
		}
		id = next
		p, err := ebpf.NewProgramFromID(id)
		if err != nil {
			continue // gone in between
		}
		if info, err := p.Info(); err == nil && strings.HasPrefix(info.Name, "sl_") {
			state = append(state, fmt.Sprintf("program %d %s", id, info.Name))
			ours[id] = true
		}
		_ = p.Close()
	}
	for id := ebpf.MapID(0); ; {
		next, err := ebpf.MapGetNextID(id)
		if err != nil {
			break
		}
		id = next
		m, err := ebpf.NewMapFromID(id)
		if err != nil {
			continue
		}
		if info, err := m.Info(); err == nil && slices.Contains(maps, info.Name) {
			state = append(state, fmt.Sprintf("map %d %s", id, info.Name))
		}
		_ = m.Close()
	}
	for it := new(link.Iterator); it.Next(); {
		if info, err := it.Link.Info(); err == nil && ours[info.Program] {
			state = append(state, fmt.Sprintf("link %d of program %d", info.ID, info.Program))
		}
	}
	if _, err := os.Stat(sluicetest.PinDir()); err == nil {
		state = append(state, sluicetest.PinDir())
	}
	return state
}
