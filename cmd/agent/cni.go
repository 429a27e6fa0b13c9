package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/sluicemesh/sluice/pkg/podwatch"
	"github.com/sluicemesh/sluice/pkg/podwatch/cniapi"
	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/pkg/redirect/netns"
)

var _ cniapi.Handler = (*agent)(nil)

// Add implements cniapi.Handler: it returns once the pod's traffic is
// redirected and its sidecar can get its configuration.
func (a *agent) Add(ctx context.Context, at cniapi.Attachment) error {
	if slices.Contains(a.planner.excluded, at.PodNamespace) {
		return nil
	}
	// For work there is as much time as it needs. What is not known yet is told soon:
	// the kubelet shows it, and asks again.
	asking, cancel := context.WithTimeout(ctx, cniapi.ServerBudget)
	defer cancel()
	select {
	case <-a.started:
	case <-asking.Done():
		return errNotRead
	}
	inode, err := netns.Inode(at.Netns)
	if err != nil {
		return fmt.Errorf("sandbox %s of pod %s/%s: %w", at.ContainerID, at.PodNamespace, at.PodName, err)
	}
	userns, err := netns.Userns(at.Netns)
	if err != nil {
		return fmt.Errorf("sandbox %s of pod %s/%s: %w", at.ContainerID, at.PodNamespace, at.PodName, err)
	}
	// The source may learn of the pod a moment after the runtime.
	pod, err := a.store.WaitPod(asking, at.PodNamespace, at.PodName, at.PodUID)
	if err != nil {
		return err
	}
	// So may it of the namespace, which may ask for redirection on the pod's behalf.
	if a.planner.namespaces {
		if err := a.store.WaitNamespace(asking, at.PodNamespace); err != nil {
			return fmt.Errorf("add pod %s/%s: %w", at.PodNamespace, at.PodName, err)
		}
	}
	return a.inTurn(ctx, at.ContainerID, func() error {
		box, known := a.boxes.byID[at.ContainerID]
		if !known || box.NetnsInode != inode {
			box = sandbox{
				ContainerID: at.ContainerID, Namespace: at.PodNamespace, Name: at.PodName,
				PodUID: at.PodUID, Netns: at.Netns, NetnsInode: inode, Userns: userns,
			}
			if box.PodUID == "" {
				box.PodUID = cmp.Or(pod.RuntimeUID, pod.UID)
			}
		}
		// A copy: the map of the sandbox as it is known must not change with it.
		attachments := map[string]attachment{}
		maps.Copy(attachments, box.Attachments)
		attachments[at.IfName] = attachment{Network: at.Network, Interfaces: at.Interfaces}
		box.Attachments = attachments
		if err := a.boxes.put(box); err != nil {
			return err
		}
		if err := a.bring(ctx, box, time.Now(), survey{}); err != nil {
			// The runtime tears a sandbox down after a failed ADD; until then
			// nothing half-made may stay.
			a.forget(context.WithoutCancel(ctx), box)
			return err
		}
		addrs, _ := box.network()
		a.setPodAddrs(box.Namespace, box.Name, addrs)
		return nil
	})
}

// inTurn runs f under the agent's lock when it is the sandbox's turn.
func (a *agent) inTurn(ctx context.Context, containerID string, f func() error) error {
	return a.call(ctx, func() error {
		end, err := a.turn(ctx, containerID)
		if err != nil {
			return err
		}
		defer end()
		return f()
	})
}

// Del implements cniapi.Handler. The pod goes whether or not the plugin still waits:
// what is begun is finished, or it would be left until the next check.
func (a *agent) Del(ctx context.Context, at cniapi.Attachment) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cniapi.ServerWorkBudget)
	defer cancel()
	return a.inTurn(ctx, at.ContainerID, func() error { return a.detach(ctx, at.AttachmentID) })
}

// detach forgets one attachment, in its sandbox's turn, and with the last one the
// sandbox.
func (a *agent) detach(ctx context.Context, id cniapi.AttachmentID) error {
	box, known := a.boxes.byID[id.ContainerID]
	if !known {
		return nil
	}
	attachments := map[string]attachment{}
	maps.Copy(attachments, box.Attachments)
	delete(attachments, id.IfName)
	if len(attachments) == 0 {
		a.forget(ctx, box)
		return nil
	}
	box.Attachments = attachments
	if err := a.boxes.put(box); err != nil {
		return err
	}
	return a.bring(ctx, box, time.Now(), survey{})
}

