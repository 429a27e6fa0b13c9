package netnstest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/pkg/redirect/cgroup"
)

// NewCgroup makes a cgroup v2 right below the root of the hierarchy and returns
// its directory. With all that is made below it, it goes when tb ends; the
// processes in it must have ended by then.
func NewCgroup(tb testing.TB) string {
	tb.Helper()
	root, err := cgroup.Root()
	if err != nil {
		tb.Fatal(err)
	}
	dir, err := os.MkdirTemp(root, prefix(os.Getpid())+"*")
	if err != nil {
		tb.Fatalf("make cgroup: %v", err)
	}
	tb.Cleanup(func() {
		if err := removeCgroup(dir); err != nil {
			tb.Error(err)
		}
	})
	return dir
}

// EnterCgroup is NewCgroup and puts this process, and so all that it starts, there
// until tb ends: it can stand for the node's root.
func EnterCgroup(tb testing.TB) string {
	tb.Helper()
	dir := NewCgroup(tb)
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		tb.Fatalf("find own cgroup: %v", err)
	}
	root := filepath.Dir(dir)
	var own string
	for line := range strings.Lines(string(b)) {
		if path, ok := strings.CutPrefix(line, "0::"); ok {
			own = filepath.Join(root, strings.TrimSpace(path))
		}
	}
	if err := enter(dir); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := enter(own); err != nil {
			tb.Error(err)
		}
	})
	return dir
}

// enter puts this process into a cgroup.
func enter(dir string) error {
	err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0)
	if err != nil {
		return fmt.Errorf("enter cgroup: %w", err)
	}
	return nil
}

// removeCgroup removes a cgroup and those below it. The kernel counts processes
// that have just ended for a moment longer.
func removeCgroup(dir string) error {
	var dirs []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return err
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("list cgroups: %w", err)
	}
	slices.Reverse(dirs)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(leakDeadline); len(dirs) > 0; <-tick.C {
		err := unix.Rmdir(dirs[0])
		for err == nil || errors.Is(err, unix.ENOENT) {
			if dirs = dirs[1:]; len(dirs) == 0 {
				return nil
			}
			err = unix.Rmdir(dirs[0])
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("remove cgroup %s: %w", dirs[0], err)
		}
	}
	return nil
}

// discardCgroups removes the cgroups that the tests of process pid have made,
// and ends what runs in them.
func discardCgroups(pid int) error {
	var dirs []string
	root, _ := cgroup.Root() // without one there are none
	for _, root := range []string{root, memoryV1} {
		found, err := filepath.Glob(filepath.Join(root, prefix(pid)+"*"))
		if err != nil {
			return err
		}
		if root != "" {
			dirs = append(dirs, found...)
		}
	}
	var errs []error
	if pid == os.Getpid() && len(dirs) > 0 { // it may be in one, see EnterCgroup
		errs = append(errs, enter(root))
	}
	for _, dir := range dirs {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("end processes of cgroup: %w", err))
		}
		errs = append(errs, removeCgroup(dir))
	}
	return errors.Join(errs...)
}
