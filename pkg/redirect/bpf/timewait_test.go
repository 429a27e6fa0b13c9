package bpf

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sluicemesh/sluice/tests/need"
	"github.com/sluicemesh/sluice/tests/netnstest"
)

// TestClientPorts: a pod's setting for ports in TIME_WAIT is changed while it is
// redirected, and is then what it was; one that is right already is the pod's own.
func TestClientPorts(t *testing.T) {
	o := newOptions(t)
	node := netnstest.NewNode(t)
	removed, own, changed, gone, left := node.Pod(t, "removed"), node.Pod(t, "own"), node.Pod(t, "changed"), node.Pod(t, "gone"), node.Pod(t, "left")
	own.Sysctl(t, twReuse, "1")
	left.Sysctl(t, twReuse, "0")
	want := func(when string, pod *netnstest.Pod, value string) {
		t.Helper()
		err := pod.Do(func() error {
			b, err := os.ReadFile(filepath.Join("/proc/sys", twReuse))
			if got := strings.TrimSpace(string(b)); err == nil && got != value {
				t.Errorf("%s %s is %s in pod %s, want %s", when, twReuse, got, pod.Name, value)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	all := []*netnstest.Pod{removed, own, changed, gone, left}
	r := open(t, o)
	for _, pod := range all {
		mustAdd(t, r, workload(t, pod))
		want("redirected", pod, "1")
	}
	// Another agent knows what was before, and does not take 1 for it.
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	r = open(t, o)
	defer func() { _ = r.Close() }()
	changed.Sysctl(t, twReuse, "0")
	dead := workload(t, gone)
	gone.Remove(t)
	for _, pod := range []*netnstest.Pod{removed, own, changed} {
		if err := r.Remove(t.Context(), workload(t, pod).ID); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Remove(t.Context(), dead.ID); err != nil {
		t.Fatal(err)
	}
	want("removed,", removed, "2")
	want("removed,", own, "1")
	want("changed and removed,", changed, "0")
	marks, err := os.ReadDir(filepath.Join(o.PinDir, twReuseDir))
	if err != nil || len(marks) != 1 {
		t.Errorf("remembered of one pod: %v, %v", marks, err)
	}
	if err := Uninstall(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	want("uninstalled,", left, "0")
}

// TestSysctlInContainer: where /proc/sys is read-only there is another way to it.
func TestSysctlInContainer(t *testing.T) {
	need.EBPF(t)
	pod := netnstest.New(t, "pod")
	if err := pod.Do(func() error {
		f, err := openUnmounted(twReuse)
		if err != nil {
			return err
		}
		defer func() { _ = f.Close() }()
		if before, err := readSysctl(f); err != nil || before != "2" {
			t.Errorf("read %q, %v; want the kernel's default, 2", before, err)
		}
		if err := writeSysctl(f, twReuseOn); err != nil {
			return err
		}
		b, err := os.ReadFile(filepath.Join("/proc/sys", twReuse))
		if strings.TrimSpace(string(b)) != twReuseOn {
			t.Errorf("the namespace has %q", b)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
}
