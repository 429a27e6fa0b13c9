package promcheck

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"

	"github.com/sluicemesh/sluice/tests/need"
)

func read(t *testing.T, path ...string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(append([]string{need.Repo(t)}, path...)...))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func dashboards(t *testing.T) string {
	return filepath.Join(need.Repo(t), "deploy", "helm", "sluice", "dashboards")
}

// TestAlerts lets each alert come and go.
func TestAlerts(t *testing.T) {
	rules := filepath.Join(dashboards(t), "alerts.yaml")
	if err := promtool(t.Context(), t, "", "check", "rules", "--lint-fatal", rules); err != nil {
		t.Error(err)
	}
	cases := filepath.Join(t.TempDir(), "cases.yaml")
	text := strings.ReplaceAll(read(t, "tests", "promcheck", "testdata", "alerts.yaml"), "RULES", rules)
	if err := os.WriteFile(cases, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := promtool(t.Context(), t, "", "test", "rules", cases); err != nil {
		t.Error(err)
	}
	for _, m := range regexp.MustCompile(`(?m)^  - alert: (\w+)$`).FindAllStringSubmatch(read(t, "deploy", "helm", "sluice", "dashboards", "alerts.yaml"), -1) {
		if !strings.Contains(text, "alertname: "+m[1]+"\n") && !strings.Contains(text, `alertname="`+m[1]+`"`) {
			t.Errorf("alert %s never comes in the tests", m[1])
		}
	}
}

// TestDocumentedScrapeConfig has Prometheus read what docs/metrics.md says to
// write, but for what Debian builds it without: the part that finds pods is only
// compared with the chart.
func TestDocumentedScrapeConfig(t *testing.T) {
	_, block, ok := strings.Cut(read(t, "docs", "metrics.md"), "```yaml\n")
	block, _, end := strings.Cut(block, "```")
	if !ok || !end || !strings.Contains(block, "scrape_configs:") {
		t.Fatal("docs/metrics.md has no scrape_configs")
	}
	var doc struct {
		Jobs []struct {
			MetricsPath string `yaml:"metrics_path"`
			HonorLabels bool   `yaml:"honor_labels"`
			Discovery   any    `yaml:"kubernetes_sd_configs"`
		} `yaml:"scrape_configs"`
	}
	if err := yaml.Unmarshal([]byte(block), &doc); err != nil {
		t.Fatal(err)
	}
	paths := map[string]bool{}
	for _, j := range doc.Jobs {
		paths[j.MetricsPath] = j.HonorLabels
		want := []any{map[string]any{
			"role":       "pod",
			"namespaces": map[string]any{"names": []any{"sluice-system"}},
			"selectors":  []any{map[string]any{"role": "pod", "label": "app.kubernetes.io/component=agent"}},
		}}
		if diff := cmp.Diff(want, j.Discovery); diff != "" {
			t.Errorf("%s -want +got:\n%s", j.MetricsPath, diff)
		}
	}
	if !paths[""] || !paths["/metrics/proxies"] {
		t.Errorf("paths and honor_labels: %v", paths)
	}
	if text := read(t, "deploy", "helm", "sluice", "templates", "daemonset.yaml"); !strings.Contains(text, "app.kubernetes.io/component: agent\n") || !strings.Contains(text, "{name: http,") {
		t.Error("the chart's pods have another label or port")
	}
	block = regexp.MustCompile(`(?m)^  kubernetes_sd_configs:.*\n(?:  (?:-| ) .*(?:namespaces|selectors|role: pod).*\n)*`).ReplaceAllString(block, "")
	file := filepath.Join(t.TempDir(), "prometheus.yml")
	if err := os.WriteFile(file, []byte(block), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := promtool(t.Context(), t, "", "check", "config", file); err != nil {
		t.Error(err)
	}
}

// TestDashboardUsesWhatThereIs compares the metrics of dashboard and alerts with
// docs/metrics.md.
func TestDashboardUsesWhatThereIs(t *testing.T) {
	queries, err := readDashboard(filepath.Join(dashboards(t), "sluice.json"))
	if err != nil {
		t.Fatal(err)
	}
	text := read(t, "deploy", "helm", "sluice", "dashboards", "alerts.yaml")
	for _, q := range queries {
		text += q.Expr + "\n"
	}
	doc := read(t, "docs", "metrics.md")
	used := regexp.MustCompile(`\b(?:sluice|envoy)_[a-z0-9_]+`).FindAllString(text, -1)
	if len(used) < 50 {
		t.Fatalf("only %d metrics are used", len(used))
	}
	for _, name := range used {
		if !strings.Contains(doc, "`"+name+"`") && !strings.Contains(doc, "`"+strings.TrimSuffix(name, "_bucket")+"`") && !isLabel(name) {
			t.Errorf("%s is not in docs/metrics.md", name)
		}
	}
}

// isLabel says whether it is a label of Envoy rather than a metric.
func isLabel(name string) bool {
	switch name {
	case "envoy_cluster_name", "envoy_response_code_class", "envoy_http_conn_manager_prefix", "envoy_tcp_prefix":
		return true
	}
	return false
}

func TestLint(t *testing.T) {
	const good = "# HELP sluice_x_total X.\n# TYPE sluice_x_total counter\nsluice_x_total 1\n"
	if err := Lint(t.Context(), t, good+"# TYPE envoy_x counter\nenvoy_x 1\n", "sluice_"); err != nil {
		t.Error(err)
	}
	if Lint(t.Context(), t, strings.ReplaceAll(good, "_total", ""), "sluice_") == nil {
		t.Error("a counter without _total passes")
	}
	if Lint(t.Context(), t, good, "other_") == nil {
		t.Error("nothing passes")
	}
}
