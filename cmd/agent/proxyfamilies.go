package main

import (
	"bytes"
	"net/url"
	"regexp"
	"slices"
	"strings"
)

// A proxyScope has statistics of Envoy that /metrics/proxies passes on unless
// asked for others.
type proxyScope struct {
	scope string
	// many means that there is one of each for every cluster, listener or
	// connection manager, whose name stands between scope and statistic.
	many bool
	// Names, separated by white space.
	counters, gauges, histograms string
}

// proxyScopes is what a dashboard and whoever looks for a fault need.
func proxyScopes() []proxyScope {
	return []proxyScope{
		{
			scope: "cluster", many: true,
			counters: `upstream_rq_total upstream_rq_[1-5]xx upstream_rq_timeout upstream_rq_per_try_timeout
				upstream_rq_retry upstream_rq_retry_success upstream_rq_retry_limit_exceeded
				upstream_rq_rx_reset upstream_rq_tx_reset upstream_rq_pending_overflow
				upstream_cx_total upstream_cx_http1_total upstream_cx_http2_total
				upstream_cx_connect_fail upstream_cx_connect_timeout upstream_cx_connect_attempts_exceeded
				upstream_cx_none_healthy upstream_cx_overflow upstream_cx_protocol_error
				upstream_cx_destroy_remote_with_active_rq upstream_cx_rx_bytes_total upstream_cx_tx_bytes_total
				bind_errors`,
			gauges:     "upstream_rq_active upstream_rq_pending_active upstream_cx_active",
			histograms: "upstream_rq_time upstream_cx_connect_ms",
		},
		{
			scope: "http", many: true,
			counters: `downstream_rq_total downstream_rq_[1-5]xx downstream_rq_timeout downstream_rq_rx_reset
				downstream_rq_tx_reset downstream_rq_too_large downstream_rq_overload_close
				downstream_cx_total downstream_cx_http1_total downstream_cx_http2_total downstream_cx_protocol_error
				downstream_cx_upgrades_total no_route no_cluster rs_too_large`,
			gauges:     "downstream_rq_active downstream_cx_active downstream_cx_upgrades_active",
			histograms: "downstream_rq_time",
		},
		{
			scope: "tcp", many: true,
			counters: "downstream_cx_total downstream_cx_rx_bytes_total downstream_cx_tx_bytes_total downstream_cx_no_route idle_timeout",
		},
		{
			scope: "listener", many: true,
			counters: "downstream_cx_total downstream_pre_cx_timeout no_filter_chain_match",
			gauges:   "downstream_cx_active",
		},
		{
			scope:    "listener_manager",
			counters: "lds.update_success lds.update_rejected listener_create_failure",
			gauges:   "total_listeners_active total_listeners_warming total_listeners_draining",
		},
		{
			scope:    "cluster_manager",
			counters: "cds.update_success cds.update_rejected",
			gauges:   "active_clusters warming_clusters",
		},
		{scope: "control_plane", gauges: "connected_state pending_requests"},
		{
			scope:    "server",
			counters: "main_thread.watchdog_miss main_thread.watchdog_mega_miss worker_[0-9]+.watchdog_miss worker_[0-9]+.watchdog_mega_miss envoy_bug_failures",
			gauges:   "live state uptime concurrency memory_allocated memory_heap_size memory_physical_size total_connections",
		},
	}
}

// A proxyChoice says which statistics of a sidecar are passed on.
type proxyChoice struct {
	// path is what the sidecar is asked for.
	path string
	// all wants every family, not only those below.
	all bool
	// families have types that are known.
	families map[string]string
	// clusters are those that samples of clusters are wanted of; nil means all.
	clusters map[string]bool
}

