package chart

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/sluicemesh/sluice/tests/need"
)

// apps is the namespace of the pods that the tests make.
const apps = "sluice-chart-test"

// settle bounds the wait for anything that a healthy cluster does in seconds.
const settle = 25 * time.Second

// A cluster is one that the tests may install Sluice on and remove it from.
type cluster struct {
	testing.TB
	kubectl, helm string
	args          []string // values for this cluster
}

// onCluster ends the test unless it was asked for: a KUBECONFIG alone may be one
// of a cluster that somebody uses. SLUICE_NODE is the node, out of many, on which
// the agent and the pods run; SLUICE_HELM_ARGS are values for this cluster.
func onCluster(tb testing.TB) cluster {
	tb.Helper()
	if os.Getenv("SLUICE_E2E") == "" || os.Getenv("KUBECONFIG") == "" {
		tb.Skip("installs Sluice on the cluster of KUBECONFIG if SLUICE_E2E=1")
	}
	args := strings.Fields(os.Getenv("SLUICE_HELM_ARGS"))
	if node := os.Getenv("SLUICE_NODE"); node != "" {
		args = append(args, "--set", `nodeSelector.kubernetes\.io/hostname=`+node)
	}
	return cluster{TB: tb, kubectl: need.Tool(tb, "kubectl"), helm: helm(tb), args: args}
}

// k runs kubectl.
func (c cluster) k(args ...string) (string, error) { return command(c, c.kubectl, args...) }

func (c cluster) must(args ...string) string {
	c.Helper()
	out, err := c.k(args...)
	if err != nil {
		c.Fatalf("kubectl %s: %v", strings.Join(args, " "), err)
	}
	return out
}

// apply makes or changes what a manifest says.
func (c cluster) apply(text string) error {
	c.Helper()
	path := filepath.Join(c.TempDir(), "apply.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		c.Fatal(err)
	}
	// As Helm does it, whose objects some of these are.
	_, err := c.k("apply", "--server-side", "--force-conflicts", "--field-manager=helm", "-f", path)
	return err
}

// eventually waits until check finds nothing wrong, and returns what it found
// last. The pause between two looks is for the API server's sake.
func eventually(within time.Duration, check func() error) error {
	deadline := time.Now().Add(within)
	for {
		err := check()
		if err == nil || time.Now().After(deadline) {
			return err
		}
		time.Sleep(250 * time.Millisecond)
	}
}

// install installs the chart, and removes it and the pods of the tests at the end.
func (c cluster) install(args ...string) {
	c.Helper()
	c.Cleanup(c.remove)
	args = append([]string{"upgrade", "--install", release, chartDir(c), "--namespace", namespace, "--create-namespace"}, append(c.args, args...)...)
	if _, err := command(c, c.helm, args...); err != nil {
		c.Fatalf("install: %v", err)
	}
	if err := c.ready(); err != nil {
		c.Fatal(err)
	}
	if err := c.apply("apiVersion: v1\nkind: Namespace\nmetadata: {name: " + apps + ", labels: {sluice.dev/inject: enabled}}\n"); err != nil {
		c.Fatal(err)
	}
	// A policy that is new takes effect when the API server has noticed.
	if err := eventually(settle, func() error {
		out, err := c.k("run", "try", "-n", apps, "--image=x", "--dry-run=server", "-o", "yaml")
		if err == nil && !strings.Contains(out, "sluice-proxy") {
			err = errors.New("pods are not injected")
		}
		return err
	}); err != nil {
		c.Fatal(err)
	}
}

// remove removes everything, also after a failure. The test's context has ended.
func (c cluster) remove() {
	cleanup := cluster{TB: background{c.TB}, kubectl: c.kubectl, helm: c.helm}
	_, errPods := cleanup.k("delete", "namespace", apps, "--ignore-not-found", "--timeout=90s")
	_, errHelm := command(cleanup, c.helm, "uninstall", release, "--namespace", namespace, "--ignore-not-found")
	_, errNS := cleanup.k("delete", "namespace", namespace, "--ignore-not-found", "--timeout=90s")
	if err := errors.Join(errPods, errHelm, errNS); err != nil {
		c.Errorf("remove Sluice: %v", err)
	}
}

// ready waits until the DaemonSet of this generation runs everywhere.
func (c cluster) ready() error {
	if _, err := c.k("-n", namespace, "rollout", "status", "daemonset/"+release+"-agent", "--timeout="+settle.String()); err != nil {
		return fmt.Errorf("agent is not ready: %s", c.complaint())
	}
	return nil
}

// complaint returns what the agent, or the kubelet, says is wrong.
func (c cluster) complaint() string {
	var said []string
	logs, _ := c.k("-n", namespace, "logs", "-l", "app.kubernetes.io/component=agent", "--tail=20")
	if logs == "" {
		logs, _ = c.k("-n", namespace, "logs", "-l", "app.kubernetes.io/component=agent", "--tail=20", "--previous")
	}
	for line := range strings.Lines(logs) {
		var entry struct{ Level, Msg, Err, Reason string }
		switch err := json.Unmarshal([]byte(line), &entry); {
		case err != nil:
			said = append(said, strings.TrimSpace(line))
		case entry.Level == "ERROR" || entry.Level == "WARN":
			said = append(said, entry.Msg+": "+entry.Err+entry.Reason)
		}
	}
	if agent, err := c.agent(); err == nil && len(said) == 0 {
		_, err := c.k("get", "--raw", "/api/v1/namespaces/"+namespace+"/pods/"+agent+":15090/proxy/readyz")
		if err != nil {
			said = append(said, err.Error())
		}
	}
	if len(said) == 0 {
		events, _ := c.k("-n", namespace, "get", "events", "--field-selector=type=Warning", "-o", "jsonpath={.items[*].message}")
		said = append(said, events)
	}
	return said[len(said)-1]
}

