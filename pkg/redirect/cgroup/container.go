package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// podDepth is how many levels below kubepods a pod's cgroup may lie: beside the
// pods there is one cgroup for each class of service.
const podDepth = 2

// Container returns the cgroup of a pod's container as a path below root, "" if
// it has none: it is not there yet, or has ended. The layout is the kubelet's,
//
//	kubepods/[burstable/]pod<uid>/<id>
//	kubepods.slice/[kubepods-burstable.slice/]kubepods-burstable-pod<uid>.slice/<runtime>-<id>.scope
//
// The error wraps ErrUnknown where Pods says so.
func Container(root, podUID, id string) (string, error) {
	if podUID == "" || id == "" {
		return "", nil
	}
	pods, err := Pods(root)
	if err != nil {
		return "", err
	}
	for _, p := range pods {
		path, err := below(p.Path, podUID, id, podDepth)
		if err != nil || path == "" {
			if err != nil {
				return "", err
			}
			continue
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return "", fmt.Errorf("find cgroup of container %s: %w", id, err)
		}
		return "/" + rel, nil
	}
	return "", nil
}

// below looks for the container at most depth levels below dir.
func below(dir, podUID, id string, depth int) (string, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return "", nil // gone since
	}
	if err != nil {
		return "", fmt.Errorf("list cgroups: %w", err)
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		switch {
		case !e.IsDir():
			continue
		case isPod(e.Name(), podUID):
			return containerIn(path, id)
		case depth > 1 && !isPod(e.Name(), ""):
			if found, err := below(path, podUID, id, depth-1); err != nil || found != "" {
				return found, err
			}
		}
	}
	return "", nil
}

// isPod says whether a kubelet names the cgroup of the pod so; of any pod if uid
// is empty.
func isPod(name, uid string) bool {
	if slice, ok := strings.CutSuffix(name, ".slice"); ok {
		_, found, ok := strings.Cut(slice, "-pod")
		return ok && (uid == "" || found == strings.ReplaceAll(uid, "-", "_"))
	}
	found, ok := strings.CutPrefix(name, "pod")
	return ok && (uid == "" || found == uid)
}

func containerIn(pod, id string) (string, error) {
	entries, err := os.ReadDir(pod)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return "", nil // gone since
	}
	if err != nil {
		return "", fmt.Errorf("list cgroups: %w", err)
	}
	for _, e := range entries {
		name := e.Name()
		if scope, ok := strings.CutSuffix(name, ".scope"); ok {
			name = scope[strings.LastIndexByte(scope, '-')+1:]
		}
		if e.IsDir() && name == id {
			return filepath.Join(pod, e.Name()), nil
		}
	}
	return "", nil
}
