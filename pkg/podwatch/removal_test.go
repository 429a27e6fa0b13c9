package podwatch

import (
	"cmp"
	"context"
	"net/http"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const (
	ownNamespace = "sluice-system"
	ownName      = "sluice-agent"
)

func daemonSet(uid string) *metav1.PartialObjectMetadata {
	return apiMeta(string(KindDaemonSet), ownNamespace, ownName, uid)
}

func ending(o *metav1.PartialObjectMetadata) *metav1.PartialObjectMetadata {
	now := metav1.Now()
	o.DeletionTimestamp = &now
	return o
}

// TestRemoval: what the agent is told when it ends, for each way in which its
// DaemonSet and its rights may have gone before.
func TestRemoval(t *testing.T) {
	refuse := func(code int) func(*apiServer) {
		return func(s *apiServer) {
			s.set(func() { s.refuse["list daemonsets"], s.refuse["watch daemonsets"] = code, code })
		}
	}
	remove := func(s *apiServer) { s.remove(daemonSet("")) }
	for name, tc := range map[string]struct {
		absent bool // at the start there is none
		before []func(*apiServer)
		again  bool // it is gone and there again before the agent asks
		// during happens while the agent waits for the answer.
		during func(*apiServer)
		want   bool
		wait   time.Duration // for an answer, 10 s if 0: more than it takes
	}{
		"restart":                      {},
		"deleted":                      {before: []func(*apiServer){remove}, want: true},
		"deleted, and the rights too":  {before: []func(*apiServer){remove, refuse(http.StatusForbidden)}, want: true},
		"account deleted, then it":     {before: []func(*apiServer){refuse(http.StatusUnauthorized), remove}, want: true},
		"rights first, it a bit later": {before: []func(*apiServer){refuse(http.StatusForbidden)}, during: remove, want: true},
		"rights only":                  {before: []func(*apiServer){refuse(http.StatusForbidden)}, wait: 50 * time.Millisecond},
		"deletion waits for the pods":  {before: []func(*apiServer){func(s *apiServer) { s.put(ending(daemonSet("a"))) }}, want: true},
		"deleted and made again":       {before: []func(*apiServer){remove, func(s *apiServer) { s.put(daemonSet("b")) }}, again: true},
		"made again, without rights":   {before: []func(*apiServer){remove, func(s *apiServer) { s.put(daemonSet("b")) }, refuse(http.StatusForbidden)}, again: true, wait: 50 * time.Millisecond},
		"never there":                  {absent: true},
		"never there, no rights":       {absent: true, before: []func(*apiServer){refuse(http.StatusForbidden)}},
		"server away":                  {before: []func(*apiServer){(*apiServer).down}},
		"deleted while nobody watched": {before: []func(*apiServer){func(s *apiServer) {
			s.down()
			s.remove(daemonSet(""))
			s.compact()
			s.up()
		}}, want: true},
		"namespace is deleted, pods first": {before: []func(*apiServer){func(s *apiServer) {
			ns := apiNamespace(ownNamespace)
			now := metav1.Now()
			ns.DeletionTimestamp = &now
			s.put(ns)
		}}, want: true},
	} {
		t.Run(name, func(t *testing.T) {
			api := shopAPI(t)
			api.put(apiNamespace(ownNamespace))
			if !tc.absent {
				api.put(daemonSet("a"))
			}
			k := startK8s(t, api)
			k.waitSynced()
			r, err := NewRemoval(RemovalOptions{Source: k.source, Namespace: ownNamespace, Name: ownName, Log: k.source.log})
			if err != nil {
				t.Fatal(err)
			}
			stop := k.run(r.Run)
			defer stop()
			eventually(t, "watch", func() bool { return r.Health().Synced })
			// All that is done before has arrived before the agent asks: a real
			// agent is asked to end after its DaemonSet was deleted.
			for _, f := range tc.before {
				f(api)
			}
			if tc.want && tc.during == nil {
				eventually(t, "state", func() bool { removed, _, _ := r.state(); return removed })
			}
			if tc.again {
				eventually(t, "the new one", func() bool {
					removed, _, _ := r.state()
					return !removed && len(k.log.with("own DaemonSet has changed")) == 2
				})
			}
			ctx, cancel := context.WithTimeout(t.Context(), cmp.Or(tc.wait, 10*time.Second))
			defer cancel()
			got := make(chan bool, 1)
			go func() { got <- r.Removed(ctx) }()
			if tc.during != nil {
				tc.during(api)
			}
			if removed := <-got; removed != tc.want {
				t.Errorf("Removed = %v, want %v", removed, tc.want)
			}
		})
	}
}
