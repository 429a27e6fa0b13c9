package main

import (
	"context"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/sluicemesh/sluice/pkg/podwatch"
)

// The agent reads the demo's manifests, as the demo writes them, without a complaint.
func TestManifests(t *testing.T) {
	store := podwatch.NewStore(podwatch.StoreOptions{})
	files, err := podwatch.NewFiles(podwatch.FilesOptions{Dir: "../manifests", Store: store})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	done := make(chan error, 1)
	go func() { done <- files.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	select {
	case <-store.Synced():
	case <-ctx.Done():
		t.Fatal("the manifests were not read in time")
	}
	for _, p := range files.Problems() {
		t.Error(p)
	}

	objects, err := readManifests("../manifests")
	if err != nil {
		t.Fatal(err)
	}
	pods := 0
	for _, o := range objects {
		key := podwatch.Key{Kind: podwatch.Kind(o.str("kind")), Namespace: o.str("metadata", "namespace"), Name: o.str("metadata", "name")}
		if _, ok := store.Get(key); !ok {
			t.Errorf("the agent does not see %v", key)
		}
		if key.Kind != podwatch.KindPod {
			continue
		}
		pods++
		p, err := newPod(o)
		if err != nil {
			t.Error(err)
		} else if p.sidecar != (p.namespace == "bookshop") {
			t.Errorf("pod %s: sidecar %v", p.name, p.sidecar)
		}
	}
	if pods != 8 {
		t.Errorf("%d pods, want 8", pods)
	}
}

func TestCopyOf(t *testing.T) {
	o := object{"kind": "Pod", "metadata": map[string]any{"name": "a", "labels": map[string]any{"app": "x"}}}
	c, err := copyOf(o, "b")
	if err != nil {
		t.Fatal(err)
	}
	if o.str("metadata", "name") != "a" || c.str("metadata", "name") != "b" || c.str("metadata", "labels", "app") != "x" {
		t.Errorf("copyOf: %v from %v", c, o)
	}
}

func TestSample(t *testing.T) {
	type result struct {
		Name   string
		Labels map[string]string
		Value  float64
		OK     bool
	}
	for line, want := range map[string]result{
		`sluice_pods{state="redirected"} 7`: {"sluice_pods", map[string]string{"state": "redirected"}, 7, true},
		`sluice_x_total{a="b c",d=""} 1.5`:  {"sluice_x_total", map[string]string{"a": "b c", "d": ""}, 1.5, true},
		`sluice_ready 1`:                    {"sluice_ready", map[string]string{}, 1, true},
		`# HELP sluice_ready 1`:             {},
		``:                                  {},
	} {
		var got result
		got.Name, got.Labels, got.Value, got.OK = sample(line)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%q (-want +got):\n%s", line, diff)
		}
	}
}

func TestDifference(t *testing.T) {
	if got := difference("+", []string{"a", "b", "b"}, []string{"b", "c"}); !cmp.Equal(got, []string{"+ a", "+ b"}) {
		t.Errorf("difference: %q", got)
	}
}