// chooseProxies makes what a query asks for.
func chooseProxies(q proxyQuery) proxyChoice {
	filter, families := ownProxyChoice(proxyScopes())
	c := proxyChoice{all: q.all || q.filter != "", families: families}
	values := url.Values{}
	switch {
	case q.filter != "":
		values.Set("filter", q.filter)
	case !q.all:
		values.Set("filter", filter)
	}
	if !q.all {
		values.Set("usedonly", "")
	}
	c.path = "/stats/prometheus?" + values.Encode()
	return c
}

// ownProxyChoice returns scopes as a regular expression on Envoy's own names, so
// that no sidecar writes in vain, and as families with their types.
// The membership of clusters is not among them, see membership.
func ownProxyChoice(scopes []proxyScope) (filter string, families map[string]string) {
	families = map[string]string{}
	var parts []string
	for _, s := range scopes {
		var stats []string
		for kind, names := range map[string]string{"counter": s.counters, "gauge": s.gauges, "histogram": s.histograms} {
			for _, name := range strings.Fields(names) {
				stats = append(stats, strings.ReplaceAll(name, ".", `\.`))
				// Envoy makes the class of the response code and the worker labels.
				families["envoy_"+s.scope+"_"+strings.NewReplacer("[1-5]", "", "_[0-9]+", "", ".", "_").Replace(name)] = kind
			}
		}
		slices.Sort(stats)
		between := ""
		if s.many {
			between = `.+\.`
		}
		parts = append(parts, s.scope+`\.`+between+"("+strings.Join(stats, "|")+")")
	}
	return "^(" + strings.Join(parts, "|") + ")$", families
}

// wants says whether a family is passed on. One of another type than it is with
// Envoy would spoil that of all other sidecars.
func (c proxyChoice) wants(family, kind string) bool {
	want, ok := c.families[family]
	return ok && want == kind || !ok && c.all
}

// concerns says whether a sample of a wanted family is about the pod's traffic
// rather than about the agent's and the kubelet's connections to the sidecar.
func (c proxyChoice) concerns(labels []proxyLabel) bool {
	if c.all {
		return true
	}
	for _, l := range labels {
		value := string(l.value)
		switch string(l.name) {
		case "envoy_http_conn_manager_prefix":
			return value != "admin" && value != "ready"
		case "envoy_cluster_name":
			return value != "xds" && (c.clusters == nil || c.clusters[value])
		}
	}
	return true
}

// maxMembership is the longest regular expression of single clusters, in bytes.
const maxMembership = 8 << 10

// membership is the choice of how many endpoints those clusters have that the pod
// ever called, by what was read before, and false if there are none. Every
// sidecar knows every service: all memberships would be most of what is read.
func (c proxyChoice) membership(s proxyStats) (proxyChoice, bool) {
	if c.all {
		return proxyChoice{}, false
	}
	called := map[string]bool{}
	for name, f := range s.families {
		if f.kind != "counter" || !strings.HasPrefix(name, "envoy_cluster_upstream_") {
			continue
		}
		for line := range bytes.Lines(f.lines) {
			called[clusterOf(line)] = true
		}
	}
	delete(called, "")
	if len(called) == 0 {
		return proxyChoice{}, false
	}
	var names []string
	for name := range called {
		names = append(names, regexp.QuoteMeta(name))
	}
	slices.Sort(names)
	which := strings.Join(names, "|")
	if len(which) > maxMembership {
		which = ".+"
	}
	values := url.Values{"filter": {`^cluster\.(` + which + `)\.membership_(healthy|total)$`}, "usedonly": {""}}
	return proxyChoice{
		path: "/stats/prometheus?" + values.Encode(), clusters: called,
		families: map[string]string{"envoy_cluster_membership_healthy": "gauge", "envoy_cluster_membership_total": "gauge"},
	}, true
}

// clusterOf is the cluster that a line of a proxyFamily is about, empty if none.
func clusterOf(line []byte) string {
	_, rest, _ := bytes.Cut(line, []byte(`,envoy_cluster_name="`))
	name, _, _ := bytes.Cut(rest, []byte(`"`))
	return string(name)
}
