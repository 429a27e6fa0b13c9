package chart

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/sluicemesh/sluice/tests/need"
)

// TestLife installs, upgrades, rolls back and removes Sluice as docs/install.md
// says, and compares the node before and after. SLUICE_NODE_EXEC is a command
// that runs its arguments on the node, where the test's files can be read.
func TestLife(t *testing.T) {
	c := onCluster(t)
	exec := strings.Fields(os.Getenv("SLUICE_NODE_EXEC"))
	if len(exec) == 0 {
		need.Missing(t, "SLUICE_NODE_EXEC: a command that runs its arguments on the cluster's node")
	}
	binary := filepath.Join(t.TempDir(), "snapshot")
	build(t, binary)
	snapshot := func() []string {
		out, err := command(t, exec[0], append(exec[1:], binary)...)
		if err != nil {
			t.Fatalf("snapshot of the node: %v", err)
		}
		return strings.Split(out, "\n")
	}
	c.firstPod()
	before := snapshot()
	c.install()
	if err := c.apply(appPod("app")); err != nil {
		t.Fatal(err)
	}
	for _, check := range []func(string) error{c.podReady, c.redirected} {
		if err := check("app"); err != nil {
			t.Fatal(err)
		}
	}
	if during := snapshot(); cmp.Equal(before, during) {
		t.Fatal("the snapshot does not show an installation")
	}
	// Upgrade and rollback replace the agent and keep the pod's redirection.
	for _, args := range [][]string{
		append([]string{"upgrade", release, chartDir(t), "--namespace", namespace, "--reuse-values", "--set", "logLevel=debug"}, c.args...),
		{"rollback", release, "1", "--namespace", namespace},
	} {
		old, err := c.agent()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := command(t, c.helm, args...); err != nil {
			t.Fatalf("%s: %v", args[0], err)
		}
		if err := c.ready(); err != nil {
			t.Fatalf("%s: %v", args[0], err)
		}
		if now, err := c.agent(); err != nil || now == old {
			t.Errorf("%s: agent %s is still there: %v", args[0], now, err)
		}
		restarts := c.must("-n", apps, "get", "pod", "app", "-o", "jsonpath={.status.containerStatuses[*].restartCount} {.status.initContainerStatuses[*].restartCount}")
		if restarts != "0 0" {
			t.Errorf("%s: containers of the pod were restarted: %s", args[0], restarts)
		}
		if err := c.redirected("app"); err != nil {
			t.Errorf("%s: %v", args[0], err)
		}
	}
	if _, err := command(t, c.helm, "uninstall", release, "--namespace", namespace); err != nil {
		t.Fatal(err)
	}
	c.must("-n", namespace, "wait", "--for=delete", "pod", "-l", "app.kubernetes.io/component=agent", "--timeout=60s")
	c.must("delete", "namespace", apps, "--timeout=90s")
	if err := eventually(settle, func() error {
		// The kubelet made the directory that is mounted, and keeps it.
		kept := func(line string) bool {
			return line == "file /run/sluice drwxr-xr-x" || line == "name /run/sluice"
		}
		if diff := cmp.Diff(slices.DeleteFunc(slices.Clone(before), kept), slices.DeleteFunc(snapshot(), kept)); diff != "" {
			return fmt.Errorf("the node before (-) and after (+):\n%s", diff)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

// firstPod makes a pod, without Sluice, and removes it: with a node's first pod the
// cluster's network makes what it keeps.
func (c cluster) firstPod() {
	c.Helper()
	if err := c.apply("apiVersion: v1\nkind: Namespace\nmetadata: {name: " + apps + "}\n"); err != nil {
		c.Fatal(err)
	}
	// Its service account comes a moment later.
	if err := eventually(settle, func() error { return c.apply(appPod("first")) }); err != nil {
		c.Fatal(err)
	}
	if err := c.podReady("first"); err != nil {
		c.Fatal(err)
	}
	c.must("delete", "namespace", apps, "--timeout=90s")
}

// build compiles the snapshot program.
func build(tb testing.TB, out string) {
	tb.Helper()
	cmd := exec.CommandContext(tb.Context(), "go", "build", "-o", out, "./snapshot")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if b, err := cmd.CombinedOutput(); err != nil {
		tb.Fatalf("build snapshot: %v\n%s", err, b)
	}
}

// TestNamespaceLabel: a namespace whose label forbids the agent is refused with
// the command that helps.
func TestNamespaceLabel(t *testing.T) {
	c := onCluster(t)
	t.Cleanup(c.remove)
	if err := c.apply("apiVersion: v1\nkind: Namespace\nmetadata: {name: " + namespace + ", labels: {pod-security.kubernetes.io/enforce: baseline}}\n"); err != nil {
		t.Fatal(err)
	}
	_, err := command(t, c.helm, "install", release, chartDir(t), "--namespace", namespace)
	const want = "kubectl label --overwrite namespace " + namespace + " pod-security.kubernetes.io/enforce=privileged"
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("install into a namespace with enforce=baseline: %v, want %q", err, want)
	}
}

// TestStatusPolicy tries what an agent may change of a pod's status, with the
// token that it has.
func TestStatusPolicy(t *testing.T) {
	c := onCluster(t)
	c.install()
	if err := c.apply(appPod("app")); err != nil {
		t.Fatal(err)
	}
	if err := c.podReady("app"); err != nil {
		t.Fatal(err)
	}
	// Of a node that is none: nobody else writes its status.
	elsewhere := strings.Replace(appPod("elsewhere"), "spec:\n", "spec:\n  nodeName: no-such-node\n", 1)
	if err := c.apply(elsewhere); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // no kubelet will confirm its end
		_, err := (cluster{TB: background{t}, kubectl: c.kubectl}).k("-n", apps, "delete", "pod", "elsewhere", "--force", "--grace-period=0")
		if err != nil {
			t.Errorf("remove pod: %v", err)
		}
	})
	agent, err := c.agent()
	if err != nil {
		t.Fatal(err)
	}
	token := func(args ...string) string {
		return strings.TrimSpace(c.must(append([]string{"-n", namespace, "create", "token", release + "-agent"}, args...)...))
	}
	bound, unbound := token("--bound-object-kind=Pod", "--bound-object-name="+agent), token()
	server := newServer(c)
	const own = `{"status":{"conditions":[{"type":"sluice.dev/Redirected","status":"False","reason":"Try","message":"try"}]}}`
	for _, try := range []struct {
		name, token, pod, patch, refused string
	}{
		{"its condition", bound, "app", own, ""},
		{"a pod of another node", bound, "elsewhere", own, `node "no-such-node"`},
		{"a token that belongs to no node", unbound, "app", own, "for no node"},
		{"another condition", bound, "app", `{"status":{"conditions":[{"type":"Ready","status":"False"}]}}`, "no more of a pod's status"},
		{"the phase", bound, "app", `{"status":{"phase":"Failed"}}`, "no more of a pod's status"},
		{"the message", bound, "app", `{"status":{"message":"try"}}`, "no more of a pod's status"},
		{"a label", bound, "app", `{"metadata":{"labels":{"a":"b"}}}`, "metadata"},
		{"an annotation", bound, "app", `{"metadata":{"annotations":{"a":"b"}}}`, "metadata"},
	} {
		err := server.patchStatus(t, try.token, try.pod, try.patch)
		switch {
		case try.refused == "" && err != nil:
			t.Errorf("%s: refused: %v", try.name, err)
		case try.refused != "" && (err == nil || !strings.Contains(err.Error(), try.refused)):
			t.Errorf("%s: %v, want a refusal that says %q", try.name, err, try.refused)
		}
	}
}

// A server is the cluster's API server, asked without kubectl, which would ask for
// more than it is told.
type server struct {
	url    string
	client *http.Client
}

func newServer(c cluster) server {
	c.Helper()
	var config struct {
		Clusters []struct {
			Cluster struct {
				Server string
				CA     []byte `json:"certificate-authority-data"`
			}
		}
	}
	if err := json.Unmarshal([]byte(c.must("config", "view", "--raw", "--minify", "--flatten", "-o", "json")), &config); err != nil || len(config.Clusters) != 1 {
		c.Fatalf("read kubeconfig: %v", err)
	}
	ca := x509.NewCertPool()
	ca.AppendCertsFromPEM(config.Clusters[0].Cluster.CA)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: ca, MinVersion: tls.VersionTLS12}}
	c.Cleanup(transport.CloseIdleConnections)
	return server{config.Clusters[0].Cluster.Server, &http.Client{Transport: transport, Timeout: settle}}
}

