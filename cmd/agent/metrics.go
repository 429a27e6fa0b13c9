package main

import (
	"context"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/sluicemesh/sluice/pkg/redirect"
)

// scrapeTimeout bounds how long one scrape may ask the kernel.
const scrapeTimeout = 5 * time.Second

func newBuildInfo() prometheus.Collector {
	return prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "sluice_build_info", Help: "1, labelled with the version.",
		ConstLabels: prometheus.Labels{"version": version},
	}, func() float64 { return 1 })
}

// cniMetrics counts the plugin's requests.
type cniMetrics struct {
	requests *prometheus.CounterVec
	latency  *prometheus.HistogramVec
}

func newCNIMetrics(r prometheus.Registerer) cniMetrics {
	m := cniMetrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "sluice_cni_requests_total", Help: "Requests of the CNI plugin, by verb and HTTP status code.",
		}, []string{"verb", "code"}),
		latency: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "sluice_cni_request_duration_seconds", Help: "How long requests of the CNI plugin took in the agent.",
			Buckets: []float64{.0005, .001, .002, .003, .005, .01, .02, .05, .1, .5, 1, 5},
		}, []string{"verb"}),
	}
	r.MustRegister(m.requests, m.latency)
	return m
}

// nodeMetrics reads at each scrape what the kernel and the agent know.
type nodeMetrics struct {
	meter   redirect.Meter
	backend func() (backend, reason string)
	agent   *agent
	// problems are the documents of the source that cannot be read.
	problems func() int

	connections, mapEntries, mapCapacity, backendInfo, pods, objects, documents, ready, errors *prometheus.Desc
}

func newNodeMetrics(m redirect.Meter, backend func() (string, string), a *agent, problems func() int) *nodeMetrics {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc(name, help, labels, nil)
	}
	return &nodeMetrics{
		meter: m, backend: backend, agent: a, problems: problems,
		connections: desc("sluice_connections_total", "TCP connections by what became of them: verdict is redirected, bypassed or denied.", "namespace", "pod", "direction", "verdict", "reason"),
		mapEntries:  desc("sluice_map_entries", "Entries in a kernel map of the eBPF backend.", "map"),
		mapCapacity: desc("sluice_map_capacity_entries", "Entries that a kernel map of the eBPF backend can hold.", "map"),
		backendInfo: desc("sluice_backend_info", "1, labelled with the node's redirection backend and why it is not another.", "backend", "reason"),
		pods:        desc("sluice_pods", "Pods of this node by state: redirected, untouched (not to be redirected) or failed.", "state"),
		objects:     desc("sluice_object_problems", "Objects of the source that cannot be served as they ask to; /readyz names them."),
		documents:   desc("sluice_source_document_problems", "Documents of the source that cannot be read; /readyz names them."),
		ready:       desc("sluice_ready", "1 once the source has been read completely and the node is in the desired state."),
		errors:      desc("sluice_scrape_errors", "Parts of this scrape that could not be read from the kernel."),
	}
}

// Describe implements prometheus.Collector.
func (n *nodeMetrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{n.connections, n.mapEntries, n.mapCapacity, n.backendInfo, n.pods, n.objects, n.documents, n.ready, n.errors} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (n *nodeMetrics) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), scrapeTimeout)
	defer cancel()
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	failed := 0
	counters, err := n.meter.Counters(ctx)
	if err != nil {
		failed++
		n.agent.log.Warn("connection counters cannot be read whole", "err", err)
	}
	for key, value := range sum(counters) {
		ch <- prometheus.MustNewConstMetric(n.connections, prometheus.CounterValue, value, key[:]...)
	}
	usage, err := n.meter.MapUsage(ctx)
	if err != nil {
		failed++
		n.agent.log.Warn("map occupancy cannot be read whole", "err", err)
	}
	for _, u := range usage {
		gauge(n.mapEntries, float64(u.Entries), u.Name)
		gauge(n.mapCapacity, float64(u.Capacity), u.Name)
	}
	backend, reason := n.backend()
	gauge(n.backendInfo, 1, backend, reason)
	counts, problems := n.agent.report()
	gauge(n.pods, float64(counts.redirected), "redirected")
	gauge(n.pods, float64(counts.untouched), "untouched")
	gauge(n.pods, float64(counts.failed), "failed")
	gauge(n.objects, float64(len(problems)))
	gauge(n.documents, float64(n.problems()))
	ready := 0.0
	if n.agent.ready() {
		ready = 1
	}
	gauge(n.ready, ready)
	gauge(n.errors, float64(failed))
}

// sum adds up counters of the same pod: it has two sandboxes while one is made
// again, and both backends while it moves from one to the other.
func sum(counters []redirect.Counter) map[[5]string]float64 {
	out := map[[5]string]float64{}
	for _, c := range counters {
		namespace, name, _ := strings.Cut(c.Pod, "/")
		out[[5]string{namespace, name, string(c.Direction), c.Verdict, c.Reason}] += float64(c.Value)
	}
	return out
}
