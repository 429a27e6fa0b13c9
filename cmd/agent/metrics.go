package main

import (
	"context"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/sluicemesh/sluice/pkg/podwatch"
	"github.com/sluicemesh/sluice/pkg/podwatch/cniinstall"
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

	connections, podInfo, podProblems, mapEntries, mapCapacity, backendInfo, pods, objects, documents, ready, errors *prometheus.Desc
}

func newNodeMetrics(m redirect.Meter, backend func() (string, string), a *agent, problems func() int) *nodeMetrics {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc(name, help, labels, nil)
	}
	return &nodeMetrics{
		meter: m, backend: backend, agent: a, problems: problems,
		connections: desc("sluice_connections_total", "TCP connections by what became of them: verdict is redirected, bypassed or denied.", "namespace", "pod", "workload", "direction", "verdict", "reason"),
		podInfo:     desc("sluice_pod_info", "1 for each redirected pod of this node.", "namespace", "pod", "workload"),
		podProblems: desc("sluice_pod_problems", "1 for each pod of this node that is not as it asks to be; /readyz tells why.", "namespace", "pod", "workload"),
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
	for _, d := range []*prometheus.Desc{n.connections, n.podInfo, n.podProblems, n.mapEntries, n.mapCapacity, n.backendInfo, n.pods, n.objects, n.documents, n.ready, n.errors} {
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
		labels := append([]string{key[0], key[1], n.workload(key[0], key[1])}, key[2:]...)
		ch <- prometheus.MustNewConstMetric(n.connections, prometheus.CounterValue, value, labels...)
	}
	redirected := map[proxyTarget]bool{} // once, also with two sandboxes
	for _, t := range n.agent.targets() {
		if pod := (proxyTarget{Namespace: t.Namespace, Pod: t.Pod}); !redirected[pod] {
			redirected[pod] = true
			gauge(n.podInfo, 1, t.Namespace, t.Pod, n.workload(t.Namespace, t.Pod))
		}
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
	for object := range problems {
		if pod, ok := strings.CutPrefix(object, "pod "); ok {
			namespace, name, _ := strings.Cut(pod, "/")
			gauge(n.podProblems, 1, namespace, name, n.workload(namespace, name))
		}
	}
	gauge(n.documents, float64(n.problems()))
	ready := 0.0
	if n.agent.ready() {
		ready = 1
	}
	gauge(n.ready, ready)
	gauge(n.errors, float64(failed))
}

// workload is the name of what a pod belongs to, empty if that is not known.
func (n *nodeMetrics) workload(namespace, pod string) string {
	if p, ok := get[*podwatch.Pod](n.agent.store, podwatch.Key{Kind: podwatch.KindPod, Namespace: namespace, Name: pod}); ok {
		return p.Workload.Name
	}
	return ""
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

// agentParts tell newPartMetrics how the agent's parts do. A part that this
// agent has not is nil and has no metrics.
type agentParts struct {
	// health is that of the kinds read from the API server.
	health func() []podwatch.KindHealth
	// reports counts conditions and events of pods.
	reports func() podwatch.ReporterStats
	// installer is that of the CNI plugin.
	installer func() cniinstall.Status
	// adopted counts pods that are older than the agent and that it redirected.
	adopted func() int
	// drains counts sidecars that were told that their pod ends, and those that
	// could not be told.
	drains func() (told, failed uint64)
}

// newPartMetrics reads the parts at each scrape.
func newPartMetrics(parts agentParts) prometheus.Collector {
	p := &partMetrics{}
	add := func(t prometheus.ValueType, name, help string, labels ...string) func(ch chan<- prometheus.Metric, v float64, values ...string) {
		d := prometheus.NewDesc(name, help, labels, nil)
		p.descs = append(p.descs, d)
		return func(ch chan<- prometheus.Metric, v float64, values ...string) {
			ch <- prometheus.MustNewConstMetric(d, t, v, values...)
		}
	}
	const counter, gauge = prometheus.CounterValue, prometheus.GaugeValue
	if parts.health != nil {
		age := add(gauge, "sluice_source_age_seconds", "Since when the API server has said nothing about a kind of object; about once a minute it does even if nothing changes.", "kind")
		synced := add(gauge, "sluice_source_synced", "1 once all objects of a kind were read.", "kind")
		failing := add(gauge, "sluice_source_failing", "1 while a kind of object can be neither read nor followed, or only one of the two.", "kind")
		watches := add(counter, "sluice_source_watches_total", "How often following a kind of object began: some times an hour when all is well.", "kind")
		p.collect = append(p.collect, func(ch chan<- prometheus.Metric) {
			for _, k := range parts.health() {
				watches(ch, float64(k.Watches), string(k.Kind))
				if !k.LastContact.IsZero() {
					age(ch, max(0, time.Since(k.LastContact).Seconds()), string(k.Kind))
				}
				synced(ch, float64(btoi(k.Synced)), string(k.Kind))
				failing(ch, float64(btoi(k.Err != nil)), string(k.Kind))
			}
		})
	}
	if parts.reports != nil {
		sent := add(counter, "sluice_reports_sent_total", "What the API server took about pods, by type: condition or event.", "type")
		failed := add(counter, "sluice_report_failures_total", "Requests about pods that failed; they are tried again unless they are refused.")
		dropped := add(counter, "sluice_reports_dropped_total", "Conditions and events that will not be sent: too many waited, or the API server refuses them.")
		waiting := add(gauge, "sluice_reports_waiting", "Conditions and events that are to be sent.")
		p.collect = append(p.collect, func(ch chan<- prometheus.Metric) {
			s := parts.reports()
			sent(ch, float64(s.Conditions), "condition")
			sent(ch, float64(s.Events), "event")
			failed(ch, float64(s.Failed))
			dropped(ch, float64(s.Dropped))
			waiting(ch, float64(s.Waiting))
		})
	}
	if parts.installer != nil {
		installed := add(gauge, "sluice_cni_installed", "1 while new pods pass the CNI plugin.")
		repairs := add(counter, "sluice_cni_repairs_total", "How often the installation of the CNI plugin had to be put back or brought up to date.")
		contended := add(gauge, "sluice_cni_contended", "1 while another program undoes the installation so often that it is put back with pauses.")
		p.collect = append(p.collect, func(ch chan<- prometheus.Metric) {
			s := parts.installer()
			installed(ch, float64(btoi(s.Installed())))
			repairs(ch, float64(s.Repairs))
			contended(ch, float64(btoi(s.Fighting)))
		})
	}
	if parts.adopted != nil {
		adopted := add(counter, "sluice_pods_adopted_total", "Pods that are older than the agent and that it found and redirected.")
		p.collect = append(p.collect, func(ch chan<- prometheus.Metric) { adopted(ch, float64(parts.adopted())) })
	}
	if parts.drains != nil {
		drains := add(counter, "sluice_sidecar_drains_total", "Sidecars of deleted pods by result: told (that the pod ends) or failed.", "result")
		p.collect = append(p.collect, func(ch chan<- prometheus.Metric) {
			told, failed := parts.drains()
			drains(ch, float64(told), "told")
			drains(ch, float64(failed), "failed")
		})
	}
	return p
}

type partMetrics struct {
	descs   []*prometheus.Desc
	collect []func(chan<- prometheus.Metric)
}

// Describe implements prometheus.Collector.
func (p *partMetrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range p.descs {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (p *partMetrics) Collect(ch chan<- prometheus.Metric) {
	for _, collect := range p.collect {
		collect(ch)
	}
}
