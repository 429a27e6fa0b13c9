package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/vishvananda/netlink"
)

// Where the demo keeps its things, below stateDir.
const (
	manifestDir   = stateDir + "/manifests"
	hostsFile     = stateDir + "/hosts"
	bootstrapFile = stateDir + "/envoy.yaml"
	cniSocket     = stateDir + "/cni.sock"
	agentState    = stateDir + "/agent"
	pinDir        = stateDir + "/bpf/sluice"
	bridgeName    = "sluice-demo0"
	agentAddr     = "127.0.0.1:15090" // of the node's own loopback
)

// A node is the machine of the demo as Kubernetes would see it: a network
// namespace with a bridge, an agent, and pods. runNode's goroutine owns it.
type node struct {
	o        options
	out      *printer
	cni      *libcni.CNIConfig
	loopback *libcni.NetworkConfigList
	chain    *libcni.NetworkConfigList
	services []object
	spare    object // the pod that takes another's place later
	pods     []*pod
	agent    *process
	// firstAgent is what the agent had counted before it was killed.
	firstAgent map[string]float64
}

// kernelFlags are the flags that tell run and uninstall where the demo's agent
// keeps what outlives it.
func kernelFlags() []string {
	flags := []string{"--state-dir", agentState, "--pin-dir", pinDir, "--cni-socket", cniSocket}
	if dir, err := cgroupDir(); err == nil {
		flags = append(flags, "--cgroup", dir)
	}
	return flags
}

// runNode is the demo inside the node's network namespace.
func runNode(ctx context.Context, o options) error {
	n := &node{o: o, out: newPrinter(os.Stdout)}
	if err := n.setUp(); err != nil {
		return err
	}
	before, err := snapshot()
	if err != nil {
		return err
	}
	if err := n.startAgent(ctx); err != nil {
		return err
	}
	if err := n.startPods(ctx); err != nil {
		return err
	}
	for _, step := range []func(context.Context) error{n.oneRequest, n.split, n.cookie, n.rollingChange, n.agentKilled, n.metrics} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	if err := n.out.verdict(); err != nil {
		return err
	}
	if o.keep {
		n.explain()
		return nil
	}
	if err := n.tearDown(ctx, before); err != nil {
		return err
	}
	return n.out.verdict()
}

// setUp makes all that is there before the agent starts.
func (n *node) setUp() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find loopback of the node: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("set loopback of the node up: %w", err)
	}
	dir, err := cgroupDir()
	if err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		return fmt.Errorf("make cgroup: %w", err)
	}
	if err := os.Mkdir(manifestDir, 0o755); err != nil {
		return fmt.Errorf("make manifest directory: %w", err)
	}
	if err := n.setUpCNI(); err != nil {
		return err
	}
	bootstrap, err := exec.Command(n.o.bin+"/sluice-agent", "bootstrap").Output()
	if err != nil {
		return fmt.Errorf("print Envoy bootstrap: %w", err)
	}
	if err := os.WriteFile(bootstrapFile, bootstrap, 0o644); err != nil {
		return fmt.Errorf("write Envoy bootstrap: %w", err)
	}

	objects, err := readManifests(n.o.manifests)
	if err != nil {
		return err
	}
	hosts := []string{"127.0.0.1 localhost"}
	for _, o := range objects {
		switch o.str("kind") {
		case "Pod":
			continue // written when it is started
		case "Service":
			name, ns := o.str("metadata", "name"), o.str("metadata", "namespace")
			hosts = append(hosts, fmt.Sprintf("%[1]s %[2]s %[2]s.%[3]s %[2]s.%[3]s.svc.cluster.local", o.str("spec", "clusterIP"), name, ns))
			n.services = append(n.services, o)
		}
		if err := n.apply(o); err != nil {
			return err
		}
	}
	if err := os.WriteFile(hostsFile, []byte(strings.Join(hosts, "\n")+"\n"), 0o644); err != nil {
		return fmt.Errorf("write hosts file: %w", err)
	}
	return nil
}

func (n *node) setUpCNI() (err error) {
	n.cni = libcni.NewCNIConfigWithCacheDir([]string{n.o.bin, n.o.cni}, filepath.Join(stateDir, "cni-cache"), nil)
	n.loopback, err = libcni.ConfListFromBytes([]byte(`{"cniVersion": "1.1.0", "name": "cni-loopback", "plugins": [{"type": "loopback"}]}`))
	if err != nil {
		return fmt.Errorf("parse CNI configuration: %w", err)
	}
	n.chain, err = libcni.ConfListFromBytes(fmt.Appendf(nil, `{
		"cniVersion": "1.1.0",
		"name": "sluice-demo",
		"plugins": [
			{
				"type": "bridge", "bridge": %q, "isDefaultGateway": true,
				"ipam": {"type": "host-local", "dataDir": %q, "ranges": [[{"subnet": "10.88.0.0/24"}]]}
			},
			{"type": "sluice-cni", "socket": %q}
		]
	}`, bridgeName, stateDir+"/ipam", cniSocket))
	if err != nil {
		return fmt.Errorf("parse CNI configuration: %w", err)
	}
	return nil
}

