package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	types "github.com/containernetworking/cni/pkg/types/100"

	"github.com/sluicemesh/sluice/tests/envoytest"
	"github.com/sluicemesh/sluice/tests/need"
	"github.com/sluicemesh/sluice/tests/netnstest"
)

// deadline bounds every wait of these tests.
const deadline = 30 * time.Second

func TestMain(m *testing.M) { os.Exit(netnstest.VerifyNoLeaks(m)) }

// pinDir is in a bpffs that the agent mounts and uninstall unmounts.
func pinDir() string { return filepath.Join(os.TempDir(), "bpf", "sluice") }

// binaries builds agent and plugin once a test process and returns their directory.
var binaries = sync.OnceValues(func() (string, error) {
	dir := filepath.Join(os.TempDir(), "bin")
	if err := errors.Join(os.Mkdir(dir, 0o700), os.Mkdir(filepath.Dir(pinDir()), 0o700)); err != nil {
		return "", err
	}
	cmd := exec.Command("go", "build", "-o", dir+"/", "github.com/sluicemesh/sluice/cmd/agent", "github.com/sluicemesh/sluice/cmd/cni")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build: %w\n%s", err, out)
	}
	return dir, errors.Join(
		os.Rename(filepath.Join(dir, "agent"), filepath.Join(dir, "sluice-agent")),
		os.Rename(filepath.Join(dir, "cni"), filepath.Join(dir, "sluice-cni")))
})

// eachBackend runs test as a subtest for each backend.
func eachBackend(t *testing.T, test func(t *testing.T, backend string)) {
	for _, backend := range []string{"ebpf", "iptables"} {
		if only := os.Getenv("BACKEND"); only != "" && only != backend {
			continue
		}
		t.Run(backend, func(t *testing.T) { test(t, backend) })
	}
}

// A node is one machine without Kubernetes: a namespace in which the agent
// runs and the bridge plugin makes the pods' network.
type node struct {
	ns      netnstest.Namespace
	backend string
	wrap    []string // command that gets the agent's command line as its last arguments
	bin     string
	source  string // directory of the YAML
	state   string
	cni     *libcni.CNIConfig
	conf    *libcni.NetworkConfigList
	agent   *exec.Cmd
	log     string
}

// newNode makes a node and starts its agent.
func newNode(t *testing.T, backend string) *node {
	t.Helper()
	need.Root(t)
	if backend == "ebpf" {
		need.EBPF(t)
	} else {
		need.Tool(t, "iptables-restore")
	}
	bin, err := binaries()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	n := &node{
		ns: netnstest.New(t, "node"), backend: backend, bin: bin,
		source: filepath.Join(dir, "source"), state: filepath.Join(dir, "state"), log: filepath.Join(dir, "agent.log"),
		cni: libcni.NewCNIConfigWithCacheDir([]string{need.CNIPlugins(t), bin}, filepath.Join(dir, "cni-cache"), nil),
	}
	n.conf, err = libcni.ConfListFromBytes(fmt.Appendf(nil, `{
		"cniVersion": "1.1.0", "name": "e2e",
		"plugins": [
			{"type": "bridge", "bridge": "cni0", "isDefaultGateway": true, "ipam": {
				"type": "host-local", "dataDir": %q,
				"ranges": [[{"subnet": "10.88.0.0/16"}], [{"subnet": "fd00:88::/64"}]]}},
			{"type": "sluice-cni", "socket": %q}
		]}`, filepath.Join(dir, "ipam"), n.socket()))
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{n.source, n.state} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	n.apply(t, "namespace.yaml", `{apiVersion: v1, kind: Namespace, metadata: {name: e2e, labels: {sluice.dev/redirect: enabled}}}`)
	t.Cleanup(func() {
		n.killAgent()
		if t.Failed() {
			log, _ := os.ReadFile(n.log)
			t.Logf("agent logged:\n%s", log)
		}
		n.uninstall(t)
	})
	n.startAgent(t)
	return n
}

func (n *node) socket() string { return filepath.Join(n.state, "cni.sock") }

const httpAddr = "127.0.0.1:15090"

