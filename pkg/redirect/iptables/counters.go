package iptables

import (
	"context"
	"errors"
	"maps"
	"runtime"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/pkg/redirect/netns"
)

// A counterKey names one counter of one workload.
type counterKey struct {
	id        redirect.ID
	direction redirect.Direction
	verdict   string
	reason    string
}

// Counters implements redirect.Meter. nat chains see one packet of each
// connection, so their packet counters count connections. Workloads whose
// namespace is gone are left out.
func (r *Redirector) Counters(ctx context.Context) ([]redirect.Counter, error) {
	all, err := r.records.all()
	if err != nil {
		return nil, err
	}
	var mu sync.Mutex
	read := make(map[redirect.ID][]saved)
	var g errgroup.Group
	g.SetLimit(runtime.GOMAXPROCS(0))
	for _, rec := range all {
		if rec.Draining {
			continue
		}
		g.Go(func() error {
			families, err := r.readRules(ctx, rec)
			if errors.Is(err, redirect.ErrGone) {
				return nil
			}
			mu.Lock()
			defer mu.Unlock()
			read[rec.ID] = families
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	var counters []redirect.Counter
	for _, rec := range all {
		if families, ok := read[rec.ID]; ok {
			counters = append(counters, r.count(rec, families)...)
		}
	}
	return counters, nil
}

func (r *Redirector) readRules(ctx context.Context, rec record) ([]saved, error) {
	defer r.turns.Take(rec.ID)()
	if err := present(rec.ID, rec.Netns); err != nil {
		return nil, err
	}
	var families []saved
	err := netns.Do(rec.Netns, func() error {
		for _, i := range rec.Rules {
			t, err := r.choose(i.V4, []string{i.Variant})
			if err != nil {
				return err
			}
			s, _, err := t.read(ctx)
			if err != nil {
				return err
			}
			families = append(families, s)
		}
		return nil
	})
	return families, err
}

// count sums both families. A connection that met no proxy is first counted as
// redirected, so it is taken off there; the two tables are not read in the same
// instant, so a value is never shown lower than before.
func (r *Redirector) count(rec record, families []saved) []redirect.Counter {
	sums := make(map[counterKey]uint64)
	var keys []counterKey
	for _, v := range verdicts() {
		key := counterKey{rec.ID, v.direction, v.verdict, v.reason}
		if _, ok := sums[key]; !ok {
			keys = append(keys, key)
		}
		for _, s := range families {
			n := s.packets(v.table, v.chain)
			if v.minus != "" {
				n -= min(n, s.packets("filter", v.minus))
			}
			sums[key] += n
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	counters := make([]redirect.Counter, 0, len(keys))
	for _, key := range keys {
		r.shown[key] = max(r.shown[key], sums[key])
		counters = append(counters, redirect.Counter{
			ID: rec.ID, Pod: rec.Pod, Direction: key.direction, Verdict: key.verdict, Reason: key.reason,
			Value: r.shown[key],
		})
	}
	return counters
}

// forget drops what was shown of a workload that is removed.
func (r *Redirector) forget(id redirect.ID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, key := range slices.Collect(maps.Keys(r.shown)) {
		if key.id == id {
			delete(r.shown, key)
		}
	}
}

// MapUsage implements redirect.Meter; there are no maps.
func (r *Redirector) MapUsage(context.Context) ([]redirect.MapUsage, error) { return nil, nil }
