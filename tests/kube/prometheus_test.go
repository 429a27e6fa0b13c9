package kube

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sluicemesh/sluice/tests/promcheck"
)

// prometheus runs a real Prometheus with the configuration of docs/metrics.md and
// asks it all that the dashboard asks.
func (s *suite) prometheus(t *testing.T) {
	p := s.startPrometheus(t)
	const pages = "http://productpage.bookshop.svc.cluster.local:9080/"
	var queries []promcheck.PanelQuery
	s.eventually(t, 90*time.Second, "Prometheus has an answer to every query", func() (err error) {
		s.call(t, loadNamespace, "load-a", 10, pages, "new-connections=true")
		// Two agents, each with its own metrics and those of its sidecars.
		if err := p.Targets(s.ctx, 4); err != nil {
			return err
		}
		if queries, err = p.Dashboard(s.ctx, "../../deploy/helm/sluice/dashboards/sluice.json"); err != nil {
			return err
		}
		return promcheck.Empty(queries)
	})
	full := 0
	for _, q := range queries {
		if q.Series > 0 {
			full++
		}
	}
	s.note("%d of %d queries of the dashboard have an answer, the others may be empty", full, len(queries))
	for expr, want := range map[string]string{
		`count(count by (node) (sluice_backend_info{backend="` + s.backend + `"}))`:                                                      "2",
		`count(envoy_server_live{namespace="sluice-e2e", pod=~"(echo|load)-[ab]"} == 1)`:                                                 "4",
		`count(count by (pod) (envoy_server_live{namespace="bookshop", workload="productpage"}))`:                                        "2",
		`count(sluice_connections_total{namespace="sluice-e2e", pod="load-a", direction="outbound", verdict="redirected"} > 0) > bool 0`: "1",
	} {
		s.eventually(t, 30*time.Second, expr, func() error {
			got, err := p.Query(s.ctx, expr)
			if err == nil && (len(got) != 1 || got[0].Value != want) {
				err = fmt.Errorf("got %v, want %s", got, want)
			}
			return err
		})
	}
}

// startPrometheus runs one on this machine until the test ends.
func (s *suite) startPrometheus(t *testing.T) promcheck.Prometheus {
	t.Helper()
	program := promcheck.Tool(t, "prometheus")
	dir := t.TempDir()
	file := filepath.Join(dir, "prometheus.yml")
	if err := os.WriteFile(file, []byte(s.scrapeConfig(t)), 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	_ = l.Close()
	var log bytes.Buffer
	cmd := exec.Command(program, "--config.file="+file, "--storage.tsdb.path="+filepath.Join(dir, "data"), "--web.listen-address="+addr, "--log.level=warn")
	cmd.Stdout, cmd.Stderr = &log, &log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan struct{})
	go func() { defer close(exited); _ = cmd.Wait() }()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-exited
		if t.Failed() {
			t.Logf("Prometheus logged:\n%s", log.String())
		}
	})
	p := promcheck.Prometheus{URL: "http://" + addr, Client: &http.Client{Timeout: 10 * time.Second}}
	s.eventually(t, 30*time.Second, "Prometheus answers", func() error {
		_, err := p.Query(context.WithoutCancel(s.ctx), "vector(1)")
		return err
	})
	return p
}

// scrapeConfig is that of docs/metrics.md. Debian's Prometheus cannot ask an API
// server for pods: what it would be told is written down.
func (s *suite) scrapeConfig(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	_, block, _ := strings.Cut(string(text), "```yaml\nscrape_configs:")
	block, _, ok := strings.Cut(block, "```")
	discovery := regexp.MustCompile(`(?m)^  kubernetes_sd_configs: &agents\n(?:  - .*\n|    .*\n)+`)
	if !ok || !discovery.MatchString(block) {
		t.Fatalf("docs/metrics.md has no scrape_configs that find pods in the way known here:\n%s", block)
	}
	var found strings.Builder
	found.WriteString("  static_configs: &agents\n")
	for _, p := range s.pods(t, system, agentSelector) {
		fmt.Fprintf(&found, "  - targets: [\"%s:%d\"]\n    labels: {__meta_kubernetes_pod_node_name: %s, __meta_kubernetes_pod_container_port_name: http}\n", p.Status.PodIP, metricsPort, p.Spec.NodeName)
	}
	block = discovery.ReplaceAllLiteralString(block, found.String())
	return "global: {scrape_interval: 2s}\nscrape_configs:" + strings.ReplaceAll(block, "kubernetes_sd_configs: *agents", "static_configs: *agents")
}
