package main

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/pkg/redirect/bpf"
	"github.com/sluicemesh/sluice/tests/need"
	"github.com/sluicemesh/sluice/tests/netnstest"
)

// A fakeProxy answers as the admin interface of one pod's sidecar.
type fakeProxy = http.HandlerFunc

func says(text string) fakeProxy {
	return func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, text) }
}

// hangs takes the request and never answers.
func hangs(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }

// newFakeProxies returns the handler over sidecars by pod, all in namespace
// shop; nil refuses connections.
func newFakeProxies(t testing.TB, sidecars map[string]fakeProxy) *proxies {
	t.Helper()
	addrs := map[string]string{}
	var targets []proxyTarget
	for _, pod := range slices.Sorted(maps.Keys(sidecars)) {
		f := sidecars[pod]
		targets = append(targets, proxyTarget{Namespace: "shop", Pod: pod, Netns: "/netns/" + pod})
		if f != nil {
			s := httptest.NewServer(f)
			t.Cleanup(func() { s.CloseClientConnections(); s.Close() })
			addrs[pod] = s.Listener.Addr().String()
		}
	}
	p := newProxies(func() []proxyTarget { return targets })
	p.dial = func(ctx context.Context, target proxyTarget) (net.Conn, error) {
		addr, ok := addrs[target.Pod]
		if !ok {
			return nil, &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}
		}
		return new(net.Dialer).DialContext(ctx, "tcp", addr)
	}
	return p
}

// get asks for /metrics/proxies and returns what it answers.
func getProxies(t testing.TB, h http.Handler, query string, header ...string) *httptest.ResponseRecorder {
	t.Helper()
	r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/metrics/proxies"+query, nil)
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

// parseMetrics ends the test unless text is what Prometheus' own parser takes:
// each family once, no sample twice.
func parseMetrics(t testing.TB, text string) map[string]*dto.MetricFamily {
	t.Helper()
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(text))
	if err != nil {
		t.Fatalf("%v in\n%.3000s", err, text)
	}
	for name, f := range families {
		seen := map[string]bool{}
		for _, m := range f.GetMetric() {
			labels := fmt.Sprint(m.GetLabel())
			if seen[labels] {
				t.Errorf("%s%s is there twice", name, labels)
			}
			seen[labels] = true
		}
	}
	if n := strings.Count("\n"+text, "\n# TYPE "); n != len(families) {
		t.Errorf("%d TYPE lines for %d families", n, len(families))
	}
	return families
}

// scraped returns the value of a metric of ours for a pod, and its reason.
func scraped(t testing.TB, families map[string]*dto.MetricFamily, name, pod string) (value float64, reason string) {
	t.Helper()
	for _, m := range families[name].GetMetric() {
		labels := map[string]string{}
		for _, l := range m.GetLabel() {
			labels[l.GetName()] = l.GetValue()
		}
		if labels["pod"] == pod {
			return m.GetGauge().GetValue(), labels["reason"]
		}
	}
	return -1, ""
}

const goodText = `# TYPE envoy_server_live gauge
envoy_server_live{} 1
# TYPE envoy_cluster_upstream_rq_total counter
envoy_cluster_upstream_rq_total{envoy_cluster_name="out/shop/web/80"} 3
`

