package netnstest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/pkg/redirect/cgroup"
	"github.com/sluicemesh/sluice/pkg/redirect/netns"
)

// sweep discards what test processes have left that are no more: Cleanup
// functions do not run in one that is killed, panics or meets its timeout.
func sweep(temp string) error {
	if os.Geteuid() != 0 {
		return nil // what root has left is root's to remove
	}
	var pids []int
	dirs := []string{runDir, temp}
	if root, err := cgroup.Root(); err == nil {
		dirs = append(dirs, root)
	}
	for _, dir := range dirs {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("look for what ended tests have left: %w", err)
		}
		for _, e := range entries {
			var pid int
			if _, err := fmt.Sscanf(e.Name(), "slt%d-", &pid); err != nil || !strings.HasPrefix(e.Name(), prefix(pid)) {
				continue
			}
			if unix.Kill(pid, 0) == unix.ESRCH && !slices.Contains(pids, pid) {
				pids = append(pids, pid)
			}
		}
	}
	var errs []error
	for _, pid := range pids {
		errs = append(errs, discard(temp, pid))
	}
	return errors.Join(errs...)
}

// discard removes what the tests of process pid have made: the processes in
// their namespaces, the namespaces, the cgroups, and in the directory of temporary files
// mounts and files. Links go with the bpffs that they are pinned in.
func discard(temp string, pid int) error {
	names, err := filepath.Glob(filepath.Join(runDir, prefix(pid)+"*"))
	if err != nil {
		return err
	}
	inodes := map[uint64]bool{}
	for _, name := range names {
		if ino, err := netns.Inode(name); err == nil { // else nothing is bound there any more
			inodes[ino] = true
		}
	}
	errs := []error{endProcesses(func(pid string) bool {
		var st unix.Stat_t
		return unix.Stat("/proc/"+pid+"/ns/net", &st) == nil && inodes[st.Ino]
	})}
	for _, name := range names {
		errs = append(errs, remove(name))
	}
	errs = append(errs, discardCgroups(pid))
	return errors.Join(append(errs, removeTemp(tempDir(temp, pid)))...)
}

// endProcesses kills the processes that are chosen, never this one, until there
// are none.
func endProcesses(chosen func(pid string) bool) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(leakDeadline); ; <-tick.C {
		all, err := filepath.Glob("/proc/[0-9]*")
		if err != nil {
			return err
		}
		var left []string
		for _, path := range all {
			name := filepath.Base(path)
			pid, err := strconv.Atoi(name)
			if err != nil || pid == os.Getpid() || !chosen(name) || zombie(path) {
				continue
			}
			left = append(left, name)
			if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("end process %d: %w", pid, err)
			}
		}
		if len(left) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("end processes %s: they are still there", strings.Join(left, ", "))
		}
	}
}

// zombie says whether a process has ended and waits for its parent to notice.
func zombie(path string) bool {
	b, err := os.ReadFile(filepath.Join(path, "stat"))
	_, state, _ := strings.Cut(string(b), ") ")
	return err != nil || strings.HasPrefix(state, "Z")
}

// tempDir is the directory of temporary files of the tests of process pid.
func tempDir(temp string, pid int) string { return filepath.Join(temp, prefix(pid)+"tmp") }

// removeTemp removes a directory with what is mounted in it.
func removeTemp(dir string) error {
	points, err := mounts(dir)
	if err != nil {
		return err
	}
	slices.Reverse(points) // a mount upon a mount goes first
	for _, point := range points {
		if err := unix.Unmount(point, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount %s: %w", point, err)
		}
	}
	return os.RemoveAll(dir)
}

// mounts lists what is mounted in a directory.
func mounts(dir string) ([]string, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	var points []string
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
			points = append(points, f[4])
		}
	}
	return points, nil
}
