package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/sluicemesh/sluice/pkg/podwatch/cniapi"
	"github.com/sluicemesh/sluice/pkg/redirect/netns"
)

// TestSandboxesSurviveRestart: what one agent stored the next one loads, but
// for sandboxes whose namespace is gone or another by now, and broken files.
func TestSandboxesSurviveRestart(t *testing.T) {
	const own = "/proc/self/ns/net"
	inode, err := netns.Inode(own)
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "sandboxes")
	s, err := loadSandboxes(dir)
	if err != nil {
		t.Fatal(err)
	}
	lives := sandbox{
		ContainerID: "lives", Namespace: "a", Name: "p", PodUID: "u", Netns: own, NetnsInode: inode,
		Attachments: map[string]attachment{"eth0": {Network: "pods", Interfaces: []cniapi.Interface{{Name: "eth0"}}}},
	}
	replaced, gone, deleted := lives, lives, lives
	replaced.ContainerID, replaced.NetnsInode = "replaced", inode+1
	gone.ContainerID, gone.Netns = "gone", filepath.Join(dir, "no-such-netns")
	deleted.ContainerID = "deleted"
	for _, box := range []sandbox{lives, replaced, gone, deleted} {
		if err := s.put(box); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.forget("deleted"); err != nil {
		t.Fatal(err)
	}
	if err := s.forget("deleted"); err != nil {
		t.Errorf("forgetting twice: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "broken.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}

	again, err := loadSandboxes(dir)
	if again == nil || err == nil {
		t.Fatalf("loading beside a broken file: sandboxes %v, error %v; want both", again, err)
	}
	if diff := cmp.Diff([]sandbox{lives}, again.all()); diff != "" {
		t.Errorf("sandboxes after a restart, -want +got:\n%s", diff)
	}
	left, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{filepath.Join(dir, "lives.json")}, left); diff != "" {
		t.Errorf("files left, -want +got:\n%s", diff)
	}
}
