package cgroup

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// PeerIn says whether the process that connected a unix socket is in the cgroup
// at path, below the root of the hierarchy, or in one below it. proc is where a
// procfs that shows the node's processes is mounted. The error wraps ErrUnknown
// where the kernel cannot tell who connected: before 6.5 (SO_PEERPIDFD), and not
// even that if the process is not in this one's PID namespace.
func PeerIn(c syscall.Conn, proc, path string) (bool, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return false, fmt.Errorf("look at socket: %w", err)
	}
	pidfd := -1
	var asked error
	err = raw.Control(func(fd uintptr) {
		pidfd, asked = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PEERPIDFD)
	})
	switch {
	case err != nil:
		return false, fmt.Errorf("look at socket: %w", err)
	case errors.Is(asked, unix.ENOPROTOOPT):
		return false, fmt.Errorf("find who connected: %w: %w", ErrUnknown, asked)
	case errors.Is(asked, unix.ESRCH), errors.Is(asked, unix.EINVAL):
		return false, nil // it has ended
	case asked != nil:
		return false, fmt.Errorf("find who connected: %w", asked)
	}
	defer func() { _ = unix.Close(pidfd) }()
	pid, err := pidOf(proc, pidfd)
	if err != nil || pid <= 0 {
		return false, err
	}
	b, err := os.ReadFile(filepath.Join(proc, strconv.Itoa(pid), "cgroup"))
	if err != nil {
		return false, nil //nolint:nilerr // it has ended
	}
	// The number may have been another process' since: not if this one lives.
	if now, err := pidOf(proc, pidfd); err != nil || now != pid {
		return false, err
	}
	return inText(string(b), path), nil
}

// pidOf returns the process of a pidfd by the number that proc has for it; -1 if
// it has ended.
func pidOf(proc string, pidfd int) (int, error) {
	b, err := os.ReadFile(filepath.Join(proc, "self/fdinfo", strconv.Itoa(pidfd)))
	if err != nil {
		return 0, fmt.Errorf("read number of process: %w", err)
	}
	for line := range strings.Lines(string(b)) {
		if n, ok := strings.CutPrefix(line, "Pid:"); ok {
			pid, err := strconv.Atoi(strings.TrimSpace(n))
			if err != nil {
				return 0, fmt.Errorf("read number of process: %w", err)
			}
			return pid, nil
		}
	}
	return 0, errors.New("read number of process: it is no pidfd")
}

// inText says whether the content of a /proc/PID/cgroup names path or a cgroup
// below it. A reader in a cgroup namespace of its own sees "/.." for each level
// that leads up to where its path and the other's part, and from there on the
// rest of that.
func inText(content, path string) bool {
	want := strings.Split(strings.Trim(path, "/"), "/")
	for line := range strings.Lines(content) {
		seen, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "0::/")
		if !ok {
			continue
		}
		parts := strings.Split(seen, "/")
		up := 0
		for up < len(parts) && parts[up] == ".." {
			up++
		}
		if parts = parts[up:]; up == 0 {
			return begins(parts, want)
		}
		for skip := range want {
			if begins(parts, want[skip:]) {
				return true
			}
		}
	}
	return false
}

func begins(parts, want []string) bool {
	if len(parts) < len(want) {
		return false
	}
	for i, w := range want {
		if parts[i] != w {
			return false
		}
	}
	return true
}
