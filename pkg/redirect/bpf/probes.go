package bpf

import (
	"errors"
	"fmt"
	"sync"

	"github.com/cilium/ebpf"

	"github.com/sluicemesh/sluice/pkg/redirect/cgroup"
	"github.com/sluicemesh/sluice/pkg/redirect/netns"
)

// ownNetns is the namespace of an agent on the node's network, which is the
// node's.
const ownNetns = "/proc/self/ns/net"

// allKnown is the key in pod_cgroups without which no process is exempt.
const allKnown uint64 = 0

// podCgroups is what this process knows of the cgroups of pods.
type podCgroups struct {
	mu    sync.Mutex
	found []cgroup.Cgroup
	// told is what was last logged, so that it is logged once.
	told string
}

// hostCookie returns the cookie of the node's namespace at path, its own if
// path is empty.
func hostCookie(path string) (uint64, error) {
	if path == "" {
		path = ownNetns
	}
	cookie, err := netns.Cookie(path)
	if err != nil {
		return 0, fmt.Errorf("find the node's network namespace: %w", err)
	}
	return cookie, nil
}

// knowPods tells the connect hook of the node which cgroups pods live below.
// While that is not known no process is exempt, and the log says why. With
// thorough unset it looks at nothing but whether those found before are still
// there: kubelets make them once, before the first pod.
func (r *Redirector) knowPods(thorough bool) error {
	p := &r.podCgroups
	p.mu.Lock()
	defer p.mu.Unlock()
	if !thorough && p.current() {
		return nil
	}
	root, err := r.root()
	if err != nil {
		return err
	}
	found, err := cgroup.Pods(root)
	if err != nil && !errors.Is(err, cgroup.ErrUnknown) {
		return err
	}
	p.found = found
	told := "exempt"
	if err != nil {
		told = err.Error()
	}
	if told != p.told {
		p.told = told
		if err != nil {
			r.log.Warn("probes of the kubelet are captured like any other connection", "reason", err)
		} else {
			r.log.Info("processes of the node outside of pods are exempt", "pods", found[0].Path)
		}
	}
	return r.store.setPodCgroups(found)
}

// current says whether the cgroups found last are still those at their paths.
func (p *podCgroups) current() bool {
	for _, c := range p.found {
		if now, err := cgroup.Get(c.Path); err != nil || now != c {
			return false
		}
	}
	return len(p.found) > 0
}

// setPodCgroups makes pod_cgroups hold exactly those; none means unknown. At
// no moment it says of less than all of them that they are all.
func (s *store) setPodCgroups(found []cgroup.Cgroup) error {
	want := make(map[uint64]bool)
	for _, c := range found {
		want[c.ID] = true
	}
	var id uint64
	var one uint32
	have := make(map[uint64]bool)
	it := s.PodCgroups.Iterate()
	for it.Next(&id, &one) {
		have[id] = true
	}
	if err := it.Err(); err != nil {
		return fmt.Errorf("read map %s: %w", redirectMapPodCgroups, err)
	}
	if len(want) == 0 && have[allKnown] {
		if err := deleteKey(s.PodCgroups, allKnown); err != nil {
			return err
		}
	}
	one = 1
	for id := range want {
		if have[id] {
			continue
		}
		if err := write(s.PodCgroups, redirectMapPodCgroups, id, one, ebpf.UpdateAny); err != nil {
			return errors.Join(err, deleteKey(s.PodCgroups, allKnown))
		}
	}
	for id := range have {
		if id == allKnown || want[id] {
			continue
		}
		if err := deleteKey(s.PodCgroups, id); err != nil {
			return err
		}
	}
	if len(want) == 0 || have[allKnown] {
		return nil
	}
	return write(s.PodCgroups, redirectMapPodCgroups, allKnown, one, ebpf.UpdateAny)
}