// patchStatus patches a pod's status as the agent does; a refusal is an error.
func (s server) patchStatus(t *testing.T, token, pod, patch string) error {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPatch, s.url+"/api/v1/namespaces/"+apps+"/pods/"+pod+"/status", strings.NewReader(patch))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer "+token)
	r.Header.Set("Content-Type", "application/strategic-merge-patch+json")
	answer, err := s.client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = answer.Body.Close() }()
	var status struct{ Message string }
	if err := json.NewDecoder(answer.Body).Decode(&status); err != nil {
		t.Fatal(err)
	}
	if answer.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", answer.Status, status.Message)
	}
	return nil
}

// A request is what RBAC decides on.
type request struct{ verb, group, resource string }

func (r request) String() string { return strings.TrimSuffix(r.verb+" "+r.resource+"."+r.group, ".") }

// TestRequests compares what the agent may ask of the API server with what it
// asks, by the server's audit log SLUICE_AUDIT_LOG (level Metadata or more).
func TestRequests(t *testing.T) {
	c := onCluster(t)
	audit := os.Getenv("SLUICE_AUDIT_LOG")
	if audit == "" {
		need.Missing(t, "SLUICE_AUDIT_LOG: the API server's audit log")
	}
	start, err := os.Stat(audit)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.apply(routeCRD); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := (cluster{TB: background{t}, kubectl: c.kubectl}).k("delete", "crd", "httproutes.gateway.networking.k8s.io", "--timeout=60s"); err != nil {
			t.Errorf("remove CRD: %v", err)
		}
	})
	c.install()
	if err := c.apply(appPod("app")); err != nil {
		t.Fatal(err)
	}
	for _, check := range []func(string) error{c.podReady, c.redirected} {
		if err := check("app"); err != nil {
			t.Fatal(err)
		}
	}
	// The same event twice: the second time it is counted.
	for _, ports := range []string{"x", "80", "x"} {
		c.must("-n", apps, "annotate", "--overwrite", "pod", "app", "sluice.dev/exclude-inbound-ports="+ports)
		if err := eventually(settle, func() error {
			out, err := c.k("-n", apps, "get", "pod", "app", "-o", `jsonpath={.status.conditions[?(@.type=="sluice.dev/Redirected")].message}`)
			if err == nil && strings.Contains(out, "exclude-inbound-ports") != (ports == "x") {
				err = fmt.Errorf("with exclude-inbound-ports=%s the condition says %q", ports, out)
			}
			return err
		}); err != nil {
			t.Error(err)
		}
	}
	c.must("-n", namespace, "delete", "daemonset", release+"-agent", "--cascade=foreground", "--timeout=60s")

	allowed := map[request]bool{}
	for _, o := range objects(t, mustRender(t, c.args...)) {
		if o["kind"] != "ClusterRole" && o["kind"] != "Role" {
			continue
		}
		rules, _ := o["rules"].([]any)
		for _, rule := range rules {
			for _, g := range list(at(rule, "apiGroups")) {
				for _, r := range list(at(rule, "resources")) {
					for _, v := range list(at(rule, "verbs")) {
						allowed[request{v, g, r}] = true
					}
				}
			}
		}
	}
	var asked map[request]bool
	if err := eventually(settle, func() error {
		asked = requests(t, audit, start.Size())
		for r := range allowed {
			// A server that can stream a list is asked to watch alone; others are
			// asked to list first.
			if r.verb == "list" && asked[request{"watch", r.group, r.resource}] {
				continue
			}
			if !asked[r] {
				return fmt.Errorf("the agent may %v, and does not", r)
			}
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	for r := range asked {
		if !allowed[r] {
			t.Errorf("the agent asks to %v, and may not", r)
		}
	}
}

func list(v any) []string {
	l, _ := v.([]any)
	var all []string
	for _, s := range l {
		all = append(all, str(s))
	}
	return all
}

// requests returns what the agent asked for since the log had that size.
func requests(t *testing.T, path string, since int64) map[request]bool {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	if _, err := f.Seek(since, 0); err != nil {
		t.Fatal(err)
	}
	all := map[request]bool{}
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<24)
	for lines.Scan() {
		var e struct {
			Verb      string
			User      struct{ Username string }
			UserAgent string
			ObjectRef struct{ Resource, Subresource, APIGroup string }
			Response  struct {
				Code int
			} `json:"responseStatus"`
		}
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			continue // the line that is being written
		}
		// The test's own requests are kubectl's.
		if e.User.Username != "system:serviceaccount:"+namespace+":"+release+"-agent" || !strings.HasPrefix(e.UserAgent, "sluice-agent/") {
			continue
		}
		r := request{e.Verb, e.ObjectRef.APIGroup, strings.TrimSuffix(e.ObjectRef.Resource+"/"+e.ObjectRef.Subresource, "/")}
		all[r] = true
		// While it is uninstalled its rights go before it does.
		if e.Response.Code == 403 && r.resource != "daemonsets" {
			t.Errorf("the agent was refused to %v", r)
		}
	}
	return all
}

// routeCRD defines HTTPRoutes, as far as the agent looks at the definition.
const routeCRD = `apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata:
  name: httproutes.gateway.networking.k8s.io
  annotations: {api-approved.kubernetes.io: "https://github.com/kubernetes-sigs/gateway-api"}
spec:
  group: gateway.networking.k8s.io
  scope: Namespaced
  names: {kind: HTTPRoute, listKind: HTTPRouteList, plural: httproutes, singular: httproute}
  versions:
  - name: v1
    served: true
    storage: true
    schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}
`
