package kube

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// A sample is one line of a scrape.
type sample struct {
	name   string
	labels map[string]string
	value  float64
}

type samples []sample

// agentOn returns the agent's pod on a node.
func (s *suite) agentOn(node string) (corev1.Pod, error) {
	pods, err := s.listPods(system, agentSelector)
	if err != nil {
		return corev1.Pod{}, err
	}
	for _, p := range pods {
		if p.Spec.NodeName == node && p.DeletionTimestamp == nil {
			return p, nil
		}
	}
	return corev1.Pod{}, fmt.Errorf("no agent on %s", node)
}

// metrics scrapes the agent of a node.
func (s *suite) metrics(t *testing.T, node string) samples { return s.scrape(t, node, "/metrics") }

// proxies scrapes the sidecars of a node, through their agent.
func (s *suite) proxies(t *testing.T, node string) samples {
	return s.scrape(t, node, "/metrics/proxies")
}

func (s *suite) scrape(t *testing.T, node, path string) samples {
	t.Helper()
	var out samples
	s.eventually(t, 30*time.Second, "scrape "+path+" of "+node, func() error {
		p, err := s.agentOn(node)
		if err != nil {
			return err
		}
		b, err := s.proxy(system, p.Name, metricsPort, path)
		if err != nil {
			return err
		}
		out, err = parseSamples(string(b))
		return err
	})
	return out
}

func parseSamples(text string) (samples, error) {
	var out samples
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		end := strings.LastIndexByte(line, ' ')
		if end < 0 {
			return nil, fmt.Errorf("parse sample %q", line)
		}
		value, err := strconv.ParseFloat(line[end+1:], 64)
		if err != nil {
			return nil, fmt.Errorf("parse sample %q: %w", line, err)
		}
		sm := sample{name: line[:end], value: value, labels: map[string]string{}}
		if open := strings.IndexByte(line, '{'); open >= 0 {
			sm.name = line[:open]
			rest := line[open+1 : strings.LastIndexByte(line, '}')]
			for rest != "" {
				name, after, ok := strings.Cut(rest, "=")
				if !ok {
					return nil, fmt.Errorf("parse labels of %q", line)
				}
				quoted, err := strconv.QuotedPrefix(after)
				if err != nil {
					return nil, fmt.Errorf("parse labels of %q: %w", line, err)
				}
				v, err := strconv.Unquote(quoted)
				if err != nil {
					return nil, fmt.Errorf("parse labels of %q: %w", line, err)
				}
				sm.labels[strings.TrimSpace(strings.TrimPrefix(name, ","))] = v
				rest = strings.TrimPrefix(after[len(quoted):], ",")
			}
		}
		out = append(out, sm)
	}
	return out, nil
}

// sum adds up the samples of a name that have these labels, "key=value".
func (all samples) sum(name string, labels ...string) float64 {
	var total float64
	for _, sm := range all {
		if sm.name == name && sm.has(labels) {
			total += sm.value
		}
	}
	return total
}

func (sm sample) has(labels []string) bool {
	return !slices.ContainsFunc(labels, func(l string) bool {
		k, v, _ := strings.Cut(l, "=")
		return sm.labels[k] != v
	})
}

// labels returns the values that a label has in the samples of a name, sorted.
func (all samples) labels(name, label string) []string {
	values := map[string]bool{}
	for _, sm := range all {
		if sm.name == name {
			values[sm.labels[label]] = true
		}
	}
	return slices.Sorted(maps.Keys(values))
}

// quantile of a histogram, as the upper bound of its bucket.
func (all samples) quantile(name string, q float64, labels ...string) string {
	type bucket struct{ le, n float64 }
	var buckets []bucket
	for _, sm := range all {
		if sm.name == name+"_bucket" && sm.has(labels) {
			le, err := strconv.ParseFloat(sm.labels["le"], 64)
			if err == nil {
				buckets = append(buckets, bucket{le, sm.value})
			}
		}
	}
	slices.SortFunc(buckets, func(x, y bucket) int {
		if x.le < y.le {
			return -1
		}
		return 1
	})
	if len(buckets) == 0 || buckets[len(buckets)-1].n == 0 {
		return "none"
	}
	for _, b := range buckets {
		if b.n >= q*buckets[len(buckets)-1].n {
			return fmt.Sprintf("<= %g ms", b.le*1000)
		}
	}
	return "none"
}
