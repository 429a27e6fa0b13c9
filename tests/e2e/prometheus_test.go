package e2e

import (
	"context"
	"fmt"
	"net/http"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/sluicemesh/sluice/tests/need"
	"github.com/sluicemesh/sluice/tests/promcheck"
	"github.com/sluicemesh/sluice/tests/sluicetest"
)

// scrapeConfig is that of docs/metrics.md, with the node as target.
const scrapeConfig = `
global: {scrape_interval: 1s, scrape_timeout: 1s}
scrape_configs:
- job_name: sluice-agent
  honor_labels: true
  static_configs: &agents [{targets: ['` + sluicetest.HTTPAddr + `'], labels: {node: node-a}}]
- job_name: sluice-proxies
  metrics_path: /metrics/proxies
  honor_labels: true
  static_configs: *agents
`

// TestPrometheus has a real Prometheus scrape the agent and the sidecars while
// there is traffic, and asks it every query of the dashboard.
func TestPrometheus(t *testing.T) {
	promcheck.Tool(t, "prometheus")
	sluicetest.EachBackend(t, func(t *testing.T, backend string) {
		n, client, server := newPair(t, backend)
		const owned = `, labels: {app: %s, pod-template-hash: 6c8f7d9b5}, ownerReferences: [{apiVersion: apps/v1, kind: ReplicaSet, name: %[1]s-app-6c8f7d9b5, uid: u, controller: true}]`
		for _, p := range []*sluicetest.Pod{client, server} {
			n.Apply(t, "pod-"+p.Name+".yaml", n.PodYAML(p.Name, sluicetest.PodSpec{Metadata: fmt.Sprintf(owned, p.Name)}))
		}
		ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
		defer cancel()
		p := promcheck.Start(t, n.Namespace, scrapeConfig)
		http80 := startLoad(t, client, "http://"+vip4+":80/")

		dashboard := filepath.Join(need.Repo(t), "deploy", "helm", "sluice", "dashboards", "sluice.json")
		var queries []promcheck.PanelQuery
		err := promcheck.Poll(ctx, func() (err error) {
			mustEcho82(t, client)
			if err = p.Targets(ctx, 2); err != nil {
				return err
			}
			if queries, err = p.Dashboard(ctx, dashboard); err != nil {
				return err
			}
			return promcheck.Empty(queries)
		})
		if err != nil {
			t.Errorf("Prometheus: %v", err)
		}
		full := slices.DeleteFunc(slices.Clone(queries), func(q promcheck.PanelQuery) bool { return q.Series == 0 })
		t.Logf("%d of %d queries have an answer", len(full), len(queries))

		// What the numbers say.
		for expr, want := range map[string]string{
			`sum(sluice_proxy_scrape_up{node="node-a", namespace="e2e", job="sluice-proxies"})`:                                                                "2",
			`count(envoy_server_live{pod="client", workload="client-app", node="node-a"} == 1)`:                                                                "1",
			`count(sluice_pod_info{namespace="e2e", pod="server", workload="server-app"})`:                                                                     "1",
			`count(sluice_connections_total{pod="client", workload="client-app", direction="outbound", verdict="redirected"} > 0)`:                             "1",
			`envoy_cluster_membership_healthy{pod="client", envoy_cluster_name="out/e2e/server/80"}`:                                                           "1",
			`count(envoy_cluster_membership_healthy{pod="client", envoy_cluster_name="out/e2e/server/85"}) or vector(0)`:                                       "0",
			`count({__name__=~"envoy_.+", envoy_http_conn_manager_prefix=~"admin|ready"}) or vector(0)`:                                                        "0",
			`count({__name__=~"envoy_.+", exported_namespace!=""} or {__name__=~"sluice_.+", exported_namespace!=""}) or vector(0)`:                            "0",
			`count(sum(increase(envoy_http_downstream_rq_xx{pod="server", envoy_http_conn_manager_prefix="inbound", envoy_response_code_class="2"}[1m])) > 0)`: "1",
			`count(histogram_quantile(0.99, sum by (le) (rate(envoy_cluster_upstream_rq_time_bucket{pod="client"}[1m]))) > 0)`:                                 "1",
		} {
			var got []promcheck.Sample
			if err := promcheck.Poll(ctx, func() (err error) {
				got, err = p.Query(ctx, expr)
				if err == nil && (len(got) != 1 || got[0].Value != want) {
					err = fmt.Errorf("%s: %v, want %s", expr, got, want)
				}
				return err
			}); err != nil {
				t.Error(err)
			}
		}
		for _, path := range []string{"/metrics", "/metrics/proxies", "/metrics/proxies?all=1", "/metrics/proxies?filter=^server"} {
			code, body, err := n.Get(path)
			if err != nil || code != http.StatusOK {
				t.Errorf("%s: status %d, %v", path, code, err)
				continue
			}
			if err := promcheck.Lint(ctx, t, body, "sluice_"); err != nil {
				t.Errorf("%s: %v", path, err)
			}
		}

		// A sidecar that has ended is missing, and nothing else is.
		server.Envoy.Stop()
		if err := promcheck.Poll(ctx, func() error {
			for expr, want := range map[string]string{
				`sluice_proxy_scrape_up{pod="server"}`:                           "0",
				`sluice_proxy_scrape_up{pod="client"}`:                           "1",
				`sluice_proxy_scrape_error_info{pod="server", reason="refused"}`: "1",
				`count(envoy_server_live{pod="server"}) or vector(0)`:            "0",
				`count(envoy_server_live{pod="client"})`:                         "1",
			} {
				if got, err := p.Query(ctx, expr); err != nil || len(got) != 1 || got[0].Value != want {
					return fmt.Errorf("%s: %v, want %s, error %w", expr, got, want, err)
				}
			}
			return p.Targets(ctx, 2)
		}); err != nil {
			t.Error(err)
		}
		http80.stop()
	})
}

// mustEcho82 sends something over TCP.
func mustEcho82(t *testing.T, client *sluicetest.Pod) {
	t.Helper()
	if err := client.Do(func() error { return shortConnection(t.Context()) }); err != nil {
		t.Fatal(err)
	}
}
