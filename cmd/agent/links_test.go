package main

import (
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/sluicemesh/sluice/pkg/redirect/netns"
	"github.com/sluicemesh/sluice/tests/need"
	"github.com/sluicemesh/sluice/tests/netnstest"
)

// TestLookAtChangedInterfaces: a pod one of whose interfaces changed is looked at, not
// the others, nor because of what was before it was looked at last.
func TestLookAtChangedInterfaces(t *testing.T) {
	need.Root(t)
	web, db := newPod("shop", "web"), newPod("shop", "db")
	n := readyNode(t, shop(), web, db)
	before := time.Now()
	numbers := map[string]int{}
	for i, pod := range []string{"web", "db"} {
		ns := netnstest.New(t, pod)
		f, err := os.Open(ns.Netns)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = f.Close() }()
		if got, err := netns.Number(ns.Netns); err != nil || got != -1 {
			t.Errorf("a namespace that nothing leads to has number %d, %v", got, err)
		}
		numbers[pod] = 5100 + i
		if err := netlink.SetNetNsIdByFd(int(f.Fd()), numbers[pod]); err != nil {
			t.Fatal(err)
		}
		at := attach(newPod("shop", pod))
		at.Netns = ns.Netns
		mustAdd(t, n, at)
	}
	n.j.reset()
	n.lookAt(t.Context(), map[int]time.Time{-1: time.Now(), numbers["db"]: before, numbers["web"]: time.Now()})
	n.settle(t, "redirect uid-web")
	if got := n.j.since("redirect"); len(got) != 1 {
		t.Errorf("got %v, want the one pod that changed", got)
	}
}
