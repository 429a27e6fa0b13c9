package main

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/pkg/podwatch/cniapi"
	"github.com/sluicemesh/sluice/pkg/redirect/netns"
	"github.com/sluicemesh/sluice/tests/need"
)

// TestOneAgentAtATime: a second agent on the same state would undo what the
// first does, and so would an uninstall beside it.
func TestOneAgentAtATime(t *testing.T) {
	dir := t.TempDir()
	state, pins := filepath.Join(dir, "state"), filepath.Join(dir, "bpf", "sluice")
	uninstall := func() (int, string) {
		code, _, stderr := runMain(t, nil, "uninstall", "--state-dir", state, "--pin-dir", pins, "--cni-socket", filepath.Join(dir, "cni.sock"))
		return code, stderr
	}
	if code, stderr := uninstall(); code != 0 {
		t.Errorf("uninstall of nothing: exit code %d: %s", code, stderr)
	}
	if err := os.Mkdir(state, 0o700); err != nil {
		t.Fatal(err)
	}
	unlock, err := lockState(t.Context(), state, 0, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	want := state + ": another sluice-agent is using it"
	if code, stderr := uninstall(); code != 1 || !strings.Contains(stderr, want) {
		t.Errorf("uninstall beside an agent: exit code %d: %s", code, stderr)
	}
	code, _, stderr := runMain(t, nil, "run", "--source", "files:"+dir, "--node", "n", "--state-dir", state, "--pin-dir", pins)
	if code != 1 || !strings.Contains(stderr, want) {
		t.Errorf("run beside an agent: exit code %d: %s", code, stderr)
	}
	unlock()
	if code, stderr := uninstall(); code != 0 {
		t.Errorf("uninstall afterwards: exit code %d: %s", code, stderr)
	}
	if _, err := os.Stat(state); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the state directory is still there: %v", err)
	}
}

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
	// Its namespace cannot be looked at: a name that the kernel refuses stands
	// for a moment without file descriptors.
	unseen := lives
	unseen.ContainerID, unseen.Netns = "unseen", "/"+strings.Repeat("x", 300)
	replaced, gone, deleted := lives, lives, lives
	replaced.ContainerID, replaced.NetnsInode = "replaced", inode+1
	gone.ContainerID, gone.Netns = "gone", filepath.Join(dir, "no-such-netns")
	deleted.ContainerID = "deleted"
	for _, box := range []sandbox{lives, unseen, replaced, gone, deleted} {
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
	if diff := cmp.Diff([]sandbox{lives, unseen}, again.all()); diff != "" {
		t.Errorf("sandboxes after a restart, -want +got:\n%s", diff)
	}
	left, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{filepath.Join(dir, "lives.json"), filepath.Join(dir, "unseen.json")}, left); diff != "" {
		t.Errorf("files left, -want +got:\n%s", diff)
	}
}

// TestStateIsAMount: in a container the state directory is mounted and cannot be
// removed, which is nothing to end with an error for.
func TestStateIsAMount(t *testing.T) {
	need.Root(t)
	state := t.TempDir()
	if err := os.Mkdir(filepath.Join(state, "sandboxes"), 0o700); err != nil {
		t.Fatal(err)
	}
	failed := make(chan error)
	go func() {
		runtime.LockOSThread() // and the thread ends, with its mounts
		err := unix.Unshare(unix.CLONE_NEWNS)
		if err == nil {
			err = unix.Mount("none", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
		}
		if err == nil {
			err = unix.Mount(state, state, "", unix.MS_BIND, "")
		}
		if err == nil {
			err = removeState(state)
		}
		failed <- err
	}()
	if err := <-failed; err != nil {
		t.Error(err)
	}
	if left, err := os.ReadDir(state); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}
