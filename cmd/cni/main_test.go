package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"

	"github.com/sluicemesh/sluice/pkg/podwatch/cniapi"
	"github.com/sluicemesh/sluice/pkg/podwatch/cniapi/cniserver"
	"github.com/sluicemesh/sluice/tests/netnstest"
)

func TestMain(m *testing.M) {
	// tests/cnibench runs the tests' program as the plugin, to know how long that
	// took from the inside.
	if os.Getenv("SLUICE_CNI_TIMED") != "" {
		started := time.Now()
		code := newPlugin().run(os.Getenv("CNI_COMMAND"), os.Stdout)
		fmt.Fprintf(os.Stderr, "inside %d\n", time.Since(started).Nanoseconds())
		os.Exit(code)
	}
	os.Exit(netnstest.VerifyNoLeaks(m))
}

// build compiles the plugin into a directory of its own and returns that.
func build(tb testing.TB) string {
	tb.Helper()
	dir := tb.TempDir()
	out, err := exec.CommandContext(tb.Context(), "go", "build", "-o", filepath.Join(dir, "sluice-cni"), ".").CombinedOutput()
	if err != nil {
		tb.Fatalf("build plugin: %v\n%s", err, out)
	}
	return dir
}

// A fake is an agent that records what it is asked and answers with err.
type fake struct {
	mu    sync.Mutex
	calls []string
	last  cniapi.Attachment
	// network and valid are those of the last GC.
	network string
	valid   []cniapi.AttachmentID
	err     error
}

func (f *fake) note(verb string, a cniapi.Attachment) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls, f.last = append(f.calls, strings.TrimSpace(verb+" "+a.PodName)), a
	return f.err
}

// took returns the calls since it was asked last, and the attachment of the last.
func (f *fake) took() (calls []string, last cniapi.Attachment) {
	f.mu.Lock()
	defer f.mu.Unlock()
	calls, last = f.calls, f.last
	f.calls = nil
	return calls, last
}

func (f *fake) fail(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.err = err
}

func (f *fake) Add(_ context.Context, a cniapi.Attachment) error { return f.note("add", a) }
func (f *fake) Del(_ context.Context, a cniapi.Attachment) error { return f.note("del", a) }
func (f *fake) Check(_ context.Context, a cniapi.Attachment) error {
	return f.note("check", a)
}

func (f *fake) Status(context.Context) error {
	return f.note("status", cniapi.Attachment{})
}

func (f *fake) GC(_ context.Context, network string, valid []cniapi.AttachmentID) error {
	f.network, f.valid = network, valid
	return f.note("gc", cniapi.Attachment{})
}

// agent serves f on a new socket, as the agent would.
func agent(t testing.TB, f *fake) (socket string) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "run", "cni.sock")
	s, err := cniserver.New(cniserver.Options{Socket: socket, Handler: f})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return socket
}

// A call is one execution of the plugin.
type call struct {
	stdout, stderr string
	code           int
}

