package cgroup

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/pkg/redirect"
)

// ErrUnknown: nobody can tell which processes are pods'.
var ErrUnknown = errors.New("processes of pods cannot be told from others")

const (
	// maxDepth is how many levels below the root a kubelet's cgroup root may
	// lie: in a container of a nested node it is three.
	maxDepth = 5
	// MaxPods is how many cgroups of pods there may be; one is usual.
	MaxPods = 32
)

// A Cgroup is a directory of cgroup v2.
type Cgroup struct {
	Path string
	// ID is the number by which the kernel knows it, never used twice.
	ID uint64
}

// Root returns where the root of the cgroup v2 hierarchy is mounted. In a
// container several subtrees may be, all called "/"; only the true root has no
// cgroup.events. The error wraps redirect.ErrNotSupported if it is not mounted.
func Root() (string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return "", fmt.Errorf("open mount table: %w", err)
	}
	defer func() { _ = f.Close() }()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		// 36 35 98:0 /root /point rw,noatime [fields ...] - fstype source options
		before, after, _ := strings.Cut(lines.Text(), " - ")
		head := strings.Fields(before)
		if len(head) < 5 || !strings.HasPrefix(after, "cgroup2 ") {
			continue
		}
		point := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(head[4])
		if _, err := os.Stat(filepath.Join(point, "cgroup.procs")); err != nil {
			continue // hidden by another mount
		}
		if _, err := os.Stat(filepath.Join(point, "cgroup.events")); errors.Is(err, fs.ErrNotExist) {
			return point, nil
		}
	}
	if err := lines.Err(); err != nil {
		return "", fmt.Errorf("read mount table: %w", err)
	}
	return "", fmt.Errorf("root of the cgroup v2 hierarchy is not mounted: %w", redirect.ErrNotSupported)
}

// Get returns the cgroup at path.
func Get(path string) (Cgroup, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return Cgroup{}, fmt.Errorf("stat cgroup %s: %w", path, err)
	}
	return Cgroup{Path: path, ID: st.Ino}, nil
}

// Pods returns the cgroups at or below root that kubelets keep their pods in:
// kubepods or kubepods.slice, also below another root of the kubelet's. The
// error wraps ErrUnknown if there is none, or if no process is in any: a node
// on cgroup v1 may have such a cgroup in v2 too, and its processes elsewhere.
func Pods(root string) ([]Cgroup, error) {
	var found []Cgroup
	inUse := false
	level := []string{root}
	for range maxDepth + 1 {
		var next []string
		for _, dir := range level {
			entries, err := os.ReadDir(dir)
			if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
				continue // gone since
			}
			if err != nil {
				return nil, fmt.Errorf("list cgroups: %w", err)
			}
			for _, e := range entries {
				path := filepath.Join(dir, e.Name())
				if !e.IsDir() {
					continue
				}
				if !isPods(e.Name()) {
					next = append(next, path)
					continue
				}
				c, err := Get(path)
				if err != nil {
					continue // gone since
				}
				found = append(found, c)
				inUse = inUse || populated(path)
			}
		}
		level = next
	}
	switch {
	case len(found) == 0:
		return nil, fmt.Errorf("there is no cgroup kubepods or kubepods.slice in cgroup v2 below %s: %w", root, ErrUnknown)
	case len(found) > MaxPods:
		return nil, fmt.Errorf("there are %d cgroups kubepods or kubepods.slice below %s, more than %d: %w", len(found), root, MaxPods, ErrUnknown)
	case !inUse:
		return nil, fmt.Errorf("no process is in cgroup %s, pods' processes may be in cgroup v1 alone: %w", found[0].Path, ErrUnknown)
	}
	return found, nil
}

// isPods says whether a kubelet names the cgroup of all its pods so. With the
// systemd driver the name begins with those of the slices above it.
func isPods(name string) bool {
	return name == "kubepods" || name == "kubepods.slice" || strings.HasSuffix(name, "-kubepods.slice")
}

// populated says whether a process is in the cgroup at path or below it.
func populated(path string) bool {
	b, err := os.ReadFile(filepath.Join(path, "cgroup.events"))
	return err == nil && strings.Contains(string(b), "populated 1")
}
