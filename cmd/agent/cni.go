package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

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
	select {
	case <-a.started:
	case <-ctx.Done():
		return errors.New("the agent has not read its source yet; see /readyz of the agent")
	}
	inode, err := netns.Inode(at.Netns)
	if err != nil {
		return fmt.Errorf("sandbox %s of pod %s/%s: %w", at.ContainerID, at.PodNamespace, at.PodName, err)
	}
	// The source may learn of the pod a moment after the runtime.
	pod, err := a.store.WaitPod(ctx, at.PodNamespace, at.PodName)
	if err != nil {
		return err
	}
	return a.call(ctx, func() error {
		box, known := a.boxes.byID[at.ContainerID]
		if !known || box.NetnsInode != inode {
			box = sandbox{
				ContainerID: at.ContainerID, Namespace: at.PodNamespace, Name: at.PodName,
				PodUID: at.PodUID, Netns: at.Netns, NetnsInode: inode,
			}
			if box.PodUID == "" {
				box.PodUID = pod.UID
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
		if err := a.applyPod(ctx, box, time.Now()); err != nil {
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

// Del implements cniapi.Handler.
func (a *agent) Del(ctx context.Context, at cniapi.Attachment) error {
	return a.call(ctx, func() error { return a.detach(ctx, at.AttachmentID) })
}

// detach forgets one attachment, and with its last one the sandbox.
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
	return a.applyPod(ctx, box, time.Now())
}

// Check implements cniapi.Handler.
func (a *agent) Check(ctx context.Context, at cniapi.Attachment) error {
	var want *redirect.Workload
	err := a.call(ctx, func() (err error) {
		want, err = a.wanted(ctx, at)
		return err
	})
	if err != nil || want == nil {
		return err
	}
	if a.checkInstalled(ctx, at.ContainerID, *want) == nil {
		return nil
	}
	// The pod may have been changed meanwhile: nothing else happens while the
	// loop looks.
	return a.call(ctx, func() error {
		want, err := a.wanted(ctx, at)
		if err != nil || want == nil {
			return err
		}
		return a.checkInstalled(ctx, at.ContainerID, *want)
	})
}

// wanted returns what is to be installed for an attachment, nil if nothing.
func (a *agent) wanted(ctx context.Context, at cniapi.Attachment) (*redirect.Workload, error) {
	if slices.Contains(a.planner.excluded, at.PodNamespace) {
		return nil, nil
	}
	// Before that nothing is known of what sandboxes are to have.
	if err := a.Status(ctx); err != nil {
		return nil, err
	}
	box, known := a.boxes.byID[at.ContainerID]
	if !known {
		return nil, fmt.Errorf("sandbox %s of pod %s/%s is not known to the agent: it was not added, or was deleted", at.ContainerID, at.PodNamespace, at.PodName)
	}
	state := a.pods[at.ContainerID]
	if state == nil || state.workload == nil {
		if _, problems := a.report(); problems["pod "+box.Namespace+"/"+box.Name] != "" {
			return nil, errors.New(problems["pod "+box.Namespace+"/"+box.Name])
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
	return a.call(ctx, func() error {
		var errs []error
		for _, box := range a.boxes.all() {
			for name, at := range box.Attachments {
				id := cniapi.AttachmentID{ContainerID: box.ContainerID, IfName: name}
				if at.Network == network && !slices.Contains(valid, id) {
					errs = append(errs, a.detach(ctx, id))
				}
			}
		}
		return errors.Join(errs...)
	})
}

// Status implements cniapi.Handler.
func (a *agent) Status(context.Context) error {
	if !a.ready() {
		return errors.New("the agent has not read its source yet; see /readyz of the agent")
	}
	return nil
}
