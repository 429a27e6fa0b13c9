package sluicetest

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	types "github.com/containernetworking/cni/pkg/types/100"

	"github.com/sluicemesh/sluice/tests/envoytest"
	"github.com/sluicemesh/sluice/tests/netnstest"
)

// A Pod is a sandbox that the CNI chain set up.
type Pod struct {
	netnstest.Namespace
	// Runtime is what the runtime hands to the CNI chain.
	Runtime *libcni.RuntimeConf
	// Addr4 and Addr6 are known once the pod was added.
	Addr4, Addr6 netip.Addr
	// Envoy is nil for pods without a sidecar.
	Envoy *envoytest.Envoy

	node *Node
}

// A PodSpec says what Node.Pod makes.
type PodSpec struct {
	Metadata string // further fields of metadata, in flow style, each after a comma
	Ports    string // ports of the container, in flow style
	Plain    bool   // no sidecar, not redirected
}

// PodYAML is the pod's object. Unless the metadata has labels, it has app=name.
func (n *Node) PodYAML(name string, s PodSpec) string {
	metadata := s.Metadata
	if s.Plain {
		metadata += ", labels: {sluice.dev/redirect: disabled}"
	} else if !strings.Contains(metadata, "labels:") {
		metadata += ", labels: {app: " + name + "}"
	}
	return fmt.Sprintf("{apiVersion: v1, kind: Pod, metadata: {name: %s, namespace: %s, uid: uid-%s%s}, spec: {containers: [{name: app, image: app, ports: [%s]}]}}",
		name, PodNamespace, name, metadata, s.Ports)
}

// Pod writes the pod's YAML, adds it through the CNI chain and starts its Envoy.
func (n *Node) Pod(t *testing.T, name string, s PodSpec) *Pod {
	t.Helper()
	n.Apply(t, "pod-"+name+".yaml", n.PodYAML(name, s))
	p := n.Sandbox(t, name)
	if err := p.Add(t); err != nil {
		t.Fatalf("CNI ADD of pod %s: %v", name, err)
	}
	t.Cleanup(func() { p.Del(t) })
	if !s.Plain {
		p.StartEnvoy(t)
	}
	return p
}

// Sandbox makes the pod's namespace and nothing else.
func (n *Node) Sandbox(t *testing.T, name string) *Pod {
	t.Helper()
	p := &Pod{Namespace: netnstest.New(t, name), node: n}
	p.Runtime = &libcni.RuntimeConf{ContainerID: "c-" + name, NetNS: p.Netns, IfName: "eth0", Args: [][2]string{
		{"IgnoreUnknown", "1"},
		{"K8S_POD_NAMESPACE", PodNamespace},
		{"K8S_POD_NAME", name},
		{"K8S_POD_INFRA_CONTAINER_ID", "c-" + name},
		{"K8S_POD_UID", "uid-" + name},
	}}
	return p
}

// Add runs CNI ADD and returns its error.
func (p *Pod) Add(t *testing.T) error {
	t.Helper()
	return p.node.Do(func() error {
		result, err := p.node.CNI.AddNetworkList(t.Context(), p.node.Chain, p.Runtime)
		if err != nil {
			return err
		}
		r, err := types.GetResult(result)
		if err != nil {
			return err
		}
		for _, ip := range r.IPs {
			if a, _ := netip.AddrFromSlice(ip.Address.IP); a.Unmap().Is4() {
				p.Addr4 = a.Unmap()
			} else {
				p.Addr6 = a
			}
		}
		return nil
	})
}

// Del runs CNI DEL.
func (p *Pod) Del(t *testing.T) {
	t.Helper()
	if err := p.node.Do(func() error {
		return p.node.CNI.DelNetworkList(context.Background(), p.node.Chain, p.Runtime)
	}); err != nil {
		t.Errorf("CNI DEL of pod %s: %v", p.Name, err)
	}
}

