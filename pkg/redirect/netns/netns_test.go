package netns

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/tests/need"
)

const own = "/proc/thread-self/ns/net"

func TestGone(t *testing.T) {
	dir := t.TempDir()
	empty := filepath.Join(dir, "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, path := range map[string]string{
		"absent":          filepath.Join(dir, "absent"),
		"unmounted":       empty,
		"below a file":    filepath.Join(empty, "net"),
		"other namespace": "/proc/self/ns/mnt",
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := Inode(path); !errors.Is(err, redirect.ErrGone) {
				t.Errorf("Inode: got %v, want ErrGone", err)
			}
			if err := Do(path, func() error { return nil }); !errors.Is(err, redirect.ErrGone) {
				t.Errorf("Do: got %v, want ErrGone", err)
			}
		})
	}
}

func TestInode(t *testing.T) {
	var st unix.Stat_t
	if err := unix.Stat(own, &st); err != nil {
		t.Fatal(err)
	}
	ino, err := Inode(own)
	if err != nil {
		t.Fatal(err)
	}
	if ino != st.Ino {
		t.Errorf("got inode %d, want %d", ino, st.Ino)
	}
}

func TestDo(t *testing.T) {
	need.Root(t)
	path := newNamespace(t)
	want, err := Inode(path)
	if err != nil {
		t.Fatal(err)
	}
	boom := errors.New("boom")
	err = Do(path, func() error {
		if got, err := Inode("/proc/thread-self/ns/net"); err != nil || got != want {
			t.Errorf("inside: inode %d, %v; want %d", got, err, want)
		}
		return boom
	})
	if !errors.Is(err, boom) {
		t.Errorf("got %v, want fn's error unchanged", err)
	}
	err = Do(path, func() error { runtime.Goexit(); return nil })
	if err == nil || !strings.Contains(err.Error(), "did not return") {
		t.Errorf("Goexit: got %v", err)
	}
	a, err := Cookie(path)
	if err != nil {
		t.Fatal(err)
	}
	b, err := Cookie(own)
	if err != nil {
		t.Fatal(err)
	}
	if a == b || a == 0 {
		t.Errorf("cookies %d and %d, want different ones", a, b)
	}
}

// newNamespace returns a path to a namespace that lives as long as the test.
func newNamespace(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "net")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread dies in its namespace
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			done <- err
			return
		}
		done <- unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, "")
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(path, unix.MNT_DETACH) })
	return path
}