// startAgent starts the agent and waits until it is ready.
func (n *node) startAgent(t *testing.T) {
	t.Helper()
	log, err := os.OpenFile(n.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = log.Close() }()
	argv := append(slices.Clone(n.wrap), filepath.Join(n.bin, "sluice-agent"), "run", "--source", "files:"+n.source, "--backend", n.backend,
		"--node", "node-a", "--state-dir", n.state, "--pin-dir", pinDir(), "--cni-socket", n.socket(), "--http-addr", httpAddr, "--log-level", "debug")
	n.agent = exec.Command(argv[0], argv[1:]...)
	n.agent.Stdout, n.agent.Stderr = log, log
	n.agent.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := n.ns.Do(n.agent.Start); err != nil {
		t.Fatalf("start agent: %v", err)
	}
	var last string
	eventually(t, func() bool {
		code, body, err := n.get("/readyz")
		last = fmt.Sprintf("%d %s %v", code, body, err)
		return err == nil && code == http.StatusOK
	}, func() string { return "agent is not ready: " + last })
}

// killAgent ends the agent with SIGKILL and returns once it is gone.
func (n *node) killAgent() {
	if n.agent == nil {
		return
	}
	_ = n.agent.Process.Kill()
	_ = n.agent.Wait() // "signal: killed" is what was asked for
	n.agent = nil
}

// endAgent ends the agent with SIGTERM, as the kubelet does.
func (n *node) endAgent(t *testing.T) {
	t.Helper()
	if err := n.agent.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := n.agent.Wait(); err != nil {
		t.Errorf("agent after SIGTERM: %v", err)
	}
	n.agent = nil
}

func (n *node) uninstall(t *testing.T) {
	t.Helper()
	out, err := exec.Command(filepath.Join(n.bin, "sluice-agent"), "uninstall", "--state-dir", n.state, "--pin-dir", pinDir(), "--cni-socket", n.socket()).CombinedOutput()
	if err != nil {
		t.Errorf("uninstall: %v\n%s", err, out)
	}
}

// get asks the agent.
func (n *node) get(path string) (int, string, error) {
	client := http.Client{Timeout: deadline, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			return n.ns.Dial(ctx, network, addr)
		},
	}}
	resp, err := client.Get("http://" + httpAddr + path)
	if err != nil {
		return 0, "", err
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b), err
}

// connections adds up the agent's sluice_connections_total over the samples
// that have all of the labels, given as `name="value"`.
func (n *node) connections(t *testing.T, labels ...string) float64 {
	t.Helper()
	_, body, err := n.get("/metrics")
	if err != nil {
		t.Fatalf("read metrics: %v", err)
	}
	var sum float64
	s := bufio.NewScanner(strings.NewReader(body))
line:
	for s.Scan() {
		rest, ok := strings.CutPrefix(s.Text(), "sluice_connections_total{")
		if !ok {
			continue
		}
		set, value, _ := strings.Cut(rest, "} ")
		for _, l := range labels {
			if !strings.Contains(set, l) {
				continue line
			}
		}
		var v float64
		if _, err := fmt.Sscan(value, &v); err != nil {
			t.Fatalf("metric %q: %v", s.Text(), err)
		}
		sum += v
	}
	return sum
}

// apply writes a file of the source, as an editor does: aside, then renamed.
func (n *node) apply(t *testing.T, file, yaml string) {
	t.Helper()
	path := filepath.Join(n.source, file)
	if err := os.WriteFile(path+".tmp", []byte(yaml), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".tmp", path); err != nil {
		t.Fatal(err)
	}
}

// A pod is a sandbox that the CNI chain set up.
type pod struct {
	netnstest.Namespace
	n     *node
	name  string
	rt    *libcni.RuntimeConf
	v4    netip.Addr
	v6    netip.Addr
	envoy *envoytest.Envoy // nil for pods without a sidecar
}

// A podSpec says what pod makes. Extra is YAML for the pod's metadata.
type podSpec struct {
	metadata string // further fields of metadata, in flow style, each after a comma
	ports    string // ports of the container, in flow style
	plain    bool   // no sidecar, not redirected
}

func (n *node) podYAML(name string, s podSpec) string {
	metadata := s.metadata
	if s.plain {
		metadata += ", labels: {sluice.dev/redirect: disabled}"
	} else if !strings.Contains(metadata, "labels:") {
		metadata += ", labels: {app: " + name + "}"
	}
	return fmt.Sprintf("{apiVersion: v1, kind: Pod, metadata: {name: %s, namespace: e2e, uid: uid-%s%s}, spec: {containers: [{name: app, image: app, ports: [%s]}]}}", name, name, metadata, s.ports)
}

// pod writes the pod's YAML, adds it through the CNI chain and starts its Envoy.
func (n *node) pod(t *testing.T, name string, s podSpec) *pod {
	t.Helper()
	n.apply(t, "pod-"+name+".yaml", n.podYAML(name, s))
	p := n.sandbox(t, name)
	if err := p.add(t); err != nil {
		t.Fatalf("CNI ADD of pod %s: %v", name, err)
	}
	t.Cleanup(func() { p.del(t) })
	if !s.plain {
		p.startEnvoy(t)
	}
	return p
}

