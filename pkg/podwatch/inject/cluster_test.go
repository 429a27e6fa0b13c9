//go:build cluster

package inject_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/sluicemesh/sluice/pkg/podwatch/inject"
	"github.com/sluicemesh/sluice/tests/need"
)

// These tests ask an API server, that of KUBECONFIG, what the chart's admission
// policies do. Nothing but two namespaces and, if the cluster has none of the
// chart's, the policies is made, and all of it is removed. Pods are dry runs.
//
//	KUBECONFIG=... go test -tags cluster ./pkg/podwatch/inject
//
// SLUICE_POLICY_VERSION=v1beta1 takes that version of the API.

// A cluster is what KUBECONFIG leads to.
type cluster struct {
	kubectl string
	// injected is a namespace with the label, plain one without.
	injected, plain string
}

func (c cluster) run(ctx context.Context, stdin string, args ...string) (string, string, error) {
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, c.kubectl, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &stdout, &stderr
	err := cmd.Run()
	return stdout.String(), stderr.String(), err
}

func (c cluster) must(tb testing.TB, stdin string, args ...string) string {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	stdout, stderr, err := c.run(ctx, stdin, args...)
	if err != nil {
		tb.Fatalf("kubectl %s: %v\n%s", strings.Join(args, " "), err, stderr)
	}
	return stdout
}

// try is one dry run of creating something.
func (c cluster) try(tb testing.TB, namespace, yaml string) (string, error) {
	ctx, cancel := context.WithTimeout(tb.Context(), time.Minute)
	defer cancel()
	stdout, stderr, err := c.run(ctx, yaml, "-n", namespace, "create", "--dry-run=server", "--validate=strict", "-o", "json", "-f", "-")
	if err != nil {
		return "", fmt.Errorf("%w: %s", err, strings.TrimSpace(stderr))
	}
	return stdout, nil
}

// newCluster has the policies of the chart with its default values in effect.
func newCluster(tb testing.TB) cluster {
	tb.Helper()
	if os.Getenv("KUBECONFIG") == "" {
		need.Missing(tb, "a cluster: set KUBECONFIG")
	}
	c := cluster{kubectl: need.Tool(tb, "kubectl")}
	id := fmt.Sprintf("sluice-%d-%s", os.Getpid(), strings.ToLower(tb.Name()))
	c.injected, c.plain = id+"-on", id+"-off"
	names := c.must(tb, "", "get", "mutatingadmissionpolicies", "-o", "name")
	if !strings.Contains(names, "-injection") {
		rendered := render(tb, id)
		tb.Cleanup(func() { c.must(tb, rendered, "delete", "--ignore-not-found", "--wait", "-f", "-") })
		c.must(tb, rendered, "create", "-f", "-")
	}
	for name, labels := range map[string]string{c.injected: "{sluice.dev/inject: enabled}", c.plain: "{}"} {
		tb.Cleanup(func() { c.must(tb, "", "delete", "namespace", name, "--ignore-not-found", "--wait=false") })
		c.must(tb, "apiVersion: v1\nkind: Namespace\nmetadata: {name: "+name+", labels: "+labels+"}\n", "create", "-f", "-")
	}
	// New policies take effect a moment after they are made; the service account
	// of a namespace also needs one.
	probe := podCase{name: "probe", metadata: annotated("proxy-cpu", "x"), spec: `containers: [` + container + `]`}
	good := podCase{name: "probe", spec: probe.spec}
	deadline := time.Now().Add(time.Minute)
	for {
		out, err := c.try(tb, c.injected, good.text())
		_, refused := c.try(tb, c.injected, probe.text())
		_, plain := c.try(tb, c.plain, good.text())
		if err == nil && strings.Contains(out, `"sluice-proxy"`) && refused != nil && strings.Contains(refused.Error(), "want a quantity") && plain == nil {
			return c
		}
		if time.Now().After(deadline) {
			tb.Fatalf("the policies take no effect: %v, %v, %v\n%s", err, refused, plain, out)
		}
		time.Sleep(100 * time.Millisecond) // between two looks
	}
}