func TestProxiesAreMerged(t *testing.T) {
	p := newFakeProxies(t, map[string]fakeProxy{
		"a": says(goodText),
		"b": says(`# TYPE envoy_cluster_upstream_rq_total counter
envoy_cluster_upstream_rq_total{envoy_cluster_name="in/80"} 4
envoy_cluster_upstream_rq_total{envoy_cluster_name="xds"} 9
# TYPE envoy_cluster_upstream_rq_time histogram
envoy_cluster_upstream_rq_time_bucket{envoy_cluster_name="in/80",le="0.5"} 1
envoy_cluster_upstream_rq_time_bucket{envoy_cluster_name="in/80",le="+Inf"} 4
envoy_cluster_upstream_rq_time_sum{envoy_cluster_name="in/80"} 12.5
envoy_cluster_upstream_rq_time_count{envoy_cluster_name="in/80"} 4
# TYPE envoy_server_dropped_stat_flushes counter
envoy_server_dropped_stat_flushes{} 1
# TYPE envoy_cluster_membership_total gauge
envoy_cluster_membership_total{envoy_cluster_name="in/80"} 1
envoy_cluster_membership_total{envoy_cluster_name="out/shop/unused/80"} 2
`),
	})
	targets := p.targets() // the same each time
	for i := range targets {
		if targets[i].Pod == "b" {
			targets[i].Workload = "bee"
		}
	}
	w := getProxies(t, p, "")
	ours, _, _ := strings.Cut(w.Body.String(), "# TYPE envoy")
	text := regexp.MustCompile(`(?m)^(sluice_proxy_scrape_duration_seconds\{.*\}) .*$`).ReplaceAllString(w.Body.String(), "$1 D")
	const want = `# HELP sluice_proxy_scrape_up 1 if the sidecar's statistics are part of this scrape.
# TYPE sluice_proxy_scrape_up gauge
sluice_proxy_scrape_up{namespace="shop",pod="a"} 1
sluice_proxy_scrape_up{namespace="shop",pod="b",workload="bee"} 1
# HELP sluice_proxy_scrape_duration_seconds How long the sidecar took.
# TYPE sluice_proxy_scrape_duration_seconds gauge
sluice_proxy_scrape_duration_seconds{namespace="shop",pod="a"} D
sluice_proxy_scrape_duration_seconds{namespace="shop",pod="b",workload="bee"} D
# HELP sluice_proxy_scrape_samples Samples of the sidecar in this scrape.
# TYPE sluice_proxy_scrape_samples gauge
sluice_proxy_scrape_samples{namespace="shop",pod="a"} 2
sluice_proxy_scrape_samples{namespace="shop",pod="b",workload="bee"} 6
# TYPE envoy_cluster_membership_total gauge
envoy_cluster_membership_total{namespace="shop",pod="b",workload="bee",envoy_cluster_name="in/80"} 1
# TYPE envoy_cluster_upstream_rq_time histogram
envoy_cluster_upstream_rq_time_bucket{namespace="shop",pod="b",workload="bee",envoy_cluster_name="in/80",le="0.5"} 1
envoy_cluster_upstream_rq_time_bucket{namespace="shop",pod="b",workload="bee",envoy_cluster_name="in/80",le="+Inf"} 4
envoy_cluster_upstream_rq_time_sum{namespace="shop",pod="b",workload="bee",envoy_cluster_name="in/80"} 12.5
envoy_cluster_upstream_rq_time_count{namespace="shop",pod="b",workload="bee",envoy_cluster_name="in/80"} 4
# TYPE envoy_cluster_upstream_rq_total counter
envoy_cluster_upstream_rq_total{namespace="shop",pod="a",envoy_cluster_name="out/shop/web/80"} 3
envoy_cluster_upstream_rq_total{namespace="shop",pod="b",workload="bee",envoy_cluster_name="in/80"} 4
# TYPE envoy_server_live gauge
envoy_server_live{namespace="shop",pod="a"} 1
`
	if diff := cmp.Diff(want, text); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if got := w.Header().Get("Content-Type"); got != "text/plain; version=0.0.4; charset=utf-8" {
		t.Errorf("content type %q", got)
	}
	problems, err := promlint.New(strings.NewReader(ours)).Lint()
	if err != nil || len(problems) > 0 {
		t.Errorf("%v, %v", problems, err)
	}
}

