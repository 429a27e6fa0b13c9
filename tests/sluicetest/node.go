package sluicetest

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"

	"github.com/sluicemesh/sluice/tests/need"
	"github.com/sluicemesh/sluice/tests/netnstest"
)

// Deadline bounds every wait.
const Deadline = 30 * time.Second

// PodNamespace is the Kubernetes namespace that all pods and services are in.
const PodNamespace = "e2e"

// HTTPAddr is where the agent answers, in the node's namespace.
const HTTPAddr = "127.0.0.1:15090"

// EachBackend runs test as a subtest for each backend, or for the one that the
// environment variable BACKEND names.
func EachBackend(t *testing.T, test func(t *testing.T, backend string)) {
	for _, backend := range []string{"ebpf", "iptables"} {
		if only := os.Getenv("BACKEND"); only != "" && only != backend {
			continue
		}
		t.Run(backend, func(t *testing.T) { test(t, backend) })
	}
}

// A Node is one machine: a namespace in which the agent runs and the bridge
// plugin makes the pods' network.
type Node struct {
	netnstest.Namespace
	// Wrap is a command that gets the agent's command line as its last arguments,
	// from the next start of the agent on.
	Wrap []string
	// Source is the directory of the YAML, Log the file with what the agent logs.
	Source, Log string
	// CNI runs Chain, the bridge plugin followed by Sluice's.
	CNI   *libcni.CNIConfig
	Chain *libcni.NetworkConfigList

	backend string
	bin     string
	state   string
	agent   *exec.Cmd
}

// New makes a node and starts its agent.
func New(t *testing.T, backend string) *Node {
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
	n := &Node{
		Namespace: netnstest.New(t, "node"), backend: backend, bin: bin,
		Source: filepath.Join(dir, "source"), state: filepath.Join(dir, "state"), Log: filepath.Join(dir, "agent.log"),
		CNI: libcni.NewCNIConfigWithCacheDir([]string{need.CNIPlugins(t), bin}, filepath.Join(dir, "cni-cache"), nil),
	}
	n.Chain, err = libcni.ConfListFromBytes(fmt.Appendf(nil, `{
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
	for _, d := range []string{n.Source, n.state} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	n.Apply(t, "namespace.yaml", `{apiVersion: v1, kind: Namespace, metadata: {name: `+PodNamespace+`, labels: {sluice.dev/redirect: enabled}}}`)
	t.Cleanup(func() {
		n.KillAgent()
		if t.Failed() {
			log, _ := os.ReadFile(n.Log)
			t.Logf("agent logged:\n%s", log)
		}
		n.Uninstall(t)
	})
	n.StartAgent(t)
	return n
}

func (n *Node) socket() string { return filepath.Join(n.state, "cni.sock") }

// StartAgent starts the agent and waits until it is ready.
func (n *Node) StartAgent(t *testing.T) {
	t.Helper()
	log, err := os.OpenFile(n.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = log.Close() }()
	argv := append(slices.Clone(n.Wrap), filepath.Join(n.bin, "sluice-agent"), "run", "--source", "files:"+n.Source, "--backend", n.backend,
		"--node", "node-a", "--state-dir", n.state, "--pin-dir", PinDir(), "--cni-socket", n.socket(), "--http-addr", HTTPAddr, "--log-level", "debug")
	if n.Accelerated() {
		argv = append(argv, "--accelerate", "on")
	}
	n.agent = exec.Command(argv[0], argv[1:]...)
	n.agent.Stdout, n.agent.Stderr = log, log
	n.agent.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := n.Do(n.agent.Start); err != nil {
		t.Fatalf("start agent: %v", err)
	}
	var last string
	Eventually(t, func() bool {
		code, body, err := n.Get("/readyz")
		last = fmt.Sprintf("%d %s %v", code, body, err)
		return err == nil && code == http.StatusOK
	}, func() string { return "agent is not ready: " + last })
}

// Accelerated says whether the environment asks for acceleration, and the backend
// can have it.
func (n *Node) Accelerated() bool {
	return n.backend == "ebpf" && os.Getenv("SLUICE_TEST_ACCELERATE") == "on"
}

// KillAgent ends the agent with SIGKILL and returns once it is gone.
func (n *Node) KillAgent() {
	if n.agent == nil {
		return
	}
	_ = n.agent.Process.Kill()
	_ = n.agent.Wait() // "signal: killed" is what was asked for
	n.agent = nil
}

// EndAgent ends the agent with SIGTERM, as the kubelet does.
func (n *Node) EndAgent(t *testing.T) {
	t.Helper()
	if err := n.agent.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := n.agent.Wait(); err != nil {
		t.Errorf("agent after SIGTERM: %v", err)
	}
	n.agent = nil
}

// Uninstall runs the agent's subcommand of that name.
func (n *Node) Uninstall(t *testing.T) {
	t.Helper()
	out, err := exec.Command(filepath.Join(n.bin, "sluice-agent"), "uninstall", "--state-dir", n.state, "--pin-dir", PinDir(), "--cni-socket", n.socket()).CombinedOutput()
	if err != nil {
		t.Errorf("uninstall: %v\n%s", err, out)
	}
}

// Get asks the agent and returns status and body.
func (n *Node) Get(path string) (int, string, error) {
	client := http.Client{Timeout: Deadline, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			return n.Dial(ctx, network, addr)
		},
	}}
	resp, err := client.Get("http://" + HTTPAddr + path)
	if err != nil {
		return 0, "", err
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b), err
}

// Connections is Metric of the agent's sluice_connections_total.
func (n *Node) Connections(t *testing.T, labels ...string) float64 {
	t.Helper()
	return n.Metric(t, "sluice_connections_total", labels...)
}

// Metric adds up one of the agent's metrics over the samples that have all of the
// labels, given as `name="value"`.
func (n *Node) Metric(t *testing.T, name string, labels ...string) float64 {
	t.Helper()
	_, body, err := n.Get("/metrics")
	if err != nil {
		t.Fatalf("read metrics: %v", err)
	}
	var sum float64
	s := bufio.NewScanner(strings.NewReader(body))
line:
	for s.Scan() {
		rest, ok := strings.CutPrefix(s.Text(), name+"{")
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

// Apply writes a file of the source, as an editor does: aside, then renamed.
func (n *Node) Apply(t *testing.T, file, yaml string) {
	t.Helper()
	path := filepath.Join(n.Source, file)
	if err := os.WriteFile(path+".tmp", []byte(yaml), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".tmp", path); err != nil {
		t.Fatal(err)
	}
}

// Service writes a Service of both families, IPv4 first, that selects the pods
// with label app=name. The ports are YAML in flow style.
func (n *Node) Service(t *testing.T, name, ip4, ip6, ports string) {
	t.Helper()
	n.Apply(t, "service-"+name+".yaml", fmt.Sprintf(
		"{apiVersion: v1, kind: Service, metadata: {name: %s, namespace: %s}, spec: {clusterIP: %s, clusterIPs: [%s, %q], ipFamilies: [IPv4, IPv6], selector: {app: %s}, ports: [%s]}}",
		name, PodNamespace, ip4, ip4, ip6, name, ports))
}

// Eventually polls until ok, and ends the test with what message says after the
// deadline.
func Eventually(t *testing.T, ok func() bool, message func() string) {
	t.Helper()
	tick := time.NewTicker(25 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(Deadline); ; {
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
