package netns

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrNoProcess: no process runs in the user namespace, so its mapping of user
// IDs cannot be read. Retry when one has started.
var ErrNoProcess = errors.New("no process runs in the user namespace")

// Userns returns the inode of the user namespace that owns the network
// namespace at path, 0 if that is the caller's own. The network namespace of a
// pod with hostUsers: false is owned by another one, and a user ID in the pod
// is another one outside. Needs Linux 4.9 (NS_GET_USERNS).
func Userns(path string) (uint64, error) {
	fd, err := open(path)
	if err != nil {
		return 0, err
	}
	defer func() { _ = unix.Close(fd) }()
	owner, err := unix.IoctlRetInt(fd, unix.NS_GET_USERNS)
	if err != nil {
		return 0, fmt.Errorf("get user namespace of network namespace %s: %w", path, err)
	}
	defer func() { _ = unix.Close(owner) }()
	var theirs, ours unix.Stat_t
	if err := unix.Fstat(owner, &theirs); err != nil {
		return 0, fmt.Errorf("stat user namespace of network namespace %s: %w", path, err)
	}
	if err := unix.Stat("/proc/self/ns/user", &ours); err != nil {
		return 0, fmt.Errorf("stat own user namespace: %w", err)
	}
	if theirs.Ino == ours.Ino {
		return 0, nil
	}
	return theirs.Ino, nil
}

// HostUID returns what the user ID uid of the user namespace with the given
// inode is in the caller's own. proc is where a procfs that shows the node's
// processes is mounted: the mapping is read from any process in there. Without
// one the error is ErrNoProcess.
func HostUID(proc string, userns uint64, uid uint32) (uint32, error) {
	pids, err := os.ReadDir(proc)
	if err != nil {
		return 0, fmt.Errorf("list processes: %w", err)
	}
	want := fmt.Sprintf("user:[%d]", userns)
	for _, pid := range pids {
		if _, err := strconv.Atoi(pid.Name()); err != nil {
			continue
		}
		dir := filepath.Join(proc, pid.Name())
		if link, err := os.Readlink(filepath.Join(dir, "ns/user")); err != nil || link != want {
			continue // another one, or ended meanwhile
		}
		b, err := os.ReadFile(filepath.Join(dir, "uid_map"))
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("read mapping of user IDs: %w", err)
		}
		return mapUID(string(b), uid)
	}
	return 0, ErrNoProcess
}

// mapUID looks uid up in the text of a uid_map, see user_namespaces(7).
func mapUID(text string, uid uint32) (uint32, error) {
	lines := bufio.NewScanner(strings.NewReader(text))
	for lines.Scan() {
		var inside, outside, length uint64
		if n, err := fmt.Sscan(lines.Text(), &inside, &outside, &length); n != 3 {
			return 0, fmt.Errorf("read mapping of user IDs %q: %w", lines.Text(), err)
		}
		if u := uint64(uid); u >= inside && u < inside+length {
			return uint32(outside + u - inside), nil
		}
	}
	return 0, fmt.Errorf("user ID %d is not mapped in the pod's user namespace", uid)
}