// TestProxyQueries holds what the sidecars are asked for, and that metrics that
// are not Envoy's are never passed on.
func TestProxyQueries(t *testing.T) {
	var asked atomic.Pointer[url.URL]
	p := newFakeProxies(t, map[string]fakeProxy{"a": func(w http.ResponseWriter, r *http.Request) {
		asked.CompareAndSwap(nil, r.URL) // for membership it is asked again
		_, _ = io.WriteString(w, goodText+"# TYPE envoy_x counter\nenvoy_x{} 1\n# TYPE sluice_ready gauge\nsluice_ready 0\n")
	}})
	own, _ := ownProxyChoice(proxyScopes())
	for query, want := range map[string]struct {
		filter  string
		used, x bool
		code    int
	}{
		"":       {filter: own, used: true, code: 200},
		"?all=1": {x: true, code: 200},
		"?filter=" + url.QueryEscape(`^server\.`): {filter: `^server\.`, used: true, x: true, code: 200},
		"?all=1&filter=a%26b":                     {filter: "a&b", x: true, code: 200},
		"?all=maybe":                              {code: 400},
		"?filter=(":                               {code: 400},
		"?filter=" + strings.Repeat("a", 2000):    {code: 400},
	} {
		asked.Store(nil)
		w := getProxies(t, p, query)
		if w.Code != want.code {
			t.Errorf("%s: status %d, want %d: %s", query, w.Code, want.code, w.Body)
		}
		u := asked.Load()
		if want.code != 200 {
			if u != nil {
				t.Errorf("%s: the sidecar was asked %s", query, u)
			}
			continue
		}
		if u.Path != "/stats/prometheus" || u.Query().Get("filter") != want.filter || u.Query().Has("usedonly") != want.used {
			t.Errorf("%s: the sidecar was asked %s", query, u)
		}
		families := parseMetrics(t, w.Body.String())
		if (families["envoy_x"] != nil) != want.x {
			t.Errorf("%s: envoy_x is there: %t", query, !want.x)
		}
		if families["sluice_ready"] != nil {
			t.Errorf("%s: a sidecar's metric passes for ours", query)
		}
	}
}

// TestBadProxiesHideNoOther has one sidecar of each kind of failure beside good
// ones.
func TestBadProxiesHideNoOther(t *testing.T) {
	bad := map[string]struct {
		proxy  fakeProxy
		reason string
	}{
		"dead":    {nil, "refused"},
		"hanging": {hangs, "timeout"},
		"babbling": {func(w http.ResponseWriter, r *http.Request) {
			for r.Context().Err() == nil {
				_, _ = io.WriteString(w, strings.Repeat("# nothing\n", 1000))
			}
		}, "too_big"},
		"trickling": {func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.WriteString(w, goodText)
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
		}, "timeout"},
		"cut": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "10000")
			_, _ = io.WriteString(w, goodText)
		}, "broken"},
		"failing": {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusInternalServerError) }, "status"},
		"leading": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://127.0.0.1:1/", http.StatusFound)
		}, "status"},
		"html": {says("<html>"), "format"},
		"huge": {says("# TYPE envoy_server_live gauge\nenvoy_server_live{a=\"" + strings.Repeat("x", 100_000) + "\"} 1\n"), "format"},
	}
	sidecars := map[string]fakeProxy{"good-1": says(goodText), "good-2": says(goodText)}
	for pod, b := range bad {
		sidecars[pod] = b.proxy
	}
	p := newFakeProxies(t, sidecars)
	p.limits.each = 2 * time.Second
	p.limits.body = 1 << 18
	families := parseMetrics(t, getProxies(t, p, "").Body.String())
	for pod := range sidecars {
		want := 0.0
		if strings.HasPrefix(pod, "good") {
			want = 1
		}
		if up, _ := scraped(t, families, "sluice_proxy_scrape_up", pod); up != want {
			t.Errorf("%s is up %v, want %v", pod, up, want)
		}
		if live, _ := scraped(t, families, "envoy_server_live", pod); (live == 1) != (want == 1) {
			t.Errorf("%s: envoy_server_live %v", pod, live)
		}
		if _, reason := scraped(t, families, "sluice_proxy_scrape_error_info", pod); reason != bad[pod].reason {
			t.Errorf("%s: reason %q, want %q", pod, reason, bad[pod].reason)
		}
	}
}

