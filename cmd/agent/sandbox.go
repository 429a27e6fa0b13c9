package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/pkg/podwatch/cniapi"
	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/pkg/redirect/netns"
)

// A sandbox is what CNI told of one pod on this node: which network namespace
// it has and which addresses. The runtime tells it once, so it is kept on disk
// from the answer to ADD until DEL, GC or the end of the namespace.
type sandbox struct {
	ContainerID string `json:"containerID"`
	Namespace   string `json:"namespace"`
	Name        string `json:"name"`
	PodUID      string `json:"podUID"`
	Netns       string `json:"netns"`
	NetnsInode  uint64 `json:"netnsInode"`
	// Userns is the inode of the user namespace that the network namespace
	// belongs to, 0 if that is the node's own.
	Userns uint64 `json:"userns,omitempty"`
	// Attachments are the CNI attachments by their IfName: most sandboxes have
	// one, eth0.
	Attachments map[string]attachment `json:"attachments"`
}

// An attachment is what one network gave a sandbox.
type attachment struct {
	// Network is the name of the CNI network: GC speaks of one at a time.
	Network    string             `json:"network"`
	Interfaces []cniapi.Interface `json:"interfaces"`
}

// id is what redirection and the sidecar server know the sandbox by.
func (s sandbox) id() redirect.ID { return redirect.ID{PodUID: s.PodUID, NetnsInode: s.NetnsInode} }

// netnsGone says whether the namespace that path led to has gone. The path may
// lead to another one by now: only the inode tells. One that cannot be looked at
// just now may well live.
func netnsGone(path string, inode uint64) bool {
	now, err := netns.Inode(path)
	return errors.Is(err, redirect.ErrGone) || err == nil && now != inode
}

// network returns the pod's addresses, at most one a family, and the interfaces
// that carry them. They are those of the attachment that sorts first: runtimes
// call the pod's own network eth0, and further ones net1, net2, ...
func (s sandbox) network() (addrs []netip.Addr, interfaces []string) {
	for _, ifName := range slices.Sorted(maps.Keys(s.Attachments)) {
		var have4, have6 bool
		for _, i := range s.Attachments[ifName].Interfaces {
			for _, a := range i.Addrs {
				a = a.Unmap()
				have := &have4
				if a.Is6() {
					have = &have6
				}
				if *have || a.IsLinkLocalUnicast() || a.IsLoopback() {
					continue
				}
				*have = true
				addrs = append(addrs, a)
				if !slices.Contains(interfaces, i.Name) {
					interfaces = append(interfaces, i.Name)
				}
			}
		}
		if len(addrs) > 0 {
			break
		}
	}
	return addrs, interfaces
}

// sandboxes are those of this node, in memory and as one JSON file each in dir.
// Not safe for concurrent use: the agent's loop owns it.
type sandboxes struct {
	dir  string
	byID map[string]sandbox // by container ID
}

// lockState makes this process the one that uses the state directory, until it
// ends or calls unlock. For as long as wait it lets another one end that does.
func lockState(ctx context.Context, dir string, wait time.Duration, log *slog.Logger) (unlock func(), err error) {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open state directory %s: %w", dir, err)
	}
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	retry := time.NewTicker(100 * time.Millisecond)
	defer retry.Stop()
	for waiting := false; ; waiting = true {
		err = unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { _ = unix.Close(fd) }, nil
		}
		if errors.Is(err, unix.EWOULDBLOCK) && ctx.Err() == nil {
			if !waiting {
				log.Info("another sluice-agent uses the state directory: waiting for its end", "dir", dir, "longest", wait)
			}
			select {
			case <-ctx.Done():
			case <-retry.C:
			}
			continue
		}
		_ = unix.Close(fd)
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = errors.New("another sluice-agent is using it, end that first")
		}
		return nil, fmt.Errorf("lock state directory %s: %w", dir, err)
	}
}

// loadSandboxes reads what an earlier agent left in dir, which is made if it is
// absent. Sandboxes whose network namespace is gone are forgotten, as are files
// that cannot be read: they are returned as one error beside the rest.
func loadSandboxes(dir string) (*sandboxes, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make sandbox directory: %w", err)
	}
	s := &sandboxes{dir: dir, byID: map[string]sandbox{}}
	files, err := filepath.Glob(filepath.Join(dir, "*.json"))
	if err != nil {
		return nil, fmt.Errorf("list sandboxes: %w", err)
	}
	var errs []error
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			errs = append(errs, fmt.Errorf("read sandbox: %w", err))
			continue
		}
		var box sandbox
		if err := json.Unmarshal(b, &box); err != nil {
			errs = append(errs, fmt.Errorf("read sandbox %s: %w", file, err), os.Remove(file))
			continue
		}
		if netnsGone(box.Netns, box.NetnsInode) {
			errs = append(errs, os.Remove(file))
			continue
		}
		s.byID[box.ContainerID] = box
	}
	return s, errors.Join(errs...)
}

// put remembers box, on disk first.
func (s *sandboxes) put(box sandbox) error {
	b, err := json.Marshal(box)
	if err != nil {
		return fmt.Errorf("encode sandbox %s: %w", box.ContainerID, err)
	}
	file := s.file(box.ContainerID)
	if err := os.WriteFile(file+".tmp", b, 0o600); err != nil {
		return fmt.Errorf("write sandbox: %w", err)
	}
	if err := os.Rename(file+".tmp", file); err != nil {
		return fmt.Errorf("write sandbox: %w", err)
	}
	s.byID[box.ContainerID] = box
	return nil
}

// forget drops the sandbox; it is no error if there is none.
func (s *sandboxes) forget(containerID string) error {
	delete(s.byID, containerID)
	if err := os.Remove(s.file(containerID)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("forget sandbox: %w", err)
	}
	return nil
}

// all returns the sandboxes sorted by container ID.
func (s *sandboxes) all() []sandbox {
	return slices.SortedFunc(maps.Values(s.byID), func(a, b sandbox) int { return strings.Compare(a.ContainerID, b.ContainerID) })
}

// of returns the sandboxes of a pod: two for a moment when one is made again.
func (s *sandboxes) of(namespace, name string) []sandbox {
	return slices.DeleteFunc(s.all(), func(b sandbox) bool { return b.Namespace != namespace || b.Name != name })
}

func (s *sandboxes) file(containerID string) string {
	return filepath.Join(s.dir, filepath.Base(containerID)+".json")
}

// removeSocket removes the socket that the CNI plugin asks on, which agents
// leave in place when they end. It is no error if there is none.
func removeSocket(path string) error {
	fi, err := os.Lstat(path)
	if err == nil && fi.Mode().Type() != fs.ModeSocket {
		err = errors.New("it is no socket")
	}
	if err == nil {
		err = os.Remove(path)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove CNI socket %s: %w", path, err)
	}
	return nil
}

// removeState removes what agents keep in the state directory, and the
// directory itself when nothing else is left in it.
func removeState(stateDir string) error {
	if err := os.RemoveAll(filepath.Join(stateDir, "sandboxes")); err != nil {
		return fmt.Errorf("remove sandboxes: %w", err)
	}
	left, err := os.ReadDir(stateDir)
	if errors.Is(err, fs.ErrNotExist) || err == nil && len(left) > 0 {
		return nil
	}
	if err == nil {
		err = os.Remove(stateDir)
	}
	if errors.Is(err, unix.EBUSY) {
		return nil // it is mounted into this container, and stays with who mounted it
	}
	return err
}
