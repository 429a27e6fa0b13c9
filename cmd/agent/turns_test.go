package main

import (
	"fmt"
	"slices"
	"testing"

	"github.com/sluicemesh/sluice/pkg/podwatch"
)

// While a pod is being redirected others come and go, but what is asked of the
// pod itself waits until that is done.
func TestSandboxesHaveTurns(t *testing.T) {
	web, other := newPod("shop", "web"), newPod("shop", "other")
	n := readyNode(t, shop(), web, other)
	letGo := n.j.hold("redirect uid-web")
	added, deleted := make(chan error, 1), make(chan error, 1)
	go func() { added <- n.Add(t.Context(), attach(web)) }()
	n.j.await(t, "redirect uid-web")
	go func() { deleted <- n.Del(t.Context(), attach(web)) }()
	mustAdd(t, n, attach(other))
	if err := n.Del(t.Context(), attach(other)); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-deleted:
		t.Errorf("DEL overtook ADD: %v", err)
	default:
	}
	letGo()
	if err := <-added; err != nil {
		t.Error(err)
	}
	if err := <-deleted; err != nil {
		t.Error(err)
	}
	if got := n.j.since("redirect uid-web", "release uid-web"); !slices.Equal(got, []string{"redirect uid-web", "release uid-web"}) {
		t.Errorf("got %q", got)
	}
	n.wantLeft(t, left{})
}

// However many pods are being deleted, one can be added.
func TestAddAmongManyDels(t *testing.T) {
	web := newPod("shop", "web")
	objects := []podwatch.Object{shop(), web}
	var ending []*podwatch.Pod
	for i := range 4*removers() + 4*installers() {
		p := newPod("shop", fmt.Sprintf("old-%d", i))
		ending, objects = append(ending, p), append(objects, p)
	}
	n := readyNode(t, objects...)
	done := make(chan error, len(ending))
	var letGo []func()
	for _, p := range ending {
		mustAdd(t, n, attach(p))
		letGo = append(letGo, n.j.hold("release "+p.UID))
	}
	for _, p := range ending {
		go func() { done <- n.Del(t.Context(), attach(p)) }()
	}
	mustAdd(t, n, attach(web))
	for _, f := range letGo {
		f()
	}
	for range ending {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	n.wantLeft(t, whole())
}
