package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sluicemesh/sluice/pkg/podwatch"
)

// TestProxyContainer: the sidecar's container counts as soon as the pod's status
// names it and for as long as it is there.
func TestProxyContainer(t *testing.T) {
	root := t.TempDir()
	first, second := strings.Repeat("1", 64), strings.Repeat("2", 64)
	pod := func(id string) *podwatch.Pod {
		p := newPod("shop", "web")
		p.Containers = []podwatch.Container{{Name: "app", RuntimeID: strings.Repeat("a", 64)}, {Name: "sluice-proxy", RuntimeID: id}}
		return p
	}
	dir := func(id string) string {
		path := filepath.Join("/kubepods/burstable", "pod"+pod("").UID, id)
		if err := os.MkdirAll(filepath.Join(root, path), 0o755); err != nil {
			t.Fatal(err)
		}
		return path
	}
	path := dir(first)
	if err := os.WriteFile(filepath.Join(root, "kubepods/cgroup.events"), []byte("populated 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	n := readyNode(t, shop(), pod(""))
	if err := n.call(t.Context(), func() error { n.containers = nodeContainers{root: root, proc: "/proc"}; return nil }); err != nil {
		t.Fatal(err)
	}
	want := func(when, path string) {
		t.Helper()
		if err := n.call(t.Context(), func() error {
			w := n.pods["box-web"].workload
			if got := w.ProxyCgroup; got != path {
				t.Errorf("%s the data plane knows the proxy by cgroup %q, want %q", when, got, path)
			}
			if got := n.proxyCgroups[w.ID.String()]; got != path {
				t.Errorf("%s the xDS socket knows the proxy by cgroup %q, want %q", when, got, path)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	mustAdd(t, n, attach(pod("")))
	want("before the status names a container", "")
	n.change(t, "redirect uid-web", pod(first))
	want("once it does", path)

	// The sidecar is started again: its cgroup has gone, the status still names
	// it, and who asks for its configuration is refused.
	if err := os.Remove(filepath.Join(root, path)); err != nil {
		t.Fatal(err)
	}
	path = dir(second)
	n.j.reset()
	n.refused(t.Context(), n.boxes.byID["box-web"].id().String())
	n.settle(t, "redirect uid-web")
	want("while the new container is not known", "")
	n.change(t, "redirect uid-web", pod(second))
	want("once it is", path)

	// An app that is refused changes nothing.
	n.j.reset()
	n.refused(t.Context(), n.boxes.byID["box-web"].id().String())
	n.background.Wait()
	want("after another was refused", path)
}