// execute runs the plugin in dir with the environment of a request.
func execute(tb testing.TB, dir, stdin string, env ...string) call {
	tb.Helper()
	cmd := exec.CommandContext(tb.Context(), filepath.Join(dir, "sluice-cni"))
	cmd.Env = env
	cmd.Stdin = strings.NewReader(stdin)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		tb.Fatal(err)
	}
	return call{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// cniError returns the one error on stdout.
func (c call) cniError(t *testing.T) *types.Error {
	t.Helper()
	if c.code == 0 {
		t.Fatalf("succeeded: %s", c.stdout)
	}
	var e types.Error
	if err := json.Unmarshal([]byte(c.stdout), &e); err != nil {
		t.Fatalf("stdout is not one CNI error: %v\n%s", err, c.stdout)
	}
	return &e
}

const podNames = "CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=0b6f"

func request(verb string, more ...string) []string {
	return append([]string{
		"CNI_COMMAND=" + verb, "CNI_CONTAINERID=c0ffee", "CNI_NETNS=/run/netns/none",
		"CNI_IFNAME=eth0", "CNI_PATH=/opt/cni/bin", podNames,
	}, more...)
}

const prev = `{"cniVersion":"1.1.0","interfaces":[{"name":"eth0","sandbox":"/n"}],"ips":[{"interface":0,"address":"10.1.0.5/16"}]}`

func network(keys string) string {
	return `{"cniVersion":"1.1.0","name":"pods","type":"sluice-cni"` + strings.TrimRight(","+keys, ",") + `}`
}

func TestVersion(t *testing.T) {
	c := execute(t, build(t), "", "CNI_COMMAND=VERSION")
	want := `{"cniVersion":"1.1.0","supportedVersions":["0.3.1","0.4.0","1.0.0","1.1.0"]}`
	if c.code != 0 || strings.TrimSpace(c.stdout) != want {
		t.Errorf("got %d %s, want %s", c.code, c.stdout, want)
	}
}

// What is wrong with a request is said on stdout, with the code that the
// specification has for it, and nothing else is.
func TestErrors(t *testing.T) {
	dir := build(t)
	none := filepath.Join(t.TempDir(), "cni.sock")
	sock := fmt.Sprintf(`"socket":%q`, none)
	down := "sluice agent is not available on this node (socket " + none + "): dial unix " + none + ": connect: no such file or directory"
	for _, tc := range []struct {
		name, conf string
		env        []string
		code       uint
		msg        string
	}{
		{
			"first in the chain", network(sock), request("ADD"), types.ErrInvalidNetworkConfig,
			"sluice-cni configuration: prevResult is missing: sluice-cni must stand in a chain, after the plugin that makes the pod's interface",
		},
		{
			"check without result", network(sock), request("CHECK"), types.ErrInvalidNetworkConfig,
			"sluice-cni configuration: prevResult is missing: sluice-cni must stand in a chain, after the plugin that makes the pod's interface",
		},
		{
			"wrong type", network(`"socket":["x"],"prevResult":` + prev), request("ADD"), types.ErrDecodingFailure,
			"sluice-cni configuration: socket: want a string, got array",
		},
		{
			"agent down", network(sock + `,"prevResult":` + prev), request("ADD"), types.ErrTryAgainLater,
			down + "; pod sandbox creation is retried by the kubelet",
		},
		{
			"check, agent down", network(sock + `,"prevResult":` + prev), request("CHECK"), types.ErrTryAgainLater,
			down,
		},
		{
			"gc, agent down", network(sock + `,"cni.dev/valid-attachments":[]`), request("GC"), types.ErrTryAgainLater,
			down,
		},
		{
			"gc of what?", network(sock), request("GC"), types.ErrInvalidNetworkConfig,
			"sluice-cni configuration: cni.dev/valid-attachments is missing",
		},
		{"status, agent down", network(sock), request("STATUS"), types.ErrPluginNotAvailable, down},
		{
			"half a pod", network(sock + `,"prevResult":` + prev), request("ADD", "CNI_ARGS=K8S_POD_NAME=x"), types.ErrInvalidEnvironmentVariables,
			"CNI_ARGS: of K8S_POD_NAMESPACE and K8S_POD_NAME there is only one",
		},
		{"old version", strings.Replace(network(sock), "1.1.0", "0.2.0", 1), request("ADD"), types.ErrIncompatibleCNIVersion, "incompatible CNI versions"},
		{"check before 0.4.0", strings.Replace(network(sock), "1.1.0", "0.3.1", 1), request("CHECK"), types.ErrIncompatibleCNIVersion, "config version does not allow CHECK"},
		{"gc before 1.1.0", strings.Replace(network(sock), "1.1.0", "1.0.0", 1), request("GC"), types.ErrIncompatibleCNIVersion, "config version does not allow GC"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel() // ADD and STATUS wait for the agent
			c := execute(t, dir, tc.conf, tc.env...)
			e := c.cniError(t)
			if e.Code != tc.code || e.Msg != tc.msg {
				t.Errorf("got  %d %s\nwant %d %s", e.Code, e.Msg, tc.code, tc.msg)
			}
			if c.stderr != "" {
				t.Errorf("stderr: %s", c.stderr)
			}
		})
	}
}