// TestManyHangingProxies has so many sidecars that hang that the time is over
// before the last one's turn. The next time they come last.
func TestManyHangingProxies(t *testing.T) {
	sidecars := map[string]fakeProxy{"z-good": says(goodText)}
	for i := range 30 {
		sidecars[fmt.Sprintf("hanging-%d", i)] = hangs
	}
	p := newFakeProxies(t, sidecars)
	p.limits.whole, p.limits.each, p.limits.parallel = time.Second, 400*time.Millisecond, 2
	start := time.Now()
	families := parseMetrics(t, getProxies(t, p, "").Body.String())
	if took := time.Since(start); took > 2*time.Second {
		t.Errorf("took %v", took)
	}
	if _, reason := scraped(t, families, "sluice_proxy_scrape_error_info", "z-good"); reason != "not_reached" {
		t.Errorf("reason %q, want not_reached", reason)
	}
	// Each round learns of some more; by then the good one is among the first.
	for range 20 {
		families = parseMetrics(t, getProxies(t, p, "").Body.String())
		if up, _ := scraped(t, families, "sluice_proxy_scrape_up", "z-good"); up == 1 {
			return
		}
	}
	t.Error("the good sidecar never has its turn")
}

func TestHostileText(t *testing.T) {
	head := "# TYPE envoy_server_live gauge\n"
	for name, test := range map[string]struct{ text, want string }{
		"our labels": {
			head + `envoy_server_live{namespace="x",pod="y",job="z",instance="i",__name__="up",envoy_a="b"} 1` + "\n",
			`envoy_server_live{namespace="shop",pod="p",exported___name__="up",envoy_a="b",exported_instance="i",exported_job="z",exported_namespace="x",exported_pod="y"} 1` + "\n",
		},
		"our metrics":            {"# TYPE sluice_proxy_scrape_up gauge\nsluice_proxy_scrape_up{} 1\n# TYPE up gauge\nup 1\n" + head + "envoy_server_live 1\n", `envoy_server_live{namespace="shop",pod="p"} 1` + "\n"},
		"escapes":                {head + `envoy_server_live{a="q\"b\\n\n{}, x"} 1` + "\n", `envoy_server_live{namespace="shop",pod="p",exported_a="q\"b\\n\n{}, x"} 1` + "\n"},
		"spaces and commas":      {head + "envoy_server_live { a = \"b\" , }  \t NaN \r\n", ""},
		"spaces":                 {head + "envoy_server_live{ a = \"b\" , }  \t NaN \r\n\n# EOF\n", `envoy_server_live{namespace="shop",pod="p",exported_a="b"} NaN` + "\n"},
		"twice":                  {head + "envoy_server_live{a=\"1\",b=\"2\"} 1\nenvoy_server_live{b=\"2\",a=\"1\",c=\"\"} 2\n", `envoy_server_live{namespace="shop",pod="p",exported_a="1",exported_b="2"} 1` + "\n"},
		"TYPE twice":             {head + "envoy_server_live 1\n# TYPE envoy_x gauge\n" + head + "envoy_server_live{a=\"1\"} 2\n", `envoy_server_live{namespace="shop",pod="p"} 1` + "\n" + `envoy_server_live{namespace="shop",pod="p",exported_a="1"} 2` + "\n"},
		"other type":             {"# TYPE envoy_server_live counter\nenvoy_server_live 1\n", "-"},
		"two types":              {head + "envoy_server_live 1\n# TYPE envoy_server_live counter\n", ""},
		"no TYPE":                {"envoy_server_live 1\n", ""},
		"other family":           {head + "envoy_server_live_bucket{le=\"1\"} 1\n", ""},
		"unescaped quote":        {head + `envoy_server_live{a="b"c"} 1` + "\n", ""},
		"no end of the labels":   {head + `envoy_server_live{a="b" 1` + "\n", ""},
		"no end of the value":    {head + `envoy_server_live{a="b} 1` + "\n", ""},
		"unknown escape":         {head + `envoy_server_live{a="\t"} 1` + "\n", ""},
		"label twice":            {head + `envoy_server_live{a="1",a="2"} 1` + "\n", ""},
		"label name":             {head + `envoy_server_live{0a="1"} 1` + "\n", ""},
		"no value":               {head + `envoy_server_live{}` + "\n", ""},
		"word":                   {head + `envoy_server_live{} one` + "\n", ""},
		"bucket of no number":    {"# TYPE envoy_http_downstream_rq_time histogram\nenvoy_http_downstream_rq_time_bucket{le=\"\"} 1\n", ""},
		"quantile of no number":  {"# TYPE envoy_x summary\nenvoy_x{quantile=\"0x1\"} 1\n", ""},
		"hexadecimal":            {head + `envoy_server_live{} 0x10` + "\n", ""},
		"time":                   {head + `envoy_server_live{} 1 1700000000000` + "\n", ""},
		"exemplar":               {head + `envoy_server_live{} 1 # {a="b"} 1` + "\n", ""},
		"not UTF-8":              {head + "envoy_server_live{a=\"\xff\"} 1\n", ""},
		"NUL":                    {head + "envoy_server_live\x00{} 1\n", ""},
		"cut":                    {head + "envoy_server_live{} 1", ""},
		"HELP that is no help":   {"# HELP envoy_server_live\n#\n#x\n" + head + "envoy_server_live 1\n", `envoy_server_live{namespace="shop",pod="p"} 1` + "\n"},
		"TYPE of three words":    {"# TYPE envoy_server_live\n", ""},
		"TYPE that is no type":   {"# TYPE envoy_server_live thing\n", ""},
		"TYPE with a bad name":   {"# TYPE envoy-server gauge\n", ""},
		"count of a histogram":   {"# TYPE envoy_http_downstream_rq_time histogram\nenvoy_http_downstream_rq_time 1\n", ""},
		"label with a huge name": {head + "envoy_server_live{" + strings.Repeat("a", 70_000) + "=\"1\"} 1\n", ""},
	} {
		t.Run(name, func(t *testing.T) {
			p := newFakeProxies(t, map[string]fakeProxy{"p": says(test.text), "other": says(goodText)})
			text := getProxies(t, p, "").Body.String()
			families := parseMetrics(t, text)
			if live, _ := scraped(t, families, "envoy_server_live", "other"); live != 1 {
				t.Error("the other sidecar is missing")
			}
			up, _ := scraped(t, families, "sluice_proxy_scrape_up", "p")
			if (up == 1) != (test.want != "") {
				t.Errorf("up is %v in\n%s", up, text)
			}
			var got string
			for line := range strings.Lines(text) {
				if strings.HasPrefix(line, "envoy_") && !strings.Contains(line, `pod="other"`) {
					got += line
				}
			}
			if diff := cmp.Diff(strings.Trim(test.want, "-"), got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

// FuzzProxyText says that whatever one sidecar sends, the answer is valid and
// the other sidecar's part of it is whole.
func FuzzProxyText(f *testing.F) {
	f.Add([]byte(goodText), false)
	f.Add([]byte("# TYPE envoy_a histogram\nenvoy_a_bucket{le=\"1\"} 1\nenvoy_a_sum 1\n# TYPE envoy_a_sum counter\nenvoy_a_sum 2\n"), true)
	f.Add([]byte("# TYPE envoy_a summary\nenvoy_a{quantile=\"1\"} 1\nenvoy_a_count 1\n"), true)
	f.Add([]byte("# TYPE envoy_a histogram\nenvoy_a_bucket{le=\"\"} 1\n"), true)
	f.Add([]byte("# TYPE envoy_server_live gauge\nenvoy_server_live{a=\"\\\"\\n\"} -Inf\n"), false)
	f.Fuzz(func(t *testing.T, text []byte, all bool) {
		choice := chooseProxies(proxyQuery{all: all})
		keep := func(int) error { return nil }
		result := func(pod string, text []byte) proxyResult {
			r := proxyResult{target: proxyTarget{Namespace: "shop", Pod: pod}}
			if r.stats, r.err = parseProxyStats(bytes.NewReader(text), choice, keep); r.err != nil {
				r.stats = proxyStats{}
			}
			return r
		}
		out := mergedProxies([]proxyResult{result("hostile", text), result("other", []byte(goodText))})
		families := parseMetrics(t, out)
		if live, _ := scraped(t, families, "envoy_server_live", "other"); live != 1 {
			t.Errorf("the other sidecar is missing in\n%s", out)
		}
	})
}

func mergedProxies(results []proxyResult) string {
	var b strings.Builder
	w := bufio.NewWriter(&b)
	writeProxies(w, results)
	_ = w.Flush()
	return b.String()
}

func TestProxiesGzip(t *testing.T) {
	p := newFakeProxies(t, map[string]fakeProxy{"a": says(goodText)})
	for header, want := range map[string]bool{"": false, "gzip": true, "br;q=1, gzip;q=0.5": true, "gzip;q=0": false, "identity": false, "*": true} {
		w := getProxies(t, p, "", "Accept-Encoding", header)
		body := io.Reader(w.Body)
		if got := w.Header().Get("Content-Encoding") == "gzip"; got != want {
			t.Errorf("%q: gzip %t", header, got)
		} else if got {
			z, err := gzip.NewReader(body)
			if err != nil {
				t.Fatal(err)
			}
			body = z
		}
		text, err := io.ReadAll(body)
		if err != nil {
			t.Fatal(err)
		}
		parseMetrics(t, string(text))
	}
}

func TestScrapeBudget(t *testing.T) {
	for header, want := range map[string]time.Duration{
		"": 8 * time.Second, "10": 8 * time.Second, "5": 4 * time.Second, "0.5": 400 * time.Millisecond,
		"x": 8 * time.Second, "-1": 8 * time.Second, "NaN": 8 * time.Second, "1e300": 8 * time.Second,
	} {
		h := http.Header{"X-Prometheus-Scrape-Timeout-Seconds": {header}}
		if got := scrapeBudget(h, 8*time.Second); got != want {
			t.Errorf("%q: %v, want %v", header, got, want)
		}
	}
}

// TestScrapesShareAndWait has many requests at once: those for the same share
// one round, those for something else wait for their turn.
func TestScrapesShareAndWait(t *testing.T) {
	var asked, now, most atomic.Int64
	open := make(chan struct{})
	p := newFakeProxies(t, map[string]fakeProxy{"a": func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.Query().Get("filter"), "membership") {
			return
		}
		asked.Add(1)
		if n := now.Add(1); n > most.Load() {
			most.Store(n)
		}
		defer now.Add(-1)
		select {
		case <-open:
		case <-r.Context().Done():
		}
		_, _ = io.WriteString(w, goodText)
	}})
	var all sync.WaitGroup
	for i := range 40 {
		query := ""
		if i%2 == 1 {
			query = "?all=1"
		}
		all.Go(func() {
			if w := getProxies(t, p, query); w.Code != http.StatusOK {
				t.Errorf("%s: status %d: %s", query, w.Code, w.Body)
			}
		})
	}
	waitFor(t, func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		users := 0
		for _, s := range p.current {
			users += s.users
		}
		return users == 40 && asked.Load() == 1
	})
	close(open)
	all.Wait()
	if asked.Load() != 2 || most.Load() != 1 {
		t.Errorf("the sidecar was asked %d times, %d at once; want 2 and 1", asked.Load(), most.Load())
	}
	if len(p.slot) != 0 || len(p.current) != 0 {
		t.Errorf("%d slots are taken, %d scrapes are under way", len(p.slot), len(p.current))
	}
}

// TestWhoGoesAwayHoldsUpNobody ends requests before they are answered.
func TestWhoGoesAwayHoldsUpNobody(t *testing.T) {
	var hang atomic.Bool
	hang.Store(true)
	p := newFakeProxies(t, map[string]fakeProxy{"a": func(w http.ResponseWriter, r *http.Request) {
		if hang.Load() {
			<-r.Context().Done()
			return
		}
		_, _ = io.WriteString(w, goodText)
	}})
	ctx, cancel := context.WithCancel(t.Context())
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		w := httptest.NewRecorder()
		p.ServeHTTP(w, httptest.NewRequestWithContext(ctx, http.MethodGet, "/metrics/proxies", nil))
		if w.Code != http.StatusServiceUnavailable {
			t.Errorf("status %d", w.Code)
		}
	}()
	waitFor(t, func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		return len(p.current) == 1
	})
	hang.Store(false)
	cancel()
	<-gone
	families := parseMetrics(t, getProxies(t, p, "").Body.String())
	if up, _ := scraped(t, families, "sluice_proxy_scrape_up", "a"); up != 1 {
		t.Errorf("up is %v after another request was ended", up)
	}
}

