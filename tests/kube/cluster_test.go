package kube

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"testing"
	"text/template"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// A cluster is its API server, over HTTP and kubectl.
type cluster struct {
	ctx  context.Context
	http *http.Client
	base string
}

func newCluster(ctx context.Context, t *testing.T) cluster {
	t.Helper()
	config, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(clientcmd.NewDefaultClientConfigLoadingRules(), nil).ClientConfig()
	if err != nil {
		t.Fatalf("read KUBECONFIG: %v", err)
	}
	config.Timeout = 30 * time.Second
	config.QPS, config.Burst = -1, 0
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		t.Fatalf("make client of the API server: %v", err)
	}
	return cluster{ctx: ctx, http: client, base: strings.TrimSuffix(config.Host, "/")}
}

// statusError is an answer other than 2xx.
type statusError struct {
	code int
	text string
}

func (e *statusError) Error() string { return fmt.Sprintf("%d: %.500s", e.code, e.text) }

func notFound(err error) bool {
	var e *statusError
	return errors.As(err, &e) && e.code == http.StatusNotFound
}

// request asks the API server.
func (c *cluster) request(method, path, contentType string, body []byte) ([]byte, error) {
	req, err := http.NewRequestWithContext(c.ctx, method, c.base+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	out, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, fmt.Errorf("read answer to %s %s: %w", method, path, err)
	}
	if resp.StatusCode/100 != 2 {
		return nil, fmt.Errorf("%s %s: %w", method, path, &statusError{resp.StatusCode, string(out)})
	}
	return out, nil
}

// get reads the object or list at path into out.
func (c *cluster) get(path string, out any) error {
	b, err := c.request(http.MethodGet, path, "", nil)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, out); err != nil {
		return fmt.Errorf("parse answer to GET %s: %w", path, err)
	}
	return nil
}

// pods lists pods of a namespace by label, "" for all; of all namespaces if the
// namespace is "".
func (c *cluster) pods(t *testing.T, namespace, selector string) []corev1.Pod {
	t.Helper()
	out, err := c.listPods(namespace, selector)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func (c *cluster) listPods(namespace, selector string) ([]corev1.Pod, error) {
	path := "/api/v1/pods"
	if namespace != "" {
		path = "/api/v1/namespaces/" + namespace + "/pods"
	}
	var list corev1.PodList
	err := c.get(path+"?labelSelector="+url.QueryEscape(selector), &list)
	return list.Items, err
}

func (c *cluster) pod(t *testing.T, namespace, name string) corev1.Pod {
	t.Helper()
	var p corev1.Pod
	if err := c.get("/api/v1/namespaces/"+namespace+"/pods/"+name, &p); err != nil {
		t.Fatal(err)
	}
	return p
}

// proxy asks a pod over HTTP through the API server.
func (c *cluster) proxy(namespace, pod string, port int, path string) ([]byte, error) {
	return c.request(http.MethodGet, fmt.Sprintf("/api/v1/namespaces/%s/pods/%s:%d/proxy%s", namespace, pod, port, path), "", nil)
}

func (c *cluster) readyNodes(t *testing.T) []string {
	t.Helper()
	var list corev1.NodeList
	if err := c.get("/api/v1/nodes", &list); err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, n := range list.Items {
		if nodeReady(&n) && !n.Spec.Unschedulable {
			out = append(out, n.Name)
		}
	}
	slices.Sort(out)
	return out
}

func nodeReady(n *corev1.Node) bool {
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

func (c *cluster) isNodeReady(name string) bool {
	var n corev1.Node
	return c.get("/api/v1/nodes/"+name, &n) == nil && nodeReady(&n)
}

// condition returns a pod's condition, nil if it has none of that type.
func condition(p *corev1.Pod, kind string) *corev1.PodCondition {
	for i, c := range p.Status.Conditions {
		if string(c.Type) == kind {
			return &p.Status.Conditions[i]
		}
	}
	return nil
}

func podReady(p *corev1.Pod) bool {
	c := condition(p, string(corev1.PodReady))
	return c != nil && c.Status == corev1.ConditionTrue && p.DeletionTimestamp == nil
}

// kubectl runs kubectl and fails the test if it fails.
func (c *cluster) kubectl(t *testing.T, stdin string, args ...string) string {
	t.Helper()
	out, err := command(c.ctx, stdin, "kubectl", args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// eventually calls f until it returns nil and fails the test with its last error
// when that takes longer than limit.
func (c *cluster) eventually(t *testing.T, limit time.Duration, what string, f func() error) {
	t.Helper()
	var err error
	for deadline := time.Now().Add(limit); ; {
		if err = f(); err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %s: %v", what, limit, err)
		}
		c.tick(t, 250*time.Millisecond)
	}
}

// tick is the time between two looks at something.
func (c *cluster) tick(t *testing.T, d time.Duration) {
	t.Helper()
	select {
	case <-time.After(d):
	case <-c.ctx.Done():
		t.Fatal("interrupted")
	}
}

// during calls f every so often for d: a fault lasts that long.
func (c *cluster) during(t *testing.T, d, every time.Duration, f func()) {
	t.Helper()
	for end := time.Now().Add(d); time.Now().Before(end); {
		f()
		c.tick(t, every)
	}
}

// allReady waits until there are want pods (0: any number but none) and all of
// them are ready.
func (c *cluster) allReady(t *testing.T, limit time.Duration, namespace, selector string, want int) {
	t.Helper()
	c.eventually(t, limit, fmt.Sprintf("pods %s of %s become ready", selector, namespace), func() error {
		pods, err := c.listPods(namespace, selector)
		if err != nil {
			return err
		}
		var not []string
		for _, p := range pods {
			if !podReady(&p) && p.Status.Phase != corev1.PodSucceeded {
				not = append(not, p.Name+" "+string(p.Status.Phase))
			}
		}
		if len(not) > 0 || (want > 0 && len(pods) != want) || len(pods) == 0 {
			return fmt.Errorf("%d pods, want %d, not ready: %v", len(pods), want, not)
		}
		return nil
	})
}

// manifest is a file of testdata with the suite's values filled in.
func (s *suite) manifest(t *testing.T, name string, extra map[string]any) string {
	t.Helper()
	text, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	values := map[string]any{"App": s.app, "Proxy": s.envoy, "A": s.a, "B": s.b}
	for k, v := range extra {
		values[k] = v
	}
	tmpl, err := template.New(name).Option("missingkey=error").Parse(string(text))
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	if err := tmpl.Execute(&b, values); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func (s *suite) apply(t *testing.T, manifest string) {
	t.Helper()
	s.kubectl(t, manifest, "apply", "-f", "-")
}

// deleteAll deletes what a manifest has and waits until it is gone.
func (s *suite) deleteAll(t *testing.T, manifest string) {
	t.Helper()
	s.kubectl(t, manifest, "delete", "-f", "-", "--ignore-not-found", "--wait", "--timeout=120s")
}
