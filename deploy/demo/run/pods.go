package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/containernetworking/cni/libcni"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"sigs.k8s.io/yaml"

	"github.com/sluicemesh/sluice/pkg/redirect/netns"
)

// An object is a Kubernetes object as YAML has it.
type object map[string]any

// at follows the keys into nested maps; it returns nil where there is none.
func (o object) at(keys ...string) any {
	var v any = map[string]any(o)
	for _, k := range keys {
		m, ok := v.(map[string]any)
		if !ok {
			return nil
		}
		v = m[k]
	}
	return v
}

func (o object) str(keys ...string) string {
	s, _ := o.at(keys...).(string)
	return s
}

// set changes a field of a map that exists.
func (o object) set(key string, v any, parents ...string) {
	o.at(parents...).(map[string]any)[key] = v
}

// readManifests returns the documents of all files in dir.
func readManifests(dir string) ([]object, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*.yaml"))
	if err != nil {
		return nil, err
	}
	var out []object
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			return nil, fmt.Errorf("read manifest: %w", err)
		}
		for _, doc := range strings.Split(string(b), "\n---\n") {
			var o object
			if err := yaml.Unmarshal([]byte(doc), &o); err != nil {
				return nil, fmt.Errorf("parse manifest %s: %w", f, err)
			}
			out = append(out, o)
		}
	}
	return out, nil
}

// A pod is a pod of the demo.
type pod struct {
	name, namespace string
	id              string // of its sandbox, as a container runtime would name it
	manifest        object
	command         []string
	sidecar         bool
	addr            netip.Addr
	app, envoy      *process
	cniTook         time.Duration
}

func newPod(o object) (*pod, error) {
	var id [16]byte
	if _, err := rand.Read(id[:]); err != nil {
		return nil, fmt.Errorf("make an ID: %w", err)
	}
	p := &pod{
		name: o.str("metadata", "name"), namespace: o.str("metadata", "namespace"),
		id: fmt.Sprintf("%x", id), manifest: o,
	}
	o.set("uid", fmt.Sprintf("%x-%x-%x-%x-%x", id[:4], id[4:6], id[6:8], id[8:10], id[10:]), "metadata")
	o.set("creationTimestamp", time.Now().UTC().Format(time.RFC3339), "metadata")
	containers, _ := o.at("spec", "containers").([]any)
	if len(containers) != 1 {
		return nil, fmt.Errorf("pod %s: want one container, have %d", p.name, len(containers))
	}
	words, _ := object(containers[0].(map[string]any)).at("command").([]any)
	for _, w := range words {
		p.command = append(p.command, fmt.Sprint(w))
	}
	if len(p.command) == 0 {
		return nil, fmt.Errorf("pod %s: its container has no command", p.name)
	}
	inits, _ := o.at("spec", "initContainers").([]any)
	p.sidecar = slices.ContainsFunc(inits, func(c any) bool {
		return object(c.(map[string]any)).str("name") == "sluice-proxy"
	})
	return p, nil
}

// report writes the pod as the kubelet would have reported it.
func (n *node) report(p *pod, ready bool) error {
	status := "False"
	if ready {
		status = "True"
	}
	p.manifest["status"] = map[string]any{
		"phase":      "Running",
		"conditions": []any{map[string]any{"type": "Ready", "status": status}},
	}
	return n.apply(p.manifest)
}

// apply writes an object into the directory that the agent watches, at once
// and whole.
func (n *node) apply(o object) error {
	b, err := yaml.Marshal(o)
	if err != nil {
		return fmt.Errorf("encode manifest: %w", err)
	}
	file := manifestFile(o)
	tmp := filepath.Join(stateDir, "manifest.tmp")
	if err := os.WriteFile(tmp, b, 0o644); err != nil {
		return fmt.Errorf("write manifest: %w", err)
	}
	if err := os.Rename(tmp, file); err != nil {
		return fmt.Errorf("write manifest: %w", err)
	}
	return nil
}

func manifestFile(o object) string {
	name := strings.ToLower(o.str("kind")) + "-" + o.str("metadata", "namespace") + "-" + o.str("metadata", "name") + ".yaml"
	return filepath.Join(manifestDir, name)
}

// runtimeConf is what containerd gives its plugins for a pod.
func (p *pod) runtimeConf(ifName string) *libcni.RuntimeConf {
	return &libcni.RuntimeConf{
		ContainerID: p.id, NetNS: netnsPath(prefix + p.name), IfName: ifName,
		Args: [][2]string{
			{"IgnoreUnknown", "1"},
			{"K8S_POD_NAMESPACE", p.namespace},
			{"K8S_POD_NAME", p.name},
			{"K8S_POD_INFRA_CONTAINER_ID", p.id},
			{"K8S_POD_UID", p.manifest.str("metadata", "uid")},
		},
	}
}

