package promcheck

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/sluicemesh/sluice/tests/need"
	"github.com/sluicemesh/sluice/tests/netnstest"
)

func TestMain(m *testing.M) { os.Exit(netnstest.VerifyNoLeaks(m)) }

// TestRealPrometheus has a target that is fine and one that is not, and a
// dashboard with a query that has an answer, two that have none, one that is no
// query.
func TestRealPrometheus(t *testing.T) {
	need.Root(t)
	Tool(t, "prometheus")
	ns := netnstest.New(t, "prometheus")
	serve := func(port int, text string) {
		l, err := ns.Listen(t.Context(), "tcp4", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			t.Fatal(err)
		}
		s := &http.Server{ReadHeaderTimeout: time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(text)) })}
		go func() { _ = s.Serve(l) }()
		t.Cleanup(func() { _ = s.Close() })
	}
	serve(8001, "a 1\n")
	serve(8002, "b{ 1\n")
	config := func(ports ...int) string {
		var targets []string
		for _, p := range ports {
			targets = append(targets, fmt.Sprintf("'127.0.0.1:%d'", p))
		}
		return "global: {scrape_interval: 200ms, scrape_timeout: 200ms}\nscrape_configs:\n- job_name: x\n  static_configs: [{targets: [" + strings.Join(targets, ", ") + "]}]\n"
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	p := Start(t, ns, config(8001, 8002))
	if err := Poll(ctx, func() error {
		samples, err := p.Query(ctx, "a")
		if err == nil && (len(samples) != 1 || samples[0].Value != "1" || samples[0].Labels["job"] != "x") {
			err = fmt.Errorf("%v", samples)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if err := Poll(ctx, func() error {
		err := p.Targets(ctx, 3)
		for _, want := range []string{"2 targets, want 3", "8002", "expected"} {
			if err == nil || !strings.Contains(err.Error(), want) {
				return fmt.Errorf("%q is not in: %w", want, err)
			}
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	if err := p.Targets(ctx, 1); err == nil || strings.Contains(err.Error(), "8001") {
		t.Errorf("of the targets, %v", err)
	}

	file := filepath.Join(t.TempDir(), "d.json")
	const dashboard = `{"templating": {"list": [{"name": "job", "type": "query", "query": {"query": "label_values(a{x=~\"$none\"}, job)"}}]}, "panels": [
		{"title": "full", "targets": [{"expr": "a{job=~\"$job\"}"}]},
		{"title": "empty", "targets": [{"expr": "c"}, {"expr": "0 * a / 0"}]},
		{"title": "calm", "targets": [{"expr": "d"}], "fieldConfig": {"defaults": {"noValue": "None"}}},
		{"title": "wrong", "targets": [{"expr": "rate(a"}]},
		{"title": "row", "type": "row"}]}`
	if err := os.WriteFile(file, []byte(dashboard), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Dashboard(ctx, file); err == nil || !strings.Contains(err.Error(), "unknown variable $none") {
		t.Errorf("of an unknown variable, %v", err)
	}
	if err := os.WriteFile(file, []byte(strings.Replace(dashboard, `{x=~\"$none\"}`, "", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	queries, err := p.Dashboard(ctx, file)
	if err == nil || !strings.Contains(err.Error(), "panel wrong") || strings.Contains(err.Error(), "panel full") {
		t.Errorf("of a wrong query, %v", err)
	}
	want := []PanelQuery{
		{"variable job", `count by (job) (a{job!=""})`, 1, false},
		{"full", `a{job=~".*"}`, 1, false},
		{"empty", "c", 0, false},
		{"empty", "0 * a / 0", 0, false},
		{"calm", "d", 0, true},
		{"wrong", "rate(a", 0, false},
	}
	if diff := cmp.Diff(want, queries); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if err := Empty(queries); err == nil || strings.Count(err.Error(), "panel empty") != 2 || strings.Contains(err.Error(), "calm") {
		t.Errorf("of the empty ones, %v", err)
	}
	if _, err := (Prometheus{URL: p.URL, Client: &http.Client{Transport: &http.Transport{
		DialContext: func(context.Context, string, string) (net.Conn, error) { return nil, os.ErrDeadlineExceeded },
	}}}).Query(ctx, "a"); err == nil {
		t.Error("a Prometheus that is not there answers")
	}
}
