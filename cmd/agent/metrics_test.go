package main

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/sluicemesh/sluice/pkg/podwatch"
	"github.com/sluicemesh/sluice/pkg/podwatch/cniinstall"
	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/pkg/xds/server"
)

// A fakeMeter counts what the test says.
type fakeMeter struct{ err error }

func (f fakeMeter) Counters(context.Context) ([]redirect.Counter, error) {
	c := redirect.Counter{Pod: "shop/web", Direction: redirect.Outbound, Verdict: "redirected", Reason: "captured", Value: 3}
	other := c
	other.ID.NetnsInode, other.Value = 1, 4 // the same pod's other sandbox
	return []redirect.Counter{c, other}, f.err
}

func (f fakeMeter) MapUsage(context.Context) ([]redirect.MapUsage, error) {
	return []redirect.MapUsage{{Name: "pods", Entries: 1, Capacity: 1024}}, nil
}

// register makes all of the agent's own metrics, each with a sample.
func register(t *testing.T, meter redirect.Meter) *prometheus.Registry {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	r := prometheus.NewRegistry()
	sidecars, err := server.New(server.Options{Log: log})
	if err != nil {
		t.Fatal(err)
	}
	if err := sidecars.Register(r); err != nil {
		t.Fatal(err)
	}
	a := &agent{log: log, store: podwatch.NewStore(podwatch.StoreOptions{}), problems: map[string]string{"pod shop/broken": "bad annotation", "service shop/web": "no port"}}
	web := &podwatch.Pod{Meta: podwatch.Meta{Namespace: "shop", Name: "web"}, Workload: podwatch.Workload{Kind: "Deployment", Name: "web-app"}}
	a.store.Update([]podwatch.Change{{Key: web.Key(), Object: web}})
	a.sidecarsOf = []proxyTarget{{Namespace: "shop", Pod: "web", Netns: "old"}, {Namespace: "shop", Pod: "web", Netns: "new"}}
	r.MustRegister(newPartMetrics(agentParts{
		health: func() []podwatch.KindHealth {
			return []podwatch.KindHealth{{Kind: podwatch.KindPod, Synced: true, LastContact: time.Now()}, {Kind: podwatch.KindService, Err: errors.New("refused")}}
		},
		reports:   func() podwatch.ReporterStats { return podwatch.ReporterStats{Conditions: 3, Events: 2, Failed: 1} },
		installer: func() cniinstall.Status { return cniinstall.Status{Conf: "a", Plugin: "b", Repairs: 4} },
		adopted:   func() int { return 5 },
		drains:    func() (uint64, uint64) { return 6, 7 },
	}))
	cni := newCNIMetrics(r)
	cni.requests.WithLabelValues("add", "200").Inc()
	cni.latency.WithLabelValues("add").Observe(time.Millisecond.Seconds())
	r.MustRegister(newAccelMetrics(accelerator{places: places(), events: map[string]uint64{"joined": 1}}, redirect.AccelerateAuto, a.log))
	r.MustRegister(newBuildInfo(), newNodeMetrics(meter, func() (string, string) { return "ebpf", "" }, a, func() int { return 0 }))
	return r
}

func TestMetricNamesAreLinted(t *testing.T) {
	problems, err := testutil.GatherAndLint(register(t, fakeMeter{}))
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}

// TestMetricsAreDocumented compares what the agent has with docs/metrics.md.
func TestMetricsAreDocumented(t *testing.T) {
	families, err := register(t, fakeMeter{}).Gather()
	if err != nil {
		t.Fatal(err)
	}
	var has []string
	for _, f := range families {
		has = append(has, f.GetName())
	}
	has = append(has,
		"sluice_xds_refused_connections_total", // without a sample until one is refused
		"sluice_proxy_scrape_up", "sluice_proxy_scrape_duration_seconds", "sluice_proxy_scrape_samples", "sluice_proxy_scrape_error_info")
	doc, err := os.ReadFile("../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	var documented []string
	for _, m := range regexp.MustCompile("(?m)^\\| `(sluice_[a-z_]+)`").FindAllStringSubmatch(string(doc), -1) {
		documented = append(documented, m[1])
	}
	_, sidecars := ownProxyChoice(proxyScopes())
	sidecars["envoy_cluster_membership_total"], sidecars["envoy_cluster_membership_healthy"] = "gauge", "gauge"
	for name, kind := range sidecars {
		has = append(has, kind+" "+name)
	}
	for _, row := range regexp.MustCompile("(?m)^\\| (`envoy_.*`) \\| ([a-z]+) \\|$").FindAllStringSubmatch(string(doc), -1) {
		for name := range strings.SplitSeq(row[1], ", ") {
			documented = append(documented, row[2]+" "+strings.Trim(name, "`"))
		}
	}
	slices.Sort(has)
	slices.Sort(documented)
	if diff := cmp.Diff(has, documented); diff != "" {
		t.Errorf("docs/metrics.md, -the agent has +documented:\n%s", diff)
	}
}

// TestPodsByName holds the metrics of single pods: a pod with two sandboxes has
// one series.
func TestPodsByName(t *testing.T) {
	const want = `
# HELP sluice_connections_total TCP connections by what became of them: verdict is redirected, bypassed or denied.
# TYPE sluice_connections_total counter
sluice_connections_total{direction="outbound",namespace="shop",pod="web",reason="captured",verdict="redirected",workload="web-app"} 7
# HELP sluice_pod_info 1 for each redirected pod of this node.
# TYPE sluice_pod_info gauge
sluice_pod_info{namespace="shop",pod="web",workload="web-app"} 1
# HELP sluice_pod_problems 1 for each pod of this node that is not as it asks to be; /readyz tells why.
# TYPE sluice_pod_problems gauge
sluice_pod_problems{namespace="shop",pod="broken",workload=""} 1
`
	if err := testutil.GatherAndCompare(register(t, fakeMeter{}), strings.NewReader(want), "sluice_connections_total", "sluice_pod_info", "sluice_pod_problems"); err != nil {
		t.Error(err)
	}
}

// TestAScrapeThatFailsInPart says so and has the rest.
func TestAScrapeThatFailsInPart(t *testing.T) {
	const want = `
# HELP sluice_scrape_errors Parts of this scrape that could not be read from the kernel.
# TYPE sluice_scrape_errors gauge
sluice_scrape_errors 1
`
	r := register(t, fakeMeter{err: errors.New("map is gone")})
	if err := testutil.GatherAndCompare(r, strings.NewReader(want), "sluice_scrape_errors"); err != nil {
		t.Error(err)
	}
	if n, err := testutil.GatherAndCount(r, "sluice_map_entries"); err != nil || n != 1 {
		t.Errorf("%d map metrics, %v; want 1", n, err)
	}
}