// StartEnvoy starts the pod's sidecar and waits until it is ready, which it is
// once it has received its configuration from the agent.
func (p *Pod) StartEnvoy(t *testing.T) {
	t.Helper()
	bootstrap, err := exec.Command(filepath.Join(p.node.bin, "sluice-agent"), "bootstrap").Output()
	if err != nil {
		t.Fatalf("print bootstrap: %v", err)
	}
	p.Envoy = envoytest.Start(t, envoytest.Options{Name: "envoy of " + p.Name, Netns: p.Netns, Config: bootstrap})
	ctx, cancel := context.WithTimeout(t.Context(), Deadline)
	defer cancel()
	if err := p.Envoy.WaitReady(ctx); err != nil {
		t.Fatalf("envoy of %s is not ready: %v", p.Name, err)
	}
}

// WaitService waits until the pod's Envoy has a listener for the service's
// port and healthy endpoints behind it.
func (p *Pod) WaitService(t *testing.T, name string, port, endpoints int) {
	t.Helper()
	resource := fmt.Sprintf("out/%s/%s/%d", PodNamespace, name, port)
	Eventually(t, func() bool {
		_, body, err := p.Envoy.Get(t.Context(), "/clusters")
		return err == nil && countEndpoints(string(body), resource) == endpoints && p.HasListener(t, resource)
	}, func() string {
		return fmt.Sprintf("envoy of %s does not have %s with %d endpoints", p.Name, resource, endpoints)
	})
}

// countEndpoints counts the healthy endpoints of a cluster in Envoy's /clusters.
func countEndpoints(clusters, name string) int {
	n := 0
	for line := range strings.Lines(clusters) {
		if strings.HasPrefix(line, name+"::") && strings.Contains(line, "::health_flags::healthy") {
			n++
		}
	}
	return n
}

// HasListener says whether the pod's Envoy has a listener of that name.
func (p *Pod) HasListener(t *testing.T, name string) bool {
	t.Helper()
	code, body, err := p.Envoy.Get(t.Context(), "/listeners?format=json")
	if err != nil || code != http.StatusOK {
		return false
	}
	var l struct {
		Statuses []struct {
			Name string `json:"name"`
		} `json:"listener_statuses"`
	}
	if err := json.Unmarshal(body, &l); err != nil {
		t.Fatalf("listeners of %s: %v", p.Name, err)
	}
	for _, s := range l.Statuses {
		if s.Name == name {
			return true
		}
	}
	return false
}

// Stat returns one statistic of the pod's Envoy, or the sum of those that the
// expression matches.
func (p *Pod) Stat(t *testing.T, regex string) (sum uint64) {
	t.Helper()
	for _, v := range p.Envoy.Stats(t.Context(), regex) {
		sum += v
	}
	return sum
}

// ListenTCP listens inside the pod on all its addresses.
func (p *Pod) ListenTCP(t *testing.T, port int) net.Listener {
	t.Helper()
	l, err := p.Listen(t.Context(), "tcp", ":"+strconv.Itoa(port))
	if err != nil {
		t.Fatalf("listen in pod %s: %v", p.Name, err)
	}
	return l
}

// ServeTCP handles connections until the test ends.
func (p *Pod) ServeTCP(t *testing.T, port int, handle func(*net.TCPConn)) {
	t.Helper()
	l := p.ListenTCP(t, port)
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer func() { _ = c.Close() }()
				_ = c.SetDeadline(time.Now().Add(5 * Deadline))
				handle(c.(*net.TCPConn))
			}()
		}
	}()
}

// HTTPClient makes requests from inside the pod. Each connection is dialled there.
func (p *Pod) HTTPClient(keepAlive bool) *http.Client {
	return &http.Client{Timeout: Deadline, Transport: &http.Transport{
		DisableKeepAlives: !keepAlive, MaxIdleConnsPerHost: 100,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) { return p.Dial(ctx, network, addr) },
	}}
}