// startAgent starts the agent and waits until it is ready.
func (n *node) startAgent(ctx context.Context) (err error) {
	argv := append([]string{
		n.o.bin + "/sluice-agent", "run", "--source", "files:" + manifestDir, "--backend", n.o.backend,
		"--http-addr", agentAddr, "--node", "demo",
	}, kernelFlags()...)
	if n.agent, err = spawn("agent", argv...); err != nil {
		return err
	}
	return waitFor(ctx, "the agent", n.agent, get(ctx, "http://"+agentAddr+"/readyz"))
}

func (n *node) startPods(ctx context.Context) error {
	n.out.heading("The bookshop starts")
	n.out.note("agent %d is ready: %s", n.agent.cmd.Process.Pid, n.readyz(ctx, "redirection"))
	objects, err := readManifests(n.o.manifests)
	if err != nil {
		return err
	}
	for _, o := range objects {
		if o.str("kind") != "Pod" {
			continue
		}
		if o.str("metadata", "name") == "details-1" {
			if n.spare, err = copyOf(o, "details-2"); err != nil {
				return err
			}
		}
		p, err := n.start(ctx, o)
		if err != nil {
			return err
		}
		with := "Envoy " + fmt.Sprint(pidOf(p.envoy))
		if !p.sidecar {
			with = "no sidecar"
		}
		n.out.note("pod %-12s %-11s CNI chain %3d ms, program %d, %s", p.name, p.addr, p.cniTook.Milliseconds(), pidOf(p.app), with)
	}
	return nil
}

func pidOf(p *process) int {
	if p == nil {
		return 0
	}
	return p.cmd.Process.Pid
}

// readyz returns the line of the agent's /readyz that a check has.
func (n *node) readyz(ctx context.Context, check string) string {
	body, err := fetch(ctx, "http://"+agentAddr+"/readyz")
	if err != nil {
		return err.Error()
	}
	for _, line := range strings.Split(body, "\n") {
		if strings.HasPrefix(line, "[+]"+check) || strings.HasPrefix(line, "[-]"+check) {
			return line
		}
	}
	return "no check named " + check
}

// tearDown ends everything in the order of a node that leaves a cluster, and
// looks at what is left.
func (n *node) tearDown(ctx context.Context, before state) error {
	n.out.heading("7. What is left behind")
	objects, err := pinned(pinDir)
	if err != nil {
		return err
	}
	// One pod stays until after uninstall, to see what that leaves in it.
	client := n.pod("client")
	rules, err := podRules(client)
	if err != nil {
		return err
	}
	for _, p := range append([]*pod(nil), n.pods...) {
		if p == client {
			continue
		}
		if err := n.end(ctx, p); err != nil {
			return err
		}
	}
	n.out.note("all pods but %s are deleted", client.name)
	if err := n.agent.stop(syscall.SIGTERM); err != nil {
		return err
	}
	began := time.Now()
	if err := uninstall(ctx, n.o); err != nil {
		return err
	}
	n.out.note("agent has ended, sluice-agent uninstall took %d ms", time.Since(began).Milliseconds())
	left, err := podRules(client)
	if err != nil {
		return err
	}
	n.out.expect(len(left) == 0, "%d of %d iptables rules left in pod %s", len(left), len(rules), client.name)
	alive := stillThere(ctx, objects)
	n.out.expect(len(alive) == 0, "%d of %d eBPF programs, maps and links left in the kernel%s", len(alive), len(objects), list(alive))
	n.out.note("pod %s is deleted with no agent there; the plugin says so and succeeds:", client.name)
	if err := n.end(ctx, client); err != nil {
		return err
	}
	// The bridge plugin never removes its bridge.
	bridge, err := netlink.LinkByName(bridgeName)
	if err != nil {
		return fmt.Errorf("find bridge: %w", err)
	}
	if err := netlink.LinkDel(bridge); err != nil {
		return fmt.Errorf("remove bridge: %w", err)
	}
	after, err := snapshot()
	if err != nil {
		return err
	}
	for _, s := range []state{before, after} {
		for kind := range s { // these are compared when the node is gone too
			if strings.HasSuffix(kind, " of the demo") {
				delete(s, kind)
			}
		}
	}
	return n.out.compare("the node", before, after)
}

// list is ": a, b", or empty.
func list(s []string) string {
	if len(s) == 0 {
		return ""
	}
	return ": " + strings.Join(s, ", ")
}

// explain says how to look at what --keep left running.
func (n *node) explain() {
	self := n.o.self
	if wd, err := os.Getwd(); err == nil {
		if rel, err := filepath.Rel(wd, self); err == nil {
			self = rel
		}
	}
	n.out.heading("Everything is left running")
	binDir := filepath.Dir(self)
	client := binDir + "/bookshop client -n 100"
	n.out.line(`How the agent and its pods are:   ip netns exec %[4]s %[8]s/sluice-agent status --http-addr %[5]s
A command inside a pod:           %[1]s exec client %[2]s
                                  %[1]s exec client ip addr
Envoy's admin interface:          %[1]s exec --uid=%[3]d reviews-v1 curl -s localhost:15000/clusters
The agent's metrics:              ip netns exec %[4]s curl -s %[5]s/metrics
Pods and services, read live:     %[6]s
Logs of all programs:             %[7]s/log
To end it:                        make demo-clean`,
		self, client, proxyUID, nodeName, agentAddr, manifestDir, stateDir, binDir)
}

// fetch returns the body that url answers.
func fetch(ctx context.Context, url string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", err
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return "", fmt.Errorf("read answer of %s: %w", url, err)
	}
	return string(b), nil
}