// TestProxiesTogetherAreBounded has more samples than may be in memory.
func TestProxiesTogetherAreBounded(t *testing.T) {
	sidecars := map[string]fakeProxy{}
	for i := range 20 {
		sidecars[fmt.Sprint("p", i)] = says(goodText)
	}
	p := newFakeProxies(t, sidecars)
	p.limits.parallel = 1
	p.limits.kept = 5 * 100
	families := parseMetrics(t, getProxies(t, p, "").Body.String())
	var up, tooBig int
	for pod := range sidecars {
		v, _ := scraped(t, families, "sluice_proxy_scrape_up", pod)
		up += int(v)
		if _, reason := scraped(t, families, "sluice_proxy_scrape_error_info", pod); reason == "too_big" {
			tooBig++
		}
	}
	if up == 0 || tooBig == 0 || up+tooBig != len(sidecars) {
		t.Errorf("%d sidecars are up, %d too big", up, tooBig)
	}
}

// envoyText is what a sidecar with real traffic over seven services answers to
// the default query.
func envoyText(t testing.TB) string {
	t.Helper()
	b, err := os.ReadFile("testdata/proxies/envoy-1.40.prom")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestEnvoysOwnText holds that nothing of a real answer is taken for a mistake,
// and that each family of the choice that a busy client has is passed on.
func TestEnvoysOwnText(t *testing.T) {
	p := newFakeProxies(t, map[string]fakeProxy{"a": says(envoyText(t)), "b": says(envoyText(t))})
	families := parseMetrics(t, getProxies(t, p, "").Body.String())
	for _, name := range []string{
		"envoy_cluster_upstream_rq_total", "envoy_cluster_upstream_rq_xx", "envoy_cluster_upstream_rq_time",
		"envoy_cluster_upstream_cx_active", "envoy_cluster_upstream_cx_connect_ms", "envoy_cluster_membership_healthy",
		"envoy_http_downstream_rq_time", "envoy_listener_downstream_cx_total",
		"envoy_control_plane_connected_state", "envoy_server_memory_allocated", "envoy_server_uptime",
	} {
		if families[name] == nil {
			t.Errorf("%s is missing", name)
		}
	}
	for name := range families {
		if strings.Contains(name, "external") || strings.Contains(name, "admin") {
			t.Errorf("%s is there", name)
		}
	}
}

// BenchmarkProxies scrapes a node of 110 sidecars with real answers. peak-MB is
// how much more heap there was than before, at most.
func BenchmarkProxies(b *testing.B) {
	text := envoyText(b)
	sidecars := map[string]fakeProxy{}
	for i := range 110 {
		sidecars[fmt.Sprintf("web-6c8f7d9b5-%03d", i)] = says(text)
	}
	p := newFakeProxies(b, sidecars)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for _, coding := range []string{"identity", "gzip"} {
		b.Run(coding, func(b *testing.B) {
			var size int
			var peak uint64
			for b.Loop() {
				w := getProxies(b, p, "", "Accept-Encoding", coding)
				size = w.Body.Len()
				runtime.ReadMemStats(&after)
				peak = max(peak, after.HeapAlloc-min(before.HeapAlloc, after.HeapAlloc))
			}
			b.ReportMetric(float64(size), "B/answer")
			b.ReportMetric(float64(peak)/1e6, "peak-MB")
		})
	}
}

// TestMembershipOfCalledClusters has a sidecar that knows many services and
// called few: it is asked for those alone, unless their names are too long.
func TestMembershipOfCalledClusters(t *testing.T) {
	for called, want := range map[int]string{
		0: "", 2: `^cluster\.(out/shop/s-0/80|out/shop/s-1/80)\.membership_(healthy|total)$`, 1000: `^cluster\.(.+)\.membership_(healthy|total)$`,
	} {
		var filter atomic.Value
		p := newFakeProxies(t, map[string]fakeProxy{"a": func(w http.ResponseWriter, r *http.Request) {
			if f := r.URL.Query().Get("filter"); strings.Contains(f, "membership") {
				filter.Store(f)
				_, _ = io.WriteString(w, "# TYPE envoy_server_live gauge\nenvoy_server_live 7\n# TYPE envoy_cluster_membership_total gauge\n")
				for i := range 2000 {
					_, _ = fmt.Fprintf(w, "envoy_cluster_membership_total{envoy_cluster_name=\"out/shop/s-%d/80\"} 3\n", i)
				}
				return
			}
			_, _ = io.WriteString(w, "# TYPE envoy_cluster_upstream_cx_total counter\n")
			for i := range called {
				_, _ = fmt.Fprintf(w, "envoy_cluster_upstream_cx_total{envoy_cluster_name=\"out/shop/s-%d/80\"} 1\n", i)
			}
		}})
		families := parseMetrics(t, getProxies(t, p, "").Body.String())
		if got, _ := filter.Load().(string); got != want {
			t.Errorf("%d clusters are called: filter %q, want %q", called, got, want)
		}
		if got := len(families["envoy_cluster_membership_total"].GetMetric()); got != called {
			t.Errorf("%d clusters are called, %d have a membership", called, got)
		}
		if samples, _ := scraped(t, families, "sluice_proxy_scrape_samples", "a"); int(samples) != 2*called {
			t.Errorf("%v samples, want %d", samples, 2*called)
		}
		if families["envoy_server_live"] != nil {
			t.Error("the second answer has other families")
		}
	}
}

// TestTwoSandboxes has a pod whose sandbox is being made again.
func TestTwoSandboxes(t *testing.T) {
	for _, old := range []fakeProxy{nil, says(goodText)} {
		p := newFakeProxies(t, map[string]fakeProxy{"old": old, "new": says(goodText)})
		targets := p.targets()
		p.targets = func() (same []proxyTarget) {
			for _, target := range targets {
				target.Pod = "web"
				same = append(same, target)
			}
			return same
		}
		dial := p.dial
		p.dial = func(ctx context.Context, target proxyTarget) (net.Conn, error) {
			target.Pod = strings.TrimPrefix(target.Netns, "/netns/")
			return dial(ctx, target)
		}
		families := parseMetrics(t, getProxies(t, p, "").Body.String())
		if up, _ := scraped(t, families, "sluice_proxy_scrape_up", "web"); up != 1 {
			t.Errorf("up is %v", up)
		}
	}
}

// TestAdminPortIsDialledInThePod asks a server in a network namespace, and looks
// at the mark of the socket.
func TestAdminPortIsDialledInThePod(t *testing.T) {
	need.Root(t)
	ns := netnstest.New(t, "pod")
	l, err := ns.Listen(t.Context(), "tcp4", fmt.Sprintf("127.0.0.1:%d", redirect.AdminPort))
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: says(goodText), ReadHeaderTimeout: time.Second}
	go func() { _ = s.Serve(l) }()
	t.Cleanup(func() { _ = s.Close() })
	inode := ns.Inode(t)
	target := proxyTarget{Namespace: "shop", Pod: "a", Netns: ns.Netns, NetnsInode: inode}
	p := newProxies(func() []proxyTarget {
		other, gone := target, target
		other.Pod, other.NetnsInode = "other", inode+1
		gone.Pod, gone.Netns = "gone", "/run/netns/there-is-none"
		return []proxyTarget{target, other, gone}
	})
	families := parseMetrics(t, getProxies(t, p, "").Body.String())
	if live, _ := scraped(t, families, "envoy_server_live", "a"); live != 1 {
		t.Errorf("envoy_server_live is %v", live)
	}
	for _, pod := range []string{"other", "gone"} {
		if _, reason := scraped(t, families, "sluice_proxy_scrape_error_info", pod); reason != "gone" {
			t.Errorf("%s: reason %q, want gone", pod, reason)
		}
	}

	conn, err := dialAdmin(t.Context(), target)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	raw, err := conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var mark int
	err = errors.Join(raw.Control(func(fd uintptr) { mark, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK) }), err)
	if err != nil || mark != bpf.AgentMark {
		t.Errorf("mark %#x, %v; want %#x", mark, err, bpf.AgentMark)
	}
}

// waitFor returns once ok does.
func waitFor(t testing.TB, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); {
		if time.Now().After(end) {
			t.Fatal("waited for 10 s")
		}
		runtime.Gosched()
	}
}
