package cnibench

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/pkg/podwatch/cniapi"
	"github.com/sluicemesh/sluice/tests/need"
	"github.com/sluicemesh/sluice/tests/netnstest"
)

func TestMain(m *testing.M) { os.Exit(netnstest.VerifyNoLeaks(m)) }

var (
	rounds = flag.Int("rounds", 2, "ADDs of each kind, one after the other in each round")
	pods   = flag.Int("pods", 4, "pods on the node in the second half")
	burst  = flag.Int("burst", 8, "ADDs, and then DELs, at the same moment")
)

// peer is a plugin that others made and every pod passes. All medians are compared
// with its.
const peer = "loopback of the CNI project, ADD: around"

const (
	warmUp   = 2 // rounds that are not counted
	deadline = 60 * time.Second
	httpAddr = "127.0.0.1:15090"
)

// TestADD prints the table.
func TestADD(t *testing.T) {
	need.Root(t)
	need.EBPF(t)
	need.Tool(t, "iptables-restore")
	peers := need.CNIPlugins(t)
	bin := build(t)
	runtimes, agents := cores(t)
	backends := []*backend{newBackend(t, bin, "ebpf", agents), newBackend(t, bin, "iptables", agents)}

	for _, n := range []int{1, *pods} {
		for _, b := range backends {
			b.fill(t, n-1)
		}
		var all samples
		unpin := pin(t, runtimes)
		for round := range *rounds + warmUp {
			var s samples
			s.run(t, "a Go program that does nothing: around", exec.Command(filepath.Join(bin, "noop")), "")
			s.run(t, peer, plugin(filepath.Join(peers, "loopback"), "ADD", backends[0].pod(t, 0)), loopbackConf)
			s.run(t, "sluice-cni, VERSION: around", exec.Command(filepath.Join(bin, "sluice-cni")), "", "CNI_COMMAND=VERSION")
			for _, b := range backends {
				b.measure(t, bin, &s)
			}
			if round >= warmUp {
				all.merge(s)
			}
		}
		unpin()
		all.print(t, fmt.Sprintf("%d pods on the node, %d rounds, ms", n, *rounds))
	}
	var all samples
	for _, b := range backends {
		b.burst(t, bin, *burst, &all)
	}
	all.print(t, fmt.Sprintf("%d at the same moment, beside %d pods, ms", *burst, *pods))
}

// build makes the programs in a directory and returns that.
func build(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	noop := filepath.Join(dir, "noop.go")
	if err := os.WriteFile(noop, []byte("package main\n\nfunc main() {}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, pkg := range map[string]string{"sluice-agent": "../../cmd/agent", "sluice-cni": "../../cmd/cni", "noop": noop} {
		cmd := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", filepath.Join(dir, name), pkg)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("build %s: %v\n%s", name, err, out)
		}
	}
	timed := exec.CommandContext(t.Context(), "go", "test", "-c", "-trimpath", "-ldflags", "-s -w", "-o", filepath.Join(dir, "timed"), "../../cmd/cni")
	timed.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := timed.CombinedOutput(); err != nil {
		t.Fatalf("build the plugin that knows its time: %v\n%s", err, out)
	}
	return dir
}

// cores returns the core of the one who calls plugins, and that of the agents: -1
// if there is but one, or if processes cannot be bound to them.
func cores(t *testing.T) (runtimes, agents int) {
	t.Helper()
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		t.Fatalf("read CPU affinity: %v", err)
	}
	var may []int
	for c := range 1024 {
		if set.IsSet(c) {
			may = append(may, c)
		}
	}
	if _, err := exec.LookPath("taskset"); err != nil || len(may) < 2 {
		t.Log("not bound to cores: there is one, or no taskset")
		return -1, -1
	}
	return may[0], may[1]
}