// A sandbox that is not the agent's passes while there is no agent, with
// prevResult as it came.
func TestPassesWithoutAgent(t *testing.T) {
	dir := build(t)
	none := filepath.Join(t.TempDir(), "cni.sock")
	conf := network(fmt.Sprintf(`"socket":%q,"excludeNamespaces":["kube-system","shop"],"prevResult":%s`, none, prev))
	for _, tc := range []struct{ name, args string }{
		{"excluded namespace", podNames},
		{"no pod", "CNI_ARGS="},
		{"no pod, other arguments", "CNI_ARGS=IgnoreUnknown=1;COLOUR=red"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := execute(t, dir, conf, request("ADD", tc.args)...)
			if c.code != 0 || strings.TrimSpace(c.stdout) != prev {
				t.Errorf("ADD: %d %s, want %s", c.code, c.stdout, prev)
			}
			for _, verb := range []string{"CHECK", "DEL"} {
				if c := execute(t, dir, conf, request(verb, tc.args)...); c.code != 0 || c.stdout != "" || c.stderr != "" {
					t.Errorf("%s: %+v", verb, c)
				}
			}
		})
	}
}

// DEL succeeds whatever is wrong, and is silent on stdout.
func TestDelSucceeds(t *testing.T) {
	dir := build(t)
	sock := fmt.Sprintf(`"socket":%q`, filepath.Join(t.TempDir(), "cni.sock"))
	for _, tc := range []struct {
		name, conf string
		env        []string
	}{
		{"agent down", network(sock + `,"prevResult":` + prev), request("DEL")},
		{"no prevResult", network(sock), request("DEL")},
		{"no netns", network(sock), request("DEL", "CNI_NETNS=")},
		{"netns is no namespace", network(sock), request("DEL", "CNI_NETNS=/etc/passwd")},
		{"the node's netns", network(sock), request("DEL", "CNI_NETNS=/proc/self/ns/net")},
		{"garbage as prevResult", network(sock + `,"prevResult":["x",7]`), request("DEL")},
		{"wrong type", network(`"socket":7`), request("DEL")},
		{"garbage as arguments", network(sock), request("DEL", "CNI_ARGS=what")},
		{"garbage as configuration", `garbage`, request("DEL")},
		{"no configuration", ``, request("DEL")},
		{"no container", network(sock), request("DEL", "CNI_CONTAINERID=")},
		{"version of the future", strings.Replace(network(sock), "1.1.0", "9.0.0", 1), request("DEL")},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := execute(t, dir, tc.conf, tc.env...)
			if c.code != 0 || c.stdout != "" {
				t.Errorf("got %+v", c)
			}
			if !strings.Contains(c.stderr, "DEL is not passed on") {
				t.Errorf("stderr does not say that the agent was not told: %s", c.stderr)
			}
		})
	}
}

// Whatever the agent is asked, it hears of which network.
func TestRequestsNameTheirNetwork(t *testing.T) {
	f := &fake{}
	p := &plugin{agent: func(string) cniapi.Handler { return f }, log: slog.New(slog.DiscardHandler)}
	args := &skel.CmdArgs{
		ContainerID: "c", Netns: "/n", IfName: "net1", Args: "K8S_POD_NAMESPACE=a;K8S_POD_NAME=b",
		StdinData: []byte(`{"cniVersion":"1.1.0","name":"storage","type":"sluice-cni","prevResult":` + prev + `,
			"cni.dev/valid-attachments":[{"containerID":"c","ifname":"net1"}]}`),
	}
	for name, verb := range map[string]func(*skel.CmdArgs) error{"add b": p.add, "check b": p.check, "del b": p.del} {
		if err := verb(args); err != nil {
			t.Fatal(err)
		}
		if calls, last := f.took(); len(calls) != 1 || calls[0] != name || last.Network != "storage" {
			t.Errorf("%s: calls %v, network %q", name, calls, last.Network)
		}
	}
	if err := p.gc(args); err != nil {
		t.Fatal(err)
	}
	if f.network != "storage" || len(f.valid) != 1 || f.valid[0] != (cniapi.AttachmentID{ContainerID: "c", IfName: "net1"}) {
		t.Errorf("gc: network %q, valid %v", f.network, f.valid)
	}
}

