package main

import (
	"fmt"
	"log/slog"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/sluicemesh/sluice/pkg/redirect"
)

// accelChecks are the lines of /readyz on acceleration. That it cannot be had
// makes no node unready.
func accelChecks(a redirect.Accelerator, node redirect.Accelerate) (checks []check) {
	for _, p := range a.Accelerations() {
		state := "off"
		if p.In(node, "") {
			state = "on"
		} else if p.In(node, redirect.AccelerateOn) {
			state = "off but for pods that ask for it"
		}
		checks = append(checks, check{name: "acceleration of " + string(p.Place), detail: fmt.Sprintf("%s (%s), %s", state, node, p.Reason)})
	}
	return checks
}

// acceleratedIn are the places in which a pod with that setting is accelerated.
func acceleratedIn(a redirect.Accelerator, node, pod redirect.Accelerate) (places []redirect.Place) {
	for _, p := range a.Accelerations() {
		if p.In(node, pod) {
			places = append(places, p.Place)
		}
	}
	return places
}

// accelMetrics are the metrics of acceleration.
type accelMetrics struct {
	of           redirect.Accelerator
	node         redirect.Accelerate
	log          *slog.Logger
	info, events *prometheus.Desc
}

func newAccelMetrics(a redirect.Accelerator, node redirect.Accelerate, log *slog.Logger) *accelMetrics {
	return &accelMetrics{
		of: a, node: node, log: log,
		info:   prometheus.NewDesc("sluice_acceleration_info", "1 for each place (peer, loopback) where connections could be accelerated: whether pods without an annotation are, and why or what was measured.", []string{"place", "state", "reason"}, nil),
		events: prometheus.NewDesc("sluice_acceleration_events_total", "What happened to accelerated connections: joined (both ends are), full (no room in a map); of their directions: early (began by TCP), behind (changed to TCP, the reader being too far behind), caught_up (changed back), gone (the other end had closed), stuck (stay with TCP: streams of much data, or several threads sent at once).", []string{"event"}, nil),
	}
}

// Describe implements prometheus.Collector.
func (m *accelMetrics) Describe(ch chan<- *prometheus.Desc) {
	ch <- m.info
	ch <- m.events
}

// Collect implements prometheus.Collector.
func (m *accelMetrics) Collect(ch chan<- prometheus.Metric) {
	for _, p := range m.of.Accelerations() {
		state := "off"
		if p.In(m.node, "") {
			state = "on"
		}
		ch <- prometheus.MustNewConstMetric(m.info, prometheus.GaugeValue, 1, string(p.Place), state, p.Reason)
	}
	if m.node == redirect.AccelerateOff {
		return
	}
	events, err := m.of.AccelerationEvents()
	if err != nil {
		m.log.Warn("events of acceleration cannot be read", "err", err)
	}
	for name, n := range events {
		ch <- prometheus.MustNewConstMetric(m.events, prometheus.CounterValue, float64(n), name)
	}
}