// render returns the chart's policies.
func render(tb testing.TB, release string) string {
	tb.Helper()
	helm := filepath.Join(need.Repo(tb), ".tools", "bin", "helm")
	if _, err := os.Stat(helm); err != nil {
		need.Missing(tb, "Helm at "+helm+": tests/setup/setup.sh helm")
	}
	version := os.Getenv("SLUICE_POLICY_VERSION")
	if version == "" {
		version = "v1"
	}
	args := []string{
		"template", release, filepath.Join(need.Repo(tb), "deploy", "helm", "sluice"), "-n", "sluice-system",
		"--show-only", "templates/injection.yaml", "--kube-version", "1.34.0",
		"--api-versions", "admissionregistration.k8s.io/" + version + "/MutatingAdmissionPolicy",
	}
	var stdout, stderr bytes.Buffer
	cmd := exec.Command(helm, args...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		tb.Fatalf("helm %s: %v\n%s", strings.Join(args, " "), err, stderr.String())
	}
	return stdout.String()
}

// tokenVolume is a name that the API server makes up for each pod.
var tokenVolume = regexp.MustCompile(`kube-api-access-[a-z0-9]{5}`)

// A stored is what of a pod must be equal.
type stored struct {
	Metadata struct {
		Labels, Annotations map[string]string
	}
	Spec any
}

func read(tb testing.TB, object string) stored {
	tb.Helper()
	var s stored
	if err := json.Unmarshal([]byte(tokenVolume.ReplaceAllString(object, "kube-api-access-x")), &s); err != nil {
		tb.Fatal(err)
	}
	return s
}

// TestPolicyEqualsInject holds the two ways of injection together: what the
// policy makes of a pod is what the server makes of the pod's YAML after Inject.
func TestPolicyEqualsInject(t *testing.T) {
	c := newCluster(t)
	in, err := inject.New(sources(), inject.Options{ReleaseNamespace: "sluice-system"})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range podCases() {
		t.Run(p.name, func(t *testing.T) {
			byPolicy, policyErr := c.try(t, c.injected, p.text())
			result, err := in.Inject("in.yaml", []byte(p.text()))
			if p.refused != "" {
				if err == nil || policyErr == nil || !strings.Contains(policyErr.Error(), p.refused) {
					t.Errorf("want both to contain %q:\npolicy: %v\ninject: %v", p.refused, policyErr, err)
				}
				return
			}
			if err != nil || policyErr != nil {
				t.Fatalf("inject: %v, policy: %v", err, policyErr)
			}
			byInject, err := c.try(t, c.plain, string(result.YAML))
			if err != nil {
				t.Fatalf("the API server refuses what inject made: %v", err)
			}
			if injected := strings.Contains(byPolicy, `"name": "sluice-proxy"`) && p.name != "has-sluice-proxy"; injected == p.plain {
				t.Errorf("the policy injected: %v, want the opposite", injected)
			}
			if diff := cmp.Diff(read(t, byInject), read(t, byPolicy)); diff != "" {
				t.Errorf("policy (+) and inject (-) differ:\n%s", diff)
			}
		})
	}
}

// TestRestricted: a pod that PodSecurity "restricted" takes is taken with its
// sidecar, and the namespace's limits do not stand in the way.
func TestRestricted(t *testing.T) {
	c := newCluster(t)
	c.must(t, "", "label", "namespace", c.injected, "pod-security.kubernetes.io/enforce=restricted")
	c.must(t, `
apiVersion: v1
kind: LimitRange
metadata: {name: limits}
spec:
  limits:
  - {type: Container, default: {cpu: 100m, memory: 100Mi}, max: {cpu: "2", memory: 1Gi}, min: {cpu: 10m, memory: 10Mi}}
---
apiVersion: v1
kind: ResourceQuota
metadata: {name: quota}
spec:
  hard: {requests.cpu: "1", requests.memory: 1Gi, limits.cpu: "4", limits.memory: 4Gi}
`, "-n", c.injected, "create", "-f", "-")
	good := podCase{name: "good", spec: `securityContext: {runAsNonRoot: true, runAsUser: 1000, seccompProfile: {type: RuntimeDefault}}, containers: [` + container + `]`}
	bad := podCase{name: "bad", spec: `containers: [` + container + `]`}
	deadline := time.Now().Add(time.Minute)
	for {
		_, refused := c.try(t, c.injected, bad.text())
		out, err := c.try(t, c.injected, good.text())
		if err == nil && strings.Contains(out, `"sluice-proxy"`) && refused != nil && strings.Contains(refused.Error(), `violates PodSecurity "restricted`) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("restricted pod: %v; other: %v\n%s", err, refused, out)
		}
		time.Sleep(100 * time.Millisecond) // between two looks
	}
}