func TestPanicIsACNIError(t *testing.T) {
	var log bytes.Buffer
	p := &plugin{
		agent: func(string) cniapi.Handler { panic("out of cheese") },
		log:   slog.New(slog.NewTextHandler(&log, nil)),
	}
	args := &skel.CmdArgs{
		ContainerID: "c", Netns: "/n", IfName: "eth0", Args: "K8S_POD_NAMESPACE=a;K8S_POD_NAME=b",
		StdinData: []byte(network(`"prevResult":` + prev + `,"cni.dev/valid-attachments":[]`)),
	}
	for name, verb := range map[string]func(*skel.CmdArgs) error{"add": p.add, "del": p.del, "check": p.check, "gc": p.gc, "status": p.status} {
		log.Reset()
		err := p.guard(verb)(args)
		var e *types.Error
		if !errors.As(err, &e) || e.Code != types.ErrInternal || e.Msg != "panic in sluice-cni: out of cheese" {
			t.Errorf("%s: %v", name, err)
		}
		if !strings.Contains(log.String(), "main_test.go") {
			t.Errorf("%s: log has no stack: %s", name, log.String())
		}
	}
}

// The plugin runs as root on every node, at every start of a pod: it must be
// small, start fast and need no more than its socket.
func TestImports(t *testing.T) {
	out, err := exec.CommandContext(t.Context(), "go", "list", "-deps", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	deps := strings.Fields(string(out))
	if len(deps) < 50 {
		t.Fatalf("only %d packages: %v", len(deps), deps)
	}
	const own = "github.com/sluicemesh/sluice/"
	for _, dep := range deps {
		for _, bad := range []string{"k8s.io/", "sigs.k8s.io/", "github.com/cilium/ebpf", "github.com/envoyproxy/", "google.golang.org/", "github.com/prometheus/", "github.com/vishvananda/netlink", "net/http", "crypto/"} {
			if strings.HasPrefix(dep, bad) {
				t.Errorf("imports %s", dep)
			}
		}
		if strings.HasPrefix(dep, own) && dep != own+"cmd/cni" && dep != own+"pkg/podwatch/cniapi" {
			t.Errorf("imports %s", dep)
		}
	}
}

// TestStartup: the best of some starts, since the machine has other work too.
func TestStartup(t *testing.T) {
	dir := build(t)
	best := time.Hour
	for range 20 {
		start := time.Now()
		if c := execute(t, dir, "", "CNI_COMMAND=VERSION"); c.code != 0 {
			t.Fatalf("%+v", c)
		}
		best = min(best, time.Since(start))
	}
	if best > 20*time.Millisecond {
		t.Errorf("the plugin takes %v to start, answer VERSION and end; want at most 20 ms", best)
	}
}

// BenchmarkStartup is what a plugin in the chain costs by being there: the time
// to start, answer VERSION and end.
func BenchmarkStartup(b *testing.B) {
	dir := build(b)
	for b.Loop() {
		if c := execute(b, dir, "", "CNI_COMMAND=VERSION"); c.code != 0 {
			b.Fatalf("%+v", c)
		}
	}
}

// BenchmarkADD is an ADD that the agent answers at once.
func BenchmarkADD(b *testing.B) {
	dir := build(b)
	conf := network(fmt.Sprintf(`"socket":%q,"prevResult":%s`, agent(b, &fake{}), prev))
	ns := netnstest.New(b, "pod")
	for b.Loop() {
		if c := execute(b, dir, conf, request("ADD", "CNI_NETNS="+ns.Netns)...); c.code != 0 {
			b.Fatalf("%+v", c)
		}
	}
}