// Check implements cniapi.Handler.
func (a *agent) Check(ctx context.Context, at cniapi.Attachment) error {
	var want *redirect.Workload
	err := a.call(ctx, func() (err error) {
		want, err = a.wanted(at)
		return err
	})
	if err != nil || want == nil {
		return err
	}
	if a.checkInstalled(ctx, at.ContainerID, *want) == nil {
		return nil
	}
	// The pod may have been changed meanwhile: nothing happens to it in this turn.
	return a.inTurn(ctx, at.ContainerID, func() error {
		want, err := a.wanted(at)
		if err != nil || want == nil {
			return err
		}
		return a.outside(func() error { return a.checkInstalled(ctx, at.ContainerID, *want) })
	})
}

// wanted returns what is to be installed for an attachment, nil if nothing.
func (a *agent) wanted(at cniapi.Attachment) (*redirect.Workload, error) {
	if slices.Contains(a.planner.excluded, at.PodNamespace) {
		return nil, nil
	}
	// Before that nothing is known of what sandboxes are to have.
	if !a.ready() {
		return nil, errNotRead
	}
	box, known := a.boxes.byID[at.ContainerID]
	if !known {
		// One that is older than the agent is its business only if it is to be redirected.
		if pod, there := get[*podwatch.Pod](a.store, podwatch.Key{Kind: podwatch.KindPod, Namespace: at.PodNamespace, Name: at.PodName}); there {
			if on, err := a.planner.enabled(a.store, pod); err == nil && !on {
				return nil, nil
			}
		}
		return nil, fmt.Errorf("sandbox %s of pod %s/%s is not known to the agent: it was not added, or was deleted", at.ContainerID, at.PodNamespace, at.PodName)
	}
	state := a.pods[at.ContainerID]
	if state == nil || state.workload == nil {
		if said := a.saidOf("pod " + box.Namespace + "/" + box.Name); said != "" {
			return nil, errors.New(said)
		}
		return nil, nil // not to be redirected
	}
	return state.workload, nil
}

// checkInstalled is an error unless the kernel has all of want.
func (a *agent) checkInstalled(ctx context.Context, containerID string, want redirect.Workload) error {
	installed, err := a.redirector.List(ctx)
	if err != nil {
		return fmt.Errorf("list installed workloads: %w", err)
	}
	i := slices.IndexFunc(installed, func(i redirect.Installed) bool { return i.ID == want.ID })
	switch {
	case i < 0:
		return fmt.Errorf("pod %s is not redirected: sandbox %s has no redirection in the kernel", want.Pod, containerID)
	case installed[i].Problem != nil:
		return fmt.Errorf("redirection of pod %s is not whole: %w", want.Pod, installed[i].Problem)
	case installed[i].Digest != want.Digest():
		return fmt.Errorf("redirection of pod %s is not what its annotations ask for", want.Pod)
	}
	return nil
}

// GC implements cniapi.Handler.
func (a *agent) GC(ctx context.Context, network string, valid []cniapi.AttachmentID) error {
	var garbage []cniapi.AttachmentID
	err := a.call(ctx, func() error {
		for _, box := range a.boxes.all() {
			for name, at := range box.Attachments {
				id := cniapi.AttachmentID{ContainerID: box.ContainerID, IfName: name}
				if at.Network == network && !slices.Contains(valid, id) {
					garbage = append(garbage, id)
				}
			}
		}
		return nil
	})
	errs := []error{err}
	for _, id := range garbage {
		errs = append(errs, a.inTurn(ctx, id.ContainerID, func() error { return a.detach(ctx, id) }))
	}
	return errors.Join(errs...)
}

// Status implements cniapi.Handler: an error is that the agent could not add a pod.
// The runtime makes the node NotReady then, so an API server that is away is none:
// no pod can come meanwhile, and one that does waits in ADD. A node that is NotReady
// when the API server comes back has all its pods taken out of their Services, and
// its kubelet takes a minute to notice that it is ready again (Kubernetes 1.36).
func (a *agent) Status(context.Context) error {
	if !a.ready() && !a.cutOff() {
		return errNotRead
	}
	return nil
}

var errNotRead = errors.New("the agent has not read its source yet; see /readyz of the agent")
