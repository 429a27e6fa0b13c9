package bpf

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/pkg/redirect"
)

const (
	// unmountDeadline bounds the wait for others to leave the bpffs, unmountPoll
	// is how often to try.
	unmountDeadline = 2 * time.Second
	unmountPoll     = 5 * time.Millisecond
)

// mountSource is what a bpffs that Sluice has mounted says as its source, by
// which Uninstall knows it.
const mountSource = "sluice"

// A mount is a line of mountinfo.
type mount struct {
	root, point, fstype, source string
}

// mounts reads the mounts that this process sees.
func mounts() ([]mount, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("open mount table: %w", err)
	}
	defer func() { _ = f.Close() }()
	var all []mount
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		// 36 35 98:0 /root /point rw,noatime [fields ...] - fstype source options
		before, after, ok := strings.Cut(lines.Text(), " - ")
		head, tail := strings.Fields(before), strings.Fields(after)
		if !ok || len(head) < 5 || len(tail) < 2 {
			return nil, fmt.Errorf("read mount table: unexpected line %q", lines.Text())
		}
		unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
		all = append(all, mount{
			root: head[3], point: unescape.Replace(head[4]), fstype: tail[0], source: tail[1],
		})
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("read mount table: %w", err)
	}
	return all, nil
}

// podsCgroup returns the cgroup below root that all pods live in, else root.
// Programs of a child run before those of the root, so that Sluice sees the
// address of a Service before a load balancer on the root has replaced it.
//
// Where there are both names, one is left from before the kubelet's cgroup driver
// was changed. Which one is not to be seen, and pods in the other would get past
// the hooks: the root covers both.
func podsCgroup(root string) string {
	systemd, cgroupfs := filepath.Join(root, "kubepods.slice"), filepath.Join(root, "kubepods")
	switch one, other := isDir(systemd), isDir(cgroupfs); {
	case one && !other:
		return systemd
	case other && !one:
		return cgroupfs
	}
	return root
}

func isDir(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.IsDir()
}

// cgroupID returns the number by which the kernel knows the cgroup at path.
func cgroupID(path string) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0, fmt.Errorf("stat cgroup %s: %w", path, err)
	}
	return st.Ino, nil
}

// isBPFFS reports whether dir lies in a bpffs.
func isBPFFS(dir string) (bool, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return false, fmt.Errorf("look at file system of %s: %w", dir, err)
	}
	return st.Type == unix.BPF_FS_MAGIC, nil
}

// provideBPFFS makes dir a bpffs unless it is one. With noMount set it is the
// node's to have one.
func provideBPFFS(dir string, noMount bool) error {
	ok, err := isBPFFS(dir)
	if err != nil || ok {
		return err
	}
	if noMount {
		return fmt.Errorf("no bpffs is mounted at %s on the node (there: mount -t bpf bpf %s, then restart the agent): %w",
			dir, dir, redirect.ErrNotSupported)
	}
	if err := unix.Mount(mountSource, dir, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
		return fmt.Errorf("mount bpffs on %s: %w", dir, err)
	}
	return nil
}

// writable returns an error that says what to do if the bpffs of dir is mounted
// read-only. Where nothing is pinned yet another backend may do instead.
func writable(dir string) error {
	var st unix.Statfs_t
	parent := filepath.Dir(dir)
	if err := unix.Statfs(parent, &st); err != nil {
		return fmt.Errorf("look at file system of %s: %w", parent, err)
	}
	if st.Flags&unix.ST_RDONLY == 0 {
		return nil
	}
	err := fmt.Errorf("bpffs at %s is mounted read-only (on the node: mount -o remount,rw %s, then restart the agent)", parent, parent)
	if !isDir(dir) {
		err = fmt.Errorf("%w: %w", err, redirect.ErrNotSupported)
	}
	return err
}

// unmountBPFFS undoes provideBPFFS, unless others have put something there.
func unmountBPFFS(dir string) error {
	all, err := mounts()
	if err != nil {
		return err
	}
	for _, m := range all {
		if m.point != dir || m.fstype != "bpf" || m.source != mountSource {
			continue
		}
		left, err := os.ReadDir(dir)
		if err != nil {
			return fmt.Errorf("read bpffs: %w", err)
		}
		// Every bpffs shows these two of the kernel's own.
		left = slices.DeleteFunc(left, func(e os.DirEntry) bool {
			return e.Name() == "maps.debug" || e.Name() == "progs.debug"
		})
		if len(left) > 0 {
			return nil
		}
		// Busy while somebody looks into it.
		for deadline := time.Now().Add(unmountDeadline); ; time.Sleep(unmountPoll) {
			err := unix.Unmount(dir, 0)
			if err == nil {
				break
			}
			if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
				return fmt.Errorf("unmount bpffs from %s: %w", dir, err)
			}
		}
	}
	return nil
}

// lock admits one process to the pins in dir, alone or together with others who
// want only to look at or change single pods. The returned function ends that;
// the death of the process does as well.
func lock(dir string, together bool) (unlock func(), err error) {
	how := unix.LOCK_EX
	if together {
		how = unix.LOCK_SH
	}
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open pin directory %s: %w", dir, err)
	}
	for {
		err := unix.Flock(fd, how)
		if err == nil {
			return func() { _ = unix.Close(fd) }, nil
		}
		if !errors.Is(err, unix.EINTR) {
			_ = unix.Close(fd)
			return nil, fmt.Errorf("lock pin directory %s: %w", dir, err)
		}
	}
}

// haveBPFFS returns an error if the kernel has no bpffs.
func haveBPFFS() error {
	b, err := os.ReadFile("/proc/filesystems")
	if err != nil {
		return fmt.Errorf("read file systems of the kernel: %w", err)
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 0 && f[len(f)-1] == "bpf" {
			return nil
		}
	}
	return fmt.Errorf("file system bpf: %w", redirect.ErrNotSupported)
}
