package podnetns

import (
	"bytes"
	"strings"
)

// A place is where a process is, as far as its cgroup tells.
type place struct {
	pod       string // UID of the pod, with dashes if it is a UUID
	container string // ID of the container, empty if it is in none
}

// placeOf reads the content of a /proc/PID/cgroup. The outermost cgroup of a pod
// counts: what a container makes below its own is its affair and may have any
// name. A reader in a cgroup namespace of its own sees paths that begin with
// "/..", which is no hindrance.
func placeOf(content []byte) (place, bool) {
	for line := range bytes.Lines(content) {
		// number:controllers:path; the path may hold colons.
		_, rest, _ := bytes.Cut(line, []byte(":"))
		_, path, ok := bytes.Cut(rest, []byte(":"))
		if !ok || !bytes.Contains(path, []byte("pod")) {
			continue
		}
		parts := strings.Split(strings.TrimSuffix(string(path), "\n"), "/")
		for i, part := range parts {
			uid, ok := podUID(part)
			if !ok {
				continue
			}
			p := place{pod: uid}
			if i+1 < len(parts) {
				p.container = containerID(parts[i+1])
			}
			return p, true
		}
	}
	return place{}, false
}

// podUID reads the name of a pod's cgroup: pod<uid>, or with the driver systemd
// kubepods-<class>-pod<uid>.slice, where dashes of the UID are underscores.
func podUID(name string) (string, bool) {
	name, slice := strings.CutSuffix(name, ".slice")
	uid, ok := strings.CutPrefix(name, "pod")
	if slice {
		i := strings.LastIndex(name, "-pod")
		if i < 0 {
			return "", false
		}
		uid, ok = strings.ReplaceAll(name[i+len("-pod"):], "_", "-"), true
	}
	return uid, ok && isUID(uid)
}

// isUID: a UUID, or for a static pod 32 hexadecimal digits.
func isUID(s string) bool {
	switch len(s) {
	case 32:
		return isHex(s)
	case 36:
		for i, c := range []byte(s) {
			if dash := i == 8 || i == 13 || i == 18 || i == 23; dash != (c == '-') || !dash && !isHex(s[i:i+1]) {
				return false
			}
		}
		return true
	}
	return false
}

// containerID reads the name of a container's cgroup: the ID itself, or with the
// driver systemd <runtime>-<id>.scope.
func containerID(name string) string {
	name = strings.TrimSuffix(name, ".scope")
	name = name[strings.LastIndexByte(name, '-')+1:]
	if len(name) == 64 && isHex(name) {
		return name
	}
	return ""
}

func isHex(s string) bool {
	for _, c := range []byte(s) {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}