func (n *node) sandbox(t *testing.T, name string) *pod {
	t.Helper()
	p := &pod{Namespace: netnstest.New(t, name), n: n, name: name}
	p.rt = &libcni.RuntimeConf{ContainerID: "c-" + name, NetNS: p.Netns, IfName: "eth0", Args: [][2]string{
		{"IgnoreUnknown", "1"},
		{"K8S_POD_NAMESPACE", "e2e"},
		{"K8S_POD_NAME", name},
		{"K8S_POD_INFRA_CONTAINER_ID", "c-" + name},
		{"K8S_POD_UID", "uid-" + name},
	}}
	return p
}

func (p *pod) add(t *testing.T) error {
	t.Helper()
	return p.n.ns.Do(func() error {
		result, err := p.n.cni.AddNetworkList(t.Context(), p.n.conf, p.rt)
		if err != nil {
			return err
		}
		r, err := types.GetResult(result)
		if err != nil {
			return err
		}
		for _, ip := range r.IPs {
			if a, _ := netip.AddrFromSlice(ip.Address.IP); a.Unmap().Is4() {
				p.v4 = a.Unmap()
			} else {
				p.v6 = a
			}
		}
		return nil
	})
}

func (p *pod) del(t *testing.T) {
	t.Helper()
	if err := p.n.ns.Do(func() error { return p.n.cni.DelNetworkList(context.Background(), p.n.conf, p.rt) }); err != nil {
		t.Errorf("CNI DEL of pod %s: %v", p.name, err)
	}
}

// startEnvoy starts the pod's sidecar and waits until it is ready, which it is
// once it has received its configuration from the agent.
func (p *pod) startEnvoy(t *testing.T) {
	t.Helper()
	bootstrap, err := exec.Command(filepath.Join(p.n.bin, "sluice-agent"), "bootstrap").Output()
	if err != nil {
		t.Fatalf("print bootstrap: %v", err)
	}
	p.envoy = envoytest.Start(t, envoytest.Options{Name: "envoy of " + p.name, Netns: p.Netns, Config: bootstrap})
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()
	if err := p.envoy.WaitReady(ctx); err != nil {
		t.Fatalf("envoy of %s is not ready: %v", p.name, err)
	}
}

// service writes a Service that selects the pods with label app=name.
func (n *node) service(t *testing.T, name, ip4, ip6, ports string) {
	t.Helper()
	n.apply(t, "service-"+name+".yaml", fmt.Sprintf(
		"{apiVersion: v1, kind: Service, metadata: {name: %s, namespace: e2e}, spec: {clusterIP: %s, clusterIPs: [%s, %q], ipFamilies: [IPv4, IPv6], selector: {app: %s}, ports: [%s]}}",
		name, ip4, ip4, ip6, name, ports))
}

// hasListener says whether the pod's Envoy has a listener of that name.
func (p *pod) hasListener(t *testing.T, name string) bool {
	t.Helper()
	code, body, err := p.envoy.Get(t.Context(), "/listeners?format=json")
	if err != nil || code != http.StatusOK {
		return false
	}
	var l struct {
		Statuses []struct {
			Name string `json:"name"`
		} `json:"listener_statuses"`
	}
	if err := json.Unmarshal(body, &l); err != nil {
		t.Fatalf("listeners of %s: %v", p.name, err)
	}
	for _, s := range l.Statuses {
		if s.Name == name {
			return true
		}
	}
	return false
}

// waitService waits until the pod's Envoy has a listener for the service's
// port and healthy endpoints behind it.
func (p *pod) waitService(t *testing.T, name string, port, endpoints int) {
	t.Helper()
	resource := fmt.Sprintf("out/e2e/%s/%d", name, port)
	eventually(t, func() bool {
		_, body, err := p.envoy.Get(t.Context(), "/clusters")
		return err == nil && countEndpoints(string(body), resource) == endpoints && p.hasListener(t, resource)
	}, func() string {
		return fmt.Sprintf("envoy of %s does not have %s with %d endpoints", p.name, resource, endpoints)
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

// eventually polls until ok, and fails with what message says after the deadline.
func eventually(t *testing.T, ok func() bool, message func() string) {
	t.Helper()
	tick := time.NewTicker(25 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(deadline); ; {
		if ok() {
			return
		}
		if time.Now().After(end) {
			t.Fatal(message())
		}
		select {
		case <-tick.C:
		case <-t.Context().Done():
			t.Fatal(message())
		}
	}
}