// start brings a pod up in the order of a kubelet: network, sidecar, program.
func (n *node) start(ctx context.Context, o object) (*pod, error) {
	p, err := newPod(o)
	if err != nil {
		return nil, err
	}
	if err := n.report(p, false); err != nil {
		return nil, err
	}
	if err := newNetns(prefix + p.name); err != nil {
		return nil, err
	}
	n.pods = append(n.pods, p)
	if _, err := n.cni.AddNetworkList(ctx, n.loopback, p.runtimeConf("lo")); err != nil {
		return nil, fmt.Errorf("set up loopback of pod %s: %w", p.name, err)
	}
	began := time.Now()
	res, err := n.cni.AddNetworkList(ctx, n.chain, p.runtimeConf("eth0"))
	if err != nil {
		return nil, fmt.Errorf("set up network of pod %s: %w", p.name, err)
	}
	p.cniTook = time.Since(began)
	result, err := types100.NewResultFromResult(res)
	if err != nil {
		return nil, fmt.Errorf("read CNI result of pod %s: %w", p.name, err)
	}
	for _, ip := range result.IPs {
		p.addr, _ = netip.AddrFromSlice(ip.Address.IP.To4())
	}
	if p.sidecar {
		p.envoy, err = n.inPod(p, "envoy-"+p.name, proxyUID, n.o.envoy, "-c", bootstrapFile,
			"--disable-hot-restart", "--concurrency", "1", "--file-flush-interval-msec", "100", "--log-level", "warn")
		if err != nil {
			return nil, err
		}
		url := fmt.Sprintf("http://%s:15021/healthz/ready", p.addr)
		if err := waitFor(ctx, "the Envoy of pod "+p.name, p.envoy, get(ctx, url)); err != nil {
			return nil, err
		}
	}
	argv := slices.Clone(p.command)
	if argv[0] == "bookshop" {
		argv[0] = filepath.Join(n.o.bin, argv[0])
	}
	if p.app, err = n.inPod(p, p.name, appUID, argv...); err != nil {
		return nil, err
	}
	if p.command[0] == "bookshop" {
		if err := waitFor(ctx, "the program of pod "+p.name, p.app, p.app.logs("serves on")); err != nil {
			return nil, err
		}
	}
	return p, n.report(p, true)
}

// inPod starts a program inside a pod.
func (n *node) inPod(p *pod, name string, uid int, argv ...string) (*process, error) {
	return spawn(name, append([]string{n.o.self, "exec", fmt.Sprintf("--uid=%d", uid), p.name}, argv...)...)
}

// get returns nil once url answers 200.
func get(ctx context.Context, url string) func() error {
	return func() error {
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return err
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return err
		}
		_ = resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("get %s: %s", url, resp.Status)
		}
		return nil
	}
}

// terminate marks a pod as deleted, as the API server would.
func (n *node) terminate(p *pod) error {
	p.manifest.set("deletionTimestamp", time.Now().UTC().Format(time.RFC3339), "metadata")
	return n.apply(p.manifest)
}

// end takes a pod down in the order of a kubelet: program, sidecar, network.
// It goes on after an error.
func (n *node) end(ctx context.Context, p *pod) error {
	n.pods = slices.DeleteFunc(n.pods, func(q *pod) bool { return q == p })
	var errs []error
	for _, proc := range []*process{p.app, p.envoy} {
		if proc != nil {
			errs = append(errs, proc.stop(syscall.SIGTERM))
		}
	}
	errs = append(errs,
		n.cni.DelNetworkList(ctx, n.chain, p.runtimeConf("eth0")),
		n.cni.DelNetworkList(ctx, n.loopback, p.runtimeConf("lo")),
		removeNetns(netnsPath(prefix+p.name)),
		os.Remove(manifestFile(p.manifest)))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("end pod %s: %w", p.name, err)
	}
	return nil
}

func (n *node) pod(name string) *pod {
	i := slices.IndexFunc(n.pods, func(p *pod) bool { return p.name == name })
	return n.pods[i]
}

// podRules returns the iptables rules in a pod's network namespace.
func podRules(p *pod) (rules []string, err error) {
	err = netns.Do(netnsPath(prefix+p.name), func() error {
		s, err := snapshot()
		rules = slices.DeleteFunc(s["iptables rules"], func(r string) bool { return !strings.Contains(r, ": -A") })
		return err
	})
	return rules, err
}