// pin binds this goroutine, and what it starts, to a core until unpin.
func pin(t *testing.T, core int) (unpin func()) {
	t.Helper()
	if core < 0 {
		return func() {}
	}
	runtime.LockOSThread()
	var before, set unix.CPUSet
	set.Set(core)
	err := unix.SchedGetaffinity(0, &before)
	if err == nil {
		err = unix.SchedSetaffinity(0, &set)
	}
	if err != nil {
		t.Fatalf("bind to core %d: %v", core, err)
	}
	return func() {
		if err := unix.SchedSetaffinity(0, &before); err != nil {
			t.Errorf("end binding to core %d: %v", core, err)
			return // the thread ends with the goroutine
		}
		runtime.UnlockOSThread()
	}
}

// A backend is a node with an agent of that backend.
type backend struct {
	name   string
	socket string
	node   *netnstest.Node
	source string
	pods   []*netnstest.Pod
	added  int // pods that are on the node
}

func newBackend(t *testing.T, bin, name string, core int) *backend {
	t.Helper()
	dir := t.TempDir()
	state, source, pins := filepath.Join(dir, "state"), filepath.Join(dir, "source"), filepath.Join(dir, "bpf", "sluice")
	for _, d := range []string{state, source, filepath.Dir(pins)} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	b := &backend{name: name, socket: filepath.Join(state, "cni.sock"), node: netnstest.NewNode(t), source: source}
	var yaml strings.Builder
	yaml.WriteString("{apiVersion: v1, kind: Namespace, metadata: {name: bench, labels: {sluice.dev/redirect: enabled}}}\n")
	for i := range max(*pods, *burst) + 1 {
		fmt.Fprintf(&yaml, "---\n{apiVersion: v1, kind: Pod, metadata: {name: pod%d, namespace: bench, uid: uid-%s-%d}, spec: {containers: [{name: app}]}}\n", i, name, i)
	}
	if err := os.WriteFile(filepath.Join(source, "pods.yaml"), []byte(yaml.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	agent := func(args ...string) *exec.Cmd {
		return exec.Command(filepath.Join(bin, "sluice-agent"), append(args, "--state-dir", state, "--pin-dir", pins, "--cni-socket", b.socket)...)
	}
	var log bytes.Buffer
	run := agent("run", "--source", "files:"+source, "--backend", name, "--node", "node-a", "--http-addr", httpAddr)
	if core >= 0 {
		run = exec.Command("taskset", append([]string{"-c", strconv.Itoa(core)}, run.Args...)...)
	}
	run.Stdout, run.Stderr = &log, &log
	t.Cleanup(func() {
		if run.Process != nil {
			_ = run.Process.Kill()
			_ = run.Wait()
		}
		if t.Failed() {
			t.Logf("agent with %s logged:\n%s", name, log.String())
		}
		if out, err := agent("uninstall").CombinedOutput(); err != nil {
			t.Errorf("uninstall: %v\n%s", err, out)
		}
	})
	if err := b.node.Do(run.Start); err != nil {
		t.Fatalf("start agent: %v", err)
	}
	// The client waits for the agent as the plugin does.
	if err := cniapi.NewClient(cniapi.ClientOptions{Socket: b.socket, StatusBudget: deadline}).Status(t.Context()); err != nil {
		t.Fatalf("agent with %s is not ready: %v", name, err)
	}
	return b
}

// pod returns the i-th pod's namespace.
func (b *backend) pod(t *testing.T, i int) *netnstest.Pod {
	t.Helper()
	for len(b.pods) <= i {
		b.pods = append(b.pods, b.node.Pod(t, fmt.Sprintf("%s%d", b.name[:2], len(b.pods))))
	}
	return b.pods[i]
}

func (b *backend) attachment(t *testing.T, i int) cniapi.Attachment {
	t.Helper()
	pod := b.pod(t, i)
	return cniapi.Attachment{
		AttachmentID: cniapi.AttachmentID{ContainerID: fmt.Sprintf("box-%d", i), IfName: "eth0"},
		Network:      "pods", Netns: pod.Netns, PodNamespace: "bench", PodName: fmt.Sprintf("pod%d", i), PodUID: fmt.Sprintf("uid-%s-%d", b.name, i),
		Interfaces: []cniapi.Interface{{Name: "eth0", Addrs: pod.Addrs()}},
	}
}

// fill makes the node have n pods beside the one that is measured, which is the
// first.
func (b *backend) fill(t *testing.T, n int) {
	t.Helper()
	c := cniapi.NewClient(cniapi.ClientOptions{Socket: b.socket})
	for ; b.added < n; b.added++ {
		if err := c.Add(t.Context(), b.attachment(t, b.added+1)); err != nil {
			t.Fatal(err)
		}
	}
}

// measure adds and deletes the first pod: by the plugin, by one that knows its own
// time, and without one.
func (b *backend) measure(t *testing.T, bin string, s *samples) {
	t.Helper()
	for _, verb := range []string{"ADD", "DEL"} {
		s.run(t, fmt.Sprintf("sluice-cni, %s, %s: around", b.name, verb), plugin(filepath.Join(bin, "sluice-cni"), verb, b.pod(t, 0)), b.conf(t, 0), b.args(0)...)
	}
	for _, verb := range []string{"ADD", "DEL"} {
		cmd := plugin(filepath.Join(bin, "timed"), verb, b.pod(t, 0))
		cmd.Env = append(append(cmd.Env, "SLUICE_CNI_TIMED=1"), b.args(0)...)
		var stdout, stderr bytes.Buffer
		cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(b.conf(t, 0)), &stdout, &stderr
		var inside int64
		err := cmd.Run()
		if err == nil {
			_, err = fmt.Sscanf(stderr.String(), "inside %d\n", &inside)
		}
		if err != nil {
			t.Fatalf("%s with %s: %v: %s%s", verb, b.name, err, stdout.String(), stderr.String())
		}
		s.note(fmt.Sprintf("sluice-cni, %s, %s: inside", b.name, verb), time.Duration(inside))
	}
	c := cniapi.NewClient(cniapi.ClientOptions{Socket: b.socket})
	at := b.attachment(t, 0)
	for _, ask := range []struct {
		verb string
		do   func(context.Context, cniapi.Attachment) error
	}{{"ADD", c.Add}, {"DEL", c.Del}} {
		start := time.Now()
		if err := ask.do(t.Context(), at); err != nil {
			t.Fatalf("%s with %s: %v", ask.verb, b.name, err)
		}
		s.note(fmt.Sprintf("the agent, %s, %s: from connecting to its answer", b.name, ask.verb), time.Since(start))
	}
}

// burst adds n pods at the same moment, each with a plugin of its own, and then
// deletes them, beside one more pod that is added meanwhile.
func (b *backend) burst(t *testing.T, bin string, n int, s *samples) {
	t.Helper()
	c := cniapi.NewClient(cniapi.ClientOptions{Socket: b.socket})
	for i := range n + 1 { // the namespaces are made, and nobody is redirected
		if err := c.Del(t.Context(), b.attachment(t, i)); err != nil {
			t.Fatal(err)
		}
	}
	var mu sync.Mutex
	start := make(chan struct{})
	once := func(verb, what string, i int) func() {
		cmd := plugin(filepath.Join(bin, "sluice-cni"), verb, b.pod(t, i))
		conf, args := b.conf(t, i), b.args(i)
		return func() {
			<-start
			var one samples
			if err := one.try(fmt.Sprintf("sluice-cni, %s, %s", b.name, what), cmd, conf, args...); err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			s.merge(one)
		}
	}
	for _, verb := range []string{"ADD", "DEL"} {
		start = make(chan struct{})
		var all sync.WaitGroup
		for i := range n {
			all.Go(once(verb, verb+": around", i+1))
		}
		if verb == "DEL" {
			all.Go(once("ADD", "ADD among the DELs: around", 0))
		}
		close(start)
		all.Wait()
	}
	if err := c.Del(t.Context(), b.attachment(t, 0)); err != nil {
		t.Error(err)
	}
}

func (b *backend) conf(t *testing.T, i int) string {
	t.Helper()
	pod := b.pod(t, i)
	var ips []string
	for _, a := range pod.Addrs() {
		ips = append(ips, fmt.Sprintf(`{"interface":0,"address":%q}`, netip.PrefixFrom(a, a.BitLen())))
	}
	return fmt.Sprintf(`{"cniVersion":"1.1.0","name":"pods","type":"sluice-cni","socket":%q,"prevResult":{"cniVersion":"1.1.0","interfaces":[{"name":"eth0","sandbox":%q}],"ips":[%s]}}`,
		b.socket, pod.Netns, strings.Join(ips, ","))
}

func (b *backend) args(i int) []string {
	return []string{
		fmt.Sprintf("CNI_CONTAINERID=box-%d", i),
		fmt.Sprintf("CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=bench;K8S_POD_NAME=pod%d;K8S_POD_UID=uid-%s-%d", i, b.name, i),
	}
}

const loopbackConf = `{"cniVersion":"1.0.0","name":"lo","type":"loopback"}`

// plugin is how a runtime calls a plugin.
func plugin(path, verb string, pod *netnstest.Pod) *exec.Cmd {
	cmd := exec.Command(path)
	cmd.Env = []string{"CNI_COMMAND=" + verb, "CNI_CONTAINERID=box", "CNI_NETNS=" + pod.Netns, "CNI_IFNAME=eth0", "CNI_PATH=" + filepath.Dir(path)}
	return cmd
}

// samples are times by what took them.
type samples struct {
	names []string
	times map[string][]time.Duration
}

func (s *samples) note(name string, d time.Duration) {
	if s.times == nil {
		s.times = make(map[string][]time.Duration)
	}
	if _, known := s.times[name]; !known {
		s.names = append(s.names, name)
	}
	s.times[name] = append(s.times[name], d)
}

func (s *samples) merge(o samples) {
	for _, name := range o.names {
		for _, d := range o.times[name] {
			s.note(name, d)
		}
	}
}

// run notes how long a program takes from its start to its end, which must be a
// good one.
func (s *samples) run(t *testing.T, name string, cmd *exec.Cmd, stdin string, env ...string) {
	t.Helper()
	if err := s.try(name, cmd, stdin, env...); err != nil {
		t.Fatal(err)
	}
}

func (s *samples) try(name string, cmd *exec.Cmd, stdin string, env ...string) error {
	var out bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &out
	cmd.Env = append(cmd.Env, env...)
	start := time.Now()
	err := cmd.Run()
	s.note(name, time.Since(start))
	if err == nil && strings.Contains(out.String(), "DEL is not passed on") {
		err = errors.New("the agent was not told")
	}
	if err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, out.String())
	}
	return nil
}

func (s *samples) sorted(name string) []time.Duration {
	return slices.Sorted(slices.Values(s.times[name]))
}

func (s *samples) print(t *testing.T, title string) {
	t.Helper()
	ms := func(d time.Duration) string { return fmt.Sprintf("%.2f", float64(d.Microseconds())/1000) }
	var b strings.Builder
	fmt.Fprintf(&b, "\n| %s | n | median | p99 | max | median / loopback's |\n| --- | --- | --- | --- | --- | --- |\n", title)
	for _, name := range s.names {
		all, ratio := s.sorted(name), ""
		if peers := s.sorted(peer); len(peers) > 0 {
			ratio = fmt.Sprintf("%.2f", float64(all[len(all)/2])/float64(peers[len(peers)/2]))
		}
		fmt.Fprintf(&b, "| %s | %d | %s | %s | %s | %s |\n", name, len(all), ms(all[len(all)/2]), ms(all[len(all)*99/100]), ms(all[len(all)-1]), ratio)
	}
	t.Log(b.String())
}
