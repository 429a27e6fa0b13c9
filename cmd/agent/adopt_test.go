package main

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/sluicemesh/sluice/pkg/podwatch"
	"github.com/sluicemesh/sluice/pkg/podwatch/podnetns"
	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/pkg/redirect/netns"
)

// older returns a pod that runs with an address.
func older(name string) *podwatch.Pod {
	p := newPod("shop", name)
	p.RuntimeUID = p.UID
	p.Addrs = []netip.Addr{netip.MustParseAddr("10.0.0.7")}
	return p
}

func foundIn(t *testing.T, ifName string) podnetns.Result {
	t.Helper()
	inode, err := netns.Inode(ownNetns)
	if err != nil {
		t.Fatal(err)
	}
	return podnetns.Result{Found: podnetns.Found{
		Path: ownNetns, Inode: inode, SandboxID: "sandbox-of-old",
		Interfaces: []podnetns.Interface{{Name: ifName, Addrs: []netip.Addr{netip.MustParseAddr("10.0.0.7")}}},
	}}
}

func TestOlderPodIsAdopted(t *testing.T) {
	n := newNode(t)
	var asked []string
	n.find = func(pods []podnetns.Pod) (map[string]podnetns.Result, error) {
		for _, p := range pods {
			asked = append(asked, p.UID)
		}
		return map[string]podnetns.Result{"uid-old": foundIn(t, "eth0")}, nil
	}
	host, finished, bare := older("host"), older("finished"), newPod("shop", "bare")
	host.HostNetwork, finished.Finished = true, true
	n.update(shop(), older("old"), host, finished, bare)
	n.store.SetSynced()
	n.settle(t, "redirect uid-old")
	if diff := cmp.Diff([]string{"uid-old"}, asked); diff != "" {
		t.Errorf("looked for, -want +got:\n%s", diff)
	}
	if !slices.ContainsFunc(n.j.reported(), func(s string) bool { return strings.HasPrefix(s, "shop/old uid-old Normal Adopted:") }) {
		t.Error("no event tells that the pod was adopted")
	}
	// From here on it is a sandbox like others.
	if box := n.boxes.byID["sandbox-of-old"]; box.PodUID != "uid-old" || len(box.Attachments["eth0"].Interfaces) != 1 {
		t.Errorf("sandbox is %+v", box)
	}
}

// A pod that comes into the source later, without CNI, is one whose records were
// lost or that was labelled late.
func TestLabelledLater(t *testing.T) {
	n := newNode(t)
	n.find = func([]podnetns.Pod) (map[string]podnetns.Result, error) {
		return map[string]podnetns.Result{"uid-old": foundIn(t, "eth0")}, nil
	}
	n.update(&podwatch.Namespace{Meta: podwatch.Meta{Name: "shop"}}, older("old"))
	n.store.SetSynced()
	<-n.started
	n.change(t, "redirect uid-old", shop(), func() *podwatch.Pod { p := older("old"); p.Labels["x"] = "y"; return p }())
}

func TestOlderPodIsNotFound(t *testing.T) {
	for name, test := range map[string]struct {
		err     error
		problem string
	}{
		"it has ended":            {podnetns.ErrNotFound, ""},
		"it has other addresses":  {podnetns.ErrNotItsAddrs, "its network namespace does not have the pod's addresses"},
		"it cannot be looked for": {errors.New("out of files"), "out of files"},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			var once sync.Once
			done := make(chan struct{})
			n.find = func([]podnetns.Pod) (map[string]podnetns.Result, error) {
				defer once.Do(func() { close(done) })
				return map[string]podnetns.Result{"uid-old": {Err: test.err}}, nil
			}
			n.update(shop(), older("old"))
			n.store.SetSynced()
			<-done
			deadline, adopting := time.Now().Add(20*time.Second), true
			for adopting { // until what was found has been looked at
				if err := n.call(t.Context(), func() error { adopting = n.adopting; return nil }); err != nil {
					t.Fatal(err)
				}
				if time.Now().After(deadline) {
					t.Fatal("pods are looked for without end")
				}
			}
			_, problems := n.report()
			if got := problems["pod shop/old"]; !strings.Contains(got, test.problem) || (got == "") != (test.problem == "") {
				t.Errorf("problem is %q, want %q", got, test.problem)
			}
			n.wantLeft(t, left{})
		})
	}
}

