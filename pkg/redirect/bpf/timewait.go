package bpf

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// All connections that a pod's processes open lead to one address and port, the
// proxy's. So they share the client ports that without redirection each of their
// destinations has for itself, and a client that closes first takes its port into
// TIME_WAIT for a minute: with the kernel's defaults no more than 470 connections
// a second could be opened for long. With tcp_tw_reuse set to 1 such a port is
// free after a second. The default, 2, allows that for loopback addresses alone.
const (
	twReuse    = "net/ipv4/tcp_tw_reuse"
	twReuseOn  = "1"
	twReuseDir = "tw_reuse"
)

// twReuseMarks are where what was set before is remembered, by the directory's
// name, which is all that a bpffs can keep: <netns inode>_<value>. Looked for are
// the values that the kernel takes beside ours, not listed are the marks of all
// pods: each ADD does this.
func twReuseMarks(dir string, inode uint64) (marks []string, err error) {
	for _, value := range []string{"0", "2"} {
		mark := filepath.Join(dir, twReuseDir, fmt.Sprintf("%d_%s", inode, value))
		switch _, err := os.Lstat(mark); {
		case err == nil:
			marks = append(marks, mark)
		case !errors.Is(err, fs.ErrNotExist):
			return nil, fmt.Errorf("look for value of %s before: %w", twReuse, err)
		}
	}
	return marks, nil
}

// reusePorts sets tcp_tw_reuse in the namespace of the calling thread.
func reusePorts(dir string, inode uint64) error {
	f, err := openSysctl(twReuse)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	before, err := readSysctl(f)
	if err != nil || before == twReuseOn {
		return err // the pod's own, or ours of before
	}
	if err := forgetReuse(dir, inode); err != nil {
		return err // of a namespace that had the number earlier
	}
	mark := filepath.Join(dir, twReuseDir, fmt.Sprintf("%d_%s", inode, before))
	if err := os.MkdirAll(mark, 0o700); err != nil {
		return fmt.Errorf("remember value of %s: %w", twReuse, err)
	}
	return writeSysctl(f, twReuseOn)
}

// restorePorts sets tcp_tw_reuse in the namespace of the calling thread to what
// it was before reusePorts, unless it was changed since.
func restorePorts(dir string, inode uint64) error {
	marks, err := twReuseMarks(dir, inode)
	if err != nil || len(marks) == 0 {
		return err
	}
	f, err := openSysctl(twReuse)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	now, err := readSysctl(f)
	if err == nil && now == twReuseOn {
		_, before, _ := strings.Cut(filepath.Base(marks[0]), "_")
		err = writeSysctl(f, before)
	}
	if err != nil {
		return err
	}
	return forgetReuse(dir, inode)
}

// forgetReuse removes what reusePorts has remembered of a namespace.
func forgetReuse(dir string, inode uint64) error {
	marks, err := twReuseMarks(dir, inode)
	if err != nil {
		return err
	}
	for _, m := range marks {
		if err := os.Remove(m); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("forget value of %s: %w", twReuse, err)
		}
	}
	return nil
}

// openSysctl opens a sysctl of the network namespace of the calling thread. In a
// container /proc/sys is read-only; a procfs that is mounted nowhere is not.
func openSysctl(name string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join("/proc/sys", name), os.O_RDWR, 0)
	if !errors.Is(err, unix.EROFS) {
		if err != nil {
			return nil, fmt.Errorf("open sysctl: %w", err)
		}
		return f, nil
	}
	return openUnmounted(name)
}

// openUnmounted is openSysctl with a procfs of its own. It needs CAP_SYS_ADMIN.
func openUnmounted(name string) (*os.File, error) {
	context, err := unix.Fsopen("proc", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("open sysctl %s: make procfs: %w", name, err)
	}
	defer func() { _ = unix.Close(context) }()
	if err := unix.FsconfigCreate(context); err != nil {
		return nil, fmt.Errorf("open sysctl %s: make procfs: %w", name, err)
	}
	root, err := unix.Fsmount(context, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open sysctl %s: mount procfs: %w", name, err)
	}
	defer func() { _ = unix.Close(root) }()
	fd, err := unix.Openat(root, "sys/"+name, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open sysctl %s: %w", name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

func readSysctl(f *os.File) (string, error) {
	b := make([]byte, 32)
	n, err := f.ReadAt(b, 0)
	if n == 0 && err != nil {
		return "", fmt.Errorf("read sysctl %s: %w", f.Name(), err)
	}
	return strings.TrimSpace(string(b[:n])), nil
}

func writeSysctl(f *os.File, value string) error {
	if _, err := f.WriteAt([]byte(value), 0); err != nil {
		return fmt.Errorf("write sysctl %s: %w", f.Name(), err)
	}
	return nil
}
