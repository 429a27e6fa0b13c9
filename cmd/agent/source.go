package main

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"time"

	"github.com/sluicemesh/sluice/pkg/podwatch"
)

// A source fills the store with what there is, and tells what came with it.
type source struct {
	// run fills the store until ctx ends.
	run func(ctx context.Context) error
	// problems returns what is wrong with what was read.
	problems func() []podwatch.Problem
	// setPodAddrs tells a source that has no addresses of its own which ones CNI
	// gave a pod.
	setPodAddrs func(namespace, name string, addrs []netip.Addr)

	// The rest is nil where there is no API server.

	// health says how well each kind is read.
	health func() []podwatch.KindHealth
	// reporter tells the API server about this node's pods.
	reporter *podwatch.Reporter
	// removal tells whether Sluice is being removed from the cluster.
	removal *podwatch.Removal
}

// openSource opens what the command line names and starts nothing.
func openSource(c config, store *podwatch.Store, log *slog.Logger) (source, error) {
	if c.sourceDir != "" {
		files, err := podwatch.NewFiles(podwatch.FilesOptions{Dir: c.sourceDir, Store: store, Log: log, Node: c.node})
		if err != nil {
			return source{}, fmt.Errorf("open source: %w", err)
		}
		return source{run: files.Run, problems: files.Problems, setPodAddrs: files.SetPodAddrs}, nil
	}
	podwatch.RedirectKlog(log)
	api, err := podwatch.NewKubernetes(podwatch.KubernetesOptions{
		Kubeconfig: c.kubeconfig, Store: store, Node: c.node, Log: log, Version: version,
	})
	if err != nil {
		return source{}, fmt.Errorf("open source: %w", err)
	}
	reporter, err := podwatch.NewReporter(podwatch.ReporterOptions{Source: api, Log: log})
	if err != nil {
		return source{}, fmt.Errorf("set up reports to the API server: %w", err)
	}
	s := source{
		run: api.Run, problems: api.Problems, setPodAddrs: func(string, string, []netip.Addr) {},
		health: api.Health, reporter: reporter,
	}
	if c.daemonSet != (objectName{}) {
		s.removal, err = podwatch.NewRemoval(podwatch.RemovalOptions{
			Source: api, Namespace: c.daemonSet.namespace, Name: c.daemonSet.name, Log: log,
		})
		if err != nil {
			return source{}, fmt.Errorf("watch own DaemonSet: %w", err)
		}
	}
	return s, nil
}

// watchRemoval watches for the end of Sluice in the cluster. The function that
// it returns says whether that has come and ends the watch. It may be called
// after ctx has ended: a signal must not keep the agent from learning why.
func (s source) watchRemoval(ctx context.Context) (removed func() bool) {
	if s.removal == nil {
		return func() bool { return false }
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.removal.Run(ctx) // nil when ctx ends
	}()
	return func() bool {
		asking, end := context.WithTimeout(ctx, podwatch.RemovalWait)
		removed := s.removal.Removed(asking)
		end()
		cancel()
		<-done
		return removed
	}
}

// cutOff says whether the API server answers nothing that is asked of it, and that
// is not the agent's fault.
func (s source) cutOff() bool {
	if s.health == nil {
		return false
	}
	all := s.health()
	return len(all) > 0 && !slices.ContainsFunc(all, func(h podwatch.KindHealth) bool { return !podwatch.NoAnswer(h.Err) })
}

// sourceAge is for how long the API server has said nothing about the kind that
// it has been silent about for longest; 0 for a source without one.
func sourceAge(health []podwatch.KindHealth, now time.Time) time.Duration {
	var age time.Duration
	for _, h := range health {
		if !h.LastContact.IsZero() {
			age = max(age, now.Sub(h.LastContact))
		}
	}
	return age
}