// A pod that cannot be adopted is looked for again and again, and told of once.
func TestStrayIsToldOnce(t *testing.T) {
	n := readyNode(t, shop(), older("old"))
	told := func() (events int) {
		for _, s := range n.j.reported() {
			if strings.Contains(s, "Warning "+reasonFailed) {
				events++
			}
		}
		return events
	}
	for _, step := range []struct {
		err  error
		want int
	}{{podnetns.ErrNotItsAddrs, 1}, {podnetns.ErrNotItsAddrs, 0}, {podnetns.ErrHostNetwork, 1}, {podnetns.ErrNotItsAddrs, 1}} {
		if err := n.call(t.Context(), func() error {
			n.agent.settle(t.Context(), older("old"), podnetns.Result{Err: step.err})
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		if got := told(); got != step.want {
			t.Errorf("%v: %d events, want %d", step.err, got, step.want)
		}
	}
}

// An older pod that is ready, and of which for a while no process is found, is a
// problem: its traffic goes past its proxy.
func TestOlderPodStaysMissing(t *testing.T) {
	ready := older("old")
	ready.Ready = true
	for name, test := range map[string]struct {
		pod   *podwatch.Pod
		since time.Duration
		want  int
	}{
		"ready, and missing for long": {ready, 2 * missingFor, 1},
		"missing for a moment":        {ready, missingFor / 2, 0},
		"not ready":                   {older("old"), 2 * missingFor, 0},
	} {
		t.Run(name, func(t *testing.T) {
			n := readyNode(t, shop())
			n.update(test.pod)
			mustCall(t, n, func() {
				n.missing = map[string]time.Time{test.pod.RuntimeUID: time.Now().Add(-test.since)}
				for range 2 { // it is told once
					n.agent.settle(t.Context(), test.pod, podnetns.Result{Err: podnetns.ErrNotFound})
				}
			})
			if got := n.j.reported(); len(got) != test.want {
				t.Errorf("told %q, want %d", got, test.want)
			}
			if _, problems := n.report(); len(problems) != test.want {
				t.Errorf("problems: %q", problems)
			}
		})
	}
}

// An older pod that does not say clearly whether it is to be redirected is told.
func TestOlderPodWithABadLabel(t *testing.T) {
	n := newNode(t)
	n.find = func([]podnetns.Pod) (map[string]podnetns.Result, error) { return nil, nil }
	bad := older("old")
	bad.Labels = map[string]string{redirect.RedirectKey: "on"}
	n.update(shop(), bad)
	n.store.SetSynced()
	n.settle(t, "ready")
	if _, problems := n.report(); !strings.Contains(problems["pod shop/old"], redirect.RedirectKey) {
		t.Errorf("problems: %q", problems)
	}
	off := older("old")
	off.Labels = map[string]string{redirect.RedirectKey: redirect.RedirectDisabled}
	n.change(t, "share service/shop/mark", off, newService("mark", 80))
	if _, problems := n.report(); len(problems) > 0 {
		t.Errorf("problems after it was mended: %q", problems)
	}
}

// The proxy of a pod with a user namespace of its own is known once it asks.
func TestUserNamespace(t *testing.T) {
	web := newPod("shop", "web")
	n := readyNode(t, shop(), web)
	var mapped uint32
	if err := n.call(t.Context(), func() error {
		n.hostUID = func(userns uint64, uid uint32) (uint32, error) {
			if userns != 4711 || uid != 1337 {
				return 0, errors.New("asked for another")
			}
			if mapped == 0 {
				return 0, netns.ErrNoProcess
			}
			return mapped, nil
		}
		box := sandbox{
			ContainerID: "box", Namespace: "shop", Name: "web", PodUID: "uid-web", Netns: ownNetns, Userns: 4711,
			Attachments: adoptedAttachments([]podnetns.Interface{{Name: "eth0", Addrs: []netip.Addr{netip.MustParseAddr("10.0.0.7")}}}),
		}
		box.NetnsInode, _ = netns.Inode(ownNetns)
		if err := n.boxes.put(box); err != nil {
			return err
		}
		return n.applyPod(t.Context(), box.ContainerID, time.Now())
	}); err != nil {
		t.Fatal(err)
	}
	uid := func() uint32 { return n.pods["box"].workload.HostProxyUID }
	if b := n.pods["box"].workload.Policy.Backend; b != redirect.BackendEBPF {
		t.Errorf("its backend is %s", b)
	}
	if _, err := usernsBackend(redirect.BackendIPTables); err == nil || !strings.Contains(err.Error(), "hostUsers") {
		t.Errorf("iptables is not refused by name: %v", err)
	}
	if uid() != redirect.NoUID {
		t.Errorf("before the pod has a process its proxy is user %d", uid())
	}
	if err := n.call(t.Context(), func() error { mapped = 201337; return nil }); err != nil {
		t.Fatal(err)
	}
	n.j.reset()
	n.refused(t.Context(), n.boxes.byID["box"].id().String())
	n.settle(t, "redirect uid-web")
	if err := n.call(t.Context(), func() error {
		if uid() != 201337 {
			t.Errorf("once it asks its proxy is user %d", uid())
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

func TestDrainOnce(t *testing.T) {
	web := newPod("shop", "web")
	n := readyNode(t, shop(), web)
	drained := make(chan proxyTarget, 2)
	if err := n.call(t.Context(), func() error {
		n.drain = func(_ context.Context, p proxyTarget) error { drained <- p; return nil }
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	mustAdd(t, n, attach(web))
	if len(drained) != 0 {
		t.Error("a pod that stays was drained")
	}
	ending := newPod("shop", "web")
	ending.Terminating = true
	n.update(ending)
	if p := <-drained; p.Namespace != "shop" || p.Pod != "web" || p.Netns == "" {
		t.Errorf("drained %+v", p)
	}
	ending = newPod("shop", "web")
	ending.Terminating, ending.Annotations = true, map[string]string{"a": "b"}
	n.change(t, "share service/shop/mark", ending, newService("mark", 80))
	n.background.Wait()
	if len(drained) != 0 {
		t.Error("drained twice")
	}
}
