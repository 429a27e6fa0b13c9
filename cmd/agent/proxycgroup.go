package main

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/sluicemesh/sluice/pkg/podwatch"
	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/pkg/redirect/cgroup"
)

// nodeContainers are the cgroups of the containers of this node, in the hierarchy
// of v2 that is mounted at root (empty: found), and their processes, which the
// procfs at proc shows.
type nodeContainers struct{ root, proc string }

// A proxyContainer is the container of a pod's sidecar.
type proxyContainer struct {
	id     string // the runtime's
	cgroup string // a path below the root of the hierarchy, empty: not found
}

func (n nodeContainers) dir() (string, error) {
	if n.root != "" {
		return n.root, nil
	}
	return cgroup.Root()
}

// find returns the cgroup of a container, "" if there is none or none can be known.
func (n nodeContainers) find(podUID, id string) (string, error) {
	root, err := n.dir()
	if err != nil {
		return "", err
	}
	return cgroup.Container(root, podUID, id)
}

// has says whether the cgroup is there. One that has gone never returns under the
// same path: it carries the container's ID.
func (n nodeContainers) has(path string) bool {
	root, err := n.dir()
	if err != nil {
		return false
	}
	_, err = os.Stat(filepath.Join(root, path))
	return err == nil
}

// proxyCgroup returns the cgroup of the container of a sandbox's sidecar, "" while
// it is not known. Then the user alone tells the proxy: the status that names the
// container comes a moment after it has started, later if the API server is away,
// and until then a proxy that is nobody could not start.
func (a *agent) proxyCgroup(box sandbox, state *podState) string {
	now := proxyContainer{id: proxyRuntimeID(state.pod)}
	switch {
	case now.id == "":
	case now.id == state.proxy.id && state.proxy.cgroup != "" && a.containers.has(state.proxy.cgroup):
		now = state.proxy
	default:
		_ = a.outside(func() (err error) {
			now.cgroup, err = a.containers.find(box.PodUID, now.id)
			if err != nil && !errors.Is(err, cgroup.ErrUnknown) && !errors.Is(err, redirect.ErrNotSupported) {
				a.log.Warn("the sidecar's container cannot be found, its user alone tells it", "pod", box.Namespace+"/"+box.Name, "err", err)
			}
			return nil
		})
	}
	state.proxy = now
	a.mu.Lock()
	a.proxyCgroups[box.id().String()] = now.cgroup
	a.mu.Unlock()
	return now.cgroup
}

// proxyRuntimeID returns the ID of the running container of the pod's proxy, "" if
// the pod's status does not name it.
func proxyRuntimeID(pod *podwatch.Pod) string {
	i := slices.IndexFunc(pod.Containers, func(c podwatch.Container) bool { return isProxyName(c.Name) })
	if i < 0 {
		return ""
	}
	return pod.Containers[i].RuntimeID
}

// isProxy says whether the process that opened a connection to the xDS socket of
// a sandbox is in the container of its sidecar, as far as that is known. It may be
// called on any goroutine.
func (a *agent) isProxy(id string, c syscall.Conn) bool {
	a.mu.Lock()
	path := a.proxyCgroups[id]
	a.mu.Unlock()
	if path == "" {
		return true
	}
	in, err := cgroup.PeerIn(c, a.containers.proc, path)
	switch {
	case errors.Is(err, cgroup.ErrUnknown):
		return true // a kernel before 6.5: its user is all that there is
	case err != nil:
		a.log.Warn("who asks for a sidecar's configuration cannot be told", "sandbox", id, "err", err)
	}
	return in
}