// TestNamespaceLabel: a wrong label is refused where it is set; one that is
// there already does not stand in the way of other changes.
func TestNamespaceLabel(t *testing.T) {
	c := newCluster(t)
	_, stderr, err := c.run(t.Context(), "", "label", "namespace", c.plain, "sluice.dev/inject=yes")
	if want := `label sluice.dev/inject: "yes": want enabled or disabled`; err == nil || !strings.Contains(stderr, want) {
		t.Errorf("%v, %q; want a refusal with %q", err, stderr, want)
	}
	c.must(t, "", "label", "namespace", c.plain, "sluice.dev/inject=disabled")
	p := podCase{name: "wanted", metadata: `labels: {sluice.dev/inject: enabled}`, spec: `containers: [` + container + `]`}
	if out, err := c.try(t, c.plain, p.text()); err != nil || !strings.Contains(out, `"sluice-proxy"`) {
		t.Errorf("the pod's label does not win over the namespace's: %v\n%s", err, out)
	}
}

// BenchmarkCreatePod measures how long the API server takes for a dry run of
// creating a pod: with a sidecar from the policy, in a namespace that the policy
// leaves alone, and there with the sidecar that Inject made. Interleaved, because
// other work on the machine moves all of them.
//
//	KUBECONFIG=... go test -tags cluster -run - -bench CreatePod -benchtime 300x ./pkg/podwatch/inject
func BenchmarkCreatePod(b *testing.B) {
	c := newCluster(b)
	config, err := clientcmd.BuildConfigFromFlags("", os.Getenv("KUBECONFIG"))
	if err != nil {
		b.Fatal(err)
	}
	config.QPS = -1
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		b.Fatal(err)
	}
	in, err := inject.New(sources(), inject.Options{})
	if err != nil {
		b.Fatal(err)
	}
	pod := podCase{name: "bench", spec: `containers: [` + container + `]`}.text()
	result, err := in.Inject("bench", []byte(pod))
	if err != nil {
		b.Fatal(err)
	}
	ways := []struct{ name, namespace, yaml string }{
		{"policy", c.injected, pod}, {"plain", c.plain, pod}, {"inject", c.plain, string(result.YAML)},
	}
	took := make([][]time.Duration, len(ways))
	create := func(namespace, body string) time.Duration {
		start := time.Now()
		resp, err := client.Post(config.Host+"/api/v1/namespaces/"+namespace+"/pods?dryRun=All", "application/yaml", strings.NewReader(body))
		if err != nil {
			b.Fatal(err)
		}
		text, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if err != nil || resp.StatusCode != http.StatusCreated {
			b.Fatalf("create pod: %s, %v\n%s", resp.Status, err, text)
		}
		return time.Since(start)
	}
	for b.Loop() {
		for i, w := range ways {
			took[i] = append(took[i], create(w.namespace, w.yaml))
		}
	}
	for i, w := range ways {
		slices.Sort(took[i])
		at := func(q float64) float64 {
			return float64(took[i][int(q*float64(len(took[i])-1))].Microseconds()) / 1000
		}
		b.ReportMetric(at(0.5), w.name+"-p50-ms")
		b.ReportMetric(at(0.99), w.name+"-p99-ms")
	}
}
