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
	cni := newCNIMetrics(r)
	cni.requests.WithLabelValues("add", "200").Inc()
	cni.latency.WithLabelValues("add").Observe(time.Millisecond.Seconds())
	r.MustRegister(newBuildInfo(), newNodeMetrics(meter, func() (string, string) { return "ebpf", "" }, &agent{log: log}, func() int { return 0 }))
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
	has = append(has, "sluice_xds_refused_connections_total") // without a sample until one is refused
	doc, err := os.ReadFile("../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	var documented []string
	for _, m := range regexp.MustCompile("(?m)^\\| `(sluice_[a-z_]+)`").FindAllStringSubmatch(string(doc), -1) {
		documented = append(documented, m[1])
	}
	slices.Sort(has)
	slices.Sort(documented)
	if diff := cmp.Diff(has, documented); diff != "" {
		t.Errorf("docs/metrics.md, -the agent has +documented:\n%s", diff)
	}
}

func TestConnectionsOfTwoSandboxesAreAddedUp(t *testing.T) {
	const want = `
# HELP sluice_connections_total TCP connections by what became of them: verdict is redirected, bypassed or denied.
# TYPE sluice_connections_total counter
sluice_connections_total{direction="outbound",namespace="shop",pod="web",reason="captured",verdict="redirected"} 7
`
	if err := testutil.GatherAndCompare(register(t, fakeMeter{}), strings.NewReader(want), "sluice_connections_total"); err != nil {
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
