package server

import "github.com/prometheus/client_golang/prometheus"

type metrics struct {
	pushes, acks, nacks [numTypes]prometheus.Counter
	latency             [numTypes]prometheus.Observer
	refused             *prometheus.CounterVec
	all                 []prometheus.Collector
}

func newMetrics(s *Server) *metrics {
	m := &metrics{}
	counter := func(name, help string) (c [numTypes]prometheus.Counter) {
		vec := prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, []string{"type"})
		m.all = append(m.all, vec)
		for t := range c {
			c[t] = vec.WithLabelValues(typeNames[t])
		}
		return c
	}
	m.pushes = counter("sluice_xds_pushes_total", "Responses sent to sidecars, by type of resource.")
	m.acks = counter("sluice_xds_acks_total", "Responses that sidecars accepted, by type of resource.")
	m.nacks = counter("sluice_xds_nacks_total", "Responses that sidecars rejected, in whole or in part, by type of resource.")
	latency := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name:    "sluice_xds_event_to_ack_seconds",
		Help:    "Time from the event at the source to a sidecar's acceptance of the changed resource, by type of resource.",
		Buckets: prometheus.ExponentialBuckets(0.001, 2, 15),
	}, []string{"type"})
	for t := range m.latency {
		m.latency[t] = latency.WithLabelValues(typeNames[t])
	}
	m.refused = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "sluice_xds_refused_connections_total",
		Help: "Connections to the xDS sockets that were closed at once, by reason: the peer is not the proxy (uid), or too many (limit).",
	}, []string{"reason"})
	m.all = append(m.all, latency, m.refused)
	gauge := func(name, help string, labels prometheus.Labels, f func() int) {
		m.all = append(m.all, prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help, ConstLabels: labels}, func() float64 {
			s.mu.Lock()
			defer s.mu.Unlock()
			return float64(f())
		}))
	}
	gauge("sluice_xds_streams", "Streams of sidecars.", nil, func() int { return len(s.streams) })
	gauge("sluice_xds_quarantined_resources", "Resources whose newest version at least one sidecar rejected.", nil, s.quarantined)
	for t := range typeNames {
		gauge("sluice_xds_resources", "Resources that the server holds, by type.", prometheus.Labels{"type": typeNames[t]}, func() (n int) {
			for l := range s.layers {
				n += l.types[t].live
			}
			return n
		})
	}
	return m
}
