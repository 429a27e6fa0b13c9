package main

import (
	"context"
	"fmt"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/sluicemesh/sluice/pkg/redirect/netns"
)

// linksSettle is for how long changes of interfaces are gathered: one that is made
// and given a name, an address and a bridge is several.
const linksSettle = 100 * time.Millisecond

// watchLinks looks at a pod as soon as one of its interfaces is made anew, which no
// hook is on, until ctx ends. It sees the node's end of a veth: one socket does for
// all pods. What has no such end is found at the next check.
func (a *agent) watchLinks(ctx context.Context) {
	for ctx.Err() == nil {
		if err := a.followLinks(ctx); err != nil {
			a.log.Warn("interfaces that pods get anew are seen at the next check only", "err", err)
			return
		}
		a.soon() // the kernel had more to tell than fits: it may be any pod
	}
}

// followLinks is watchLinks until something was missed.
func (a *agent) followLinks(ctx context.Context) error {
	until, end := context.WithCancel(ctx)
	changes := make(chan netlink.LinkUpdate)
	if err := netlink.LinkSubscribe(changes, until.Done()); err != nil {
		end()
		return fmt.Errorf("follow changes of interfaces: %w", err)
	}
	defer func() {
		end()
		for range changes { // so that the sender ends
		}
	}()
	for u := range changes {
		changed := map[int]time.Time{u.Attrs().NetNsID: time.Now()}
		settled := time.After(linksSettle)
		for more := true; more; {
			select {
			case u, more = <-changes:
				if more {
					changed[u.Attrs().NetNsID] = time.Now()
				}
			case <-settled:
				more = false
			}
		}
		a.lookAt(ctx, changed)
	}
	return nil
}

// lookAt brings the pods in the namespaces with these numbers to what they ask for,
// unless that was done since they changed: each pod's start is a change.
func (a *agent) lookAt(ctx context.Context, changed map[int]time.Time) {
	delete(changed, -1) // an interface without another end

	_ = a.call(ctx, func() error { // fails only when ctx has ended
		boxes := a.boxes.all()
		at := map[string]time.Time{} // by container ID
		_ = a.outside(func() error {
			for _, box := range boxes {
				if n, err := netns.Number(box.Netns); err == nil && !changed[n].IsZero() {
					at[box.ContainerID] = changed[n]
				}
			}
			return nil
		})
		for id, t := range at {
			if state := a.pods[id]; state != nil && state.looked.Before(t) {
				a.applySoon(ctx, id, t)
			}
		}
		return nil
	})
}