// agent returns the name of the agent's pod of the first node.
func (c cluster) agent() (string, error) {
	out, err := c.k("-n", namespace, "get", "pods", "-l", "app.kubernetes.io/component=agent", "-o", "jsonpath={.items[0].metadata.name}")
	return strings.TrimSpace(out), err
}

// appPod is a pod whose container opens a connection to the API server's Service
// each half second. It runs as a user of its own, as most do.
func appPod(name string) string {
	const config = `{admin: {address: {socket_address: {address: 0.0.0.0, port_value: 8080}}}, ` +
		`static_resources: {clusters: [{name: api, connect_timeout: 1s, type: STATIC, ` +
		`load_assignment: {cluster_name: api, endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: $(KUBERNETES_SERVICE_HOST), port_value: 443}}}}]}]}, ` +
		`health_checks: [{timeout: 1s, interval: 0.5s, no_traffic_interval: 0.5s, reuse_connection: false, unhealthy_threshold: 1, healthy_threshold: 1, tcp_health_check: {}}]}]}}`
	where := "{}"
	if node := os.Getenv("SLUICE_NODE"); node != "" {
		where = "{kubernetes.io/hostname: " + node + "}"
	}
	return `apiVersion: v1
kind: Pod
metadata: {name: ` + name + `, namespace: ` + apps + `}
spec:
  nodeSelector: ` + where + `
  terminationGracePeriodSeconds: 1
  securityContext: {runAsUser: 2000, runAsGroup: 2000}
  containers:
  - name: app
    image: ` + envoyImage() + `
    command: [envoy, --disable-hot-restart, --log-level, error, --config-yaml]
    args: ['` + config + `']
    readinessProbe: {httpGet: {path: /ready, port: 8080}, periodSeconds: 1}
`
}

func envoyImage() string {
	if image := os.Getenv("SLUICE_PROXY_IMAGE"); image != "" {
		return image
	}
	return "envoyproxy/envoy:v1.40.0"
}

// podReady waits until a pod is ready; the error has what was said about it.
func (c cluster) podReady(name string) error {
	if _, err := c.k("-n", apps, "wait", "--for=condition=Ready", "pod/"+name, "--timeout="+settle.String()); err != nil {
		// Pods of this name come and go; the events outlive them.
		said, _ := c.k("-n", apps, "get", "pod", name, "-o", `jsonpath={.metadata.uid} {.status.conditions[?(@.type=="sluice.dev/Redirected")].message}`)
		uid, condition, _ := strings.Cut(said, " ")
		events, _ := c.k("-n", apps, "get", "events", "--field-selector=type=Warning,involvedObject.uid="+uid, "--sort-by=.lastTimestamp", "-o", `jsonpath={range .items[*]}{.message}{"\n"}{end}`)
		lines := strings.Split(strings.TrimSpace(events), "\n")
		return fmt.Errorf("pod %s is not ready: %s; agent: %s", name, cmp.Or(condition, lines[len(lines)-1]), c.complaint())
	}
	return nil
}

// redirected waits until a pod's condition says that it is redirected.
func (c cluster) redirected(name string) error {
	return eventually(settle, func() error {
		out, err := c.k("-n", apps, "get", "pod", name, "-o", `jsonpath={.status.conditions[?(@.type=="sluice.dev/Redirected")].status} {.status.conditions[?(@.type=="sluice.dev/Redirected")].message}`)
		if err == nil && !strings.HasPrefix(out, "True") {
			err = fmt.Errorf("pod %s is not redirected: %q, agent: %s", name, out, c.complaint())
		}
		return err
	})
}

// captured returns how many connections of a pod went to its proxy, by the agent.
func (c cluster) captured(pod string) (float64, error) {
	agent, err := c.agent()
	if err != nil {
		return 0, err
	}
	out, err := c.k("get", "--raw", "/api/v1/namespaces/"+namespace+"/pods/"+agent+":15090/proxy/metrics")
	if err != nil {
		return 0, err
	}
	m := regexp.MustCompile(`(?m)^sluice_connections_total\{.*direction="outbound",.*pod="` + pod + `".*reason="captured".*\} (\S+)$`).FindStringSubmatch(out)
	if m == nil {
		return 0, fmt.Errorf("no connection of pod %s was captured", pod)
	}
	return strconv.ParseFloat(m[1], 64)
}

// dialled returns how many connections a pod of appPod has opened.
func (c cluster) dialled(pod string) (float64, error) {
	out, err := c.k("get", "--raw", "/api/v1/namespaces/"+apps+"/pods/"+pod+":8080/proxy/stats?filter=cluster.api.health_check.attempt")
	if err != nil {
		return 0, err
	}
	_, n, _ := strings.Cut(strings.TrimSpace(out), ": ")
	return strconv.ParseFloat(n, 64)
}

// daemonSet returns the DaemonSet as the chart has it, for change.
func (c cluster) daemonSet(args ...string) object {
	c.Helper()
	ds := find(c, objects(c, mustRender(c, append(append([]string{}, c.args...), args...)...)), "DaemonSet")
	// By these Helm knows that it is the release's, and removes it with it.
	meta, _ := ds["metadata"].(object)
	meta["annotations"] = object{"meta.helm.sh/release-name": release, "meta.helm.sh/release-namespace": namespace}
	return ds
}

func toYAML(tb testing.TB, o object) string {
	tb.Helper()
	b, err := yaml.Marshal(o)
	if err != nil {
		tb.Fatal(err)
	}
	return string(b)
}
