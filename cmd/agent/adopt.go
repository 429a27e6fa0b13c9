package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/sluicemesh/sluice/pkg/podwatch"
	"github.com/sluicemesh/sluice/pkg/podwatch/cniapi"
	"github.com/sluicemesh/sluice/pkg/podwatch/podnetns"
	"github.com/sluicemesh/sluice/pkg/redirect/netns"
)

// A finder finds the network namespaces of pods, by UID. It may be called on any
// goroutine.
type finder func([]podnetns.Pod) (map[string]podnetns.Result, error)

// findIn looks among the processes that the procfs at proc shows.
func findIn(proc string) finder {
	return func(pods []podnetns.Pod) (map[string]podnetns.Result, error) {
		return podnetns.FindAll(podnetns.Options{Proc: proc, InNetns: netns.Do}, pods)
	}
}

// strays returns the pods that are to be redirected and of which CNI has told
// the agent nothing: they are older than it, or their records are lost. A pod
// that is being added has no address in the source yet. Those that do not say
// clearly what they want are told so.
func (a *agent) strays() []*podwatch.Pod {
	if a.find == nil {
		return nil
	}
	known := map[string]bool{}
	for _, box := range a.boxes.byID {
		known[box.PodUID] = true
	}
	var out []*podwatch.Pod
	for _, pod := range a.store.Pods() {
		if known[pod.RuntimeUID] || len(pod.Addrs) == 0 || pod.Finished {
			continue
		}
		switch on, err := a.planner.enabled(a.store, pod); {
		case failureReason(err) == reasonBadAnnotation:
			a.notAdopted(pod, reasonBadAnnotation, err)
		case err != nil: // its namespace is not known yet
		case on:
			out = append(out, pod)
		default:
			a.problem(objectOf(pod), nil) // it may have had one before
		}
	}
	return out
}

// notAdopted tells, once, why a stray is not redirected.
func (a *agent) notAdopted(pod *podwatch.Pod, reason string, err error) {
	if a.saidOf(objectOf(pod)) == err.Error() {
		return // it is looked for again and again
	}
	a.log.Error("pod is not redirected", "pod", pod.Namespace+"/"+pod.Name, "err", err)
	a.reporter.Event(podwatch.PodRef{Namespace: pod.Namespace, Name: pod.Name, UID: pod.RuntimeUID}, podwatch.EventWarning, reason, inOneLine(err.Error()))
	a.problem(objectOf(pod), err)
}

// objectOf names a pod for problem.
func objectOf(pod *podwatch.Pod) string { return "pod " + pod.Namespace + "/" + pod.Name }

// adopt finds the sandboxes of strays and redirects them, beside the loop as far
// as it takes long. What is not found is looked for again at the next check.
func (a *agent) adopt(ctx context.Context) {
	strays := a.strays()
	if len(strays) == 0 || a.adopting {
		return
	}
	a.adopting = true
	a.background.Go(func() {
		found, err := a.findSandboxes(strays)
		_ = a.call(ctx, func() error { // fails only when ctx has ended
			a.adopting = false
			if err != nil {
				a.log.Error("pods that are older than the agent cannot be looked for", "err", err)
				a.problem("older pods", err)
				return nil
			}
			a.problem("older pods", nil)
			missing := map[string]time.Time{}
			for _, pod := range strays {
				if !errors.Is(found[pod.RuntimeUID].Err, podnetns.ErrNotFound) {
					continue
				}
				missing[pod.RuntimeUID] = time.Now()
				if since, before := a.missing[pod.RuntimeUID]; before {
					missing[pod.RuntimeUID] = since
				}
			}
			a.missing = missing
			for _, pod := range strays {
				a.settle(ctx, pod, found[pod.RuntimeUID])
			}
			return nil
		})
	})
}

func (a *agent) findSandboxes(pods []*podwatch.Pod) (map[string]podnetns.Result, error) {
	wanted := make([]podnetns.Pod, len(pods))
	for i, pod := range pods {
		wanted[i] = podnetns.Pod{UID: pod.RuntimeUID, Addrs: pod.Addrs}
	}
	return a.find(wanted)
}

// missingFor is for how long a pod that is ready may not be found before that is a
// problem: its last process may just end, or the source lag behind.
const missingFor = 2 * healInterval

// settle makes a sandbox of what was found of a pod, as ADD would have.
func (a *agent) settle(ctx context.Context, pod *podwatch.Pod, r podnetns.Result) {
	now, ok := get[*podwatch.Pod](a.store, pod.Key())
	for _, box := range a.boxes.byID {
		ok = ok && box.PodUID != pod.RuntimeUID // ADD was faster
	}
	if !ok || now.UID != pod.UID {
		return
	}
	err := r.Err
	if errors.Is(err, podnetns.ErrNotFound) {
		if since, missing := a.missing[pod.RuntimeUID]; !now.Ready || !missing || time.Since(since) < missingFor {
			return // it has not started, or ends
		}
	}
	var userns uint64
	if err == nil {
		userns, err = netns.Userns(r.Path)
	}
	if err == nil {
		box := sandbox{
			ContainerID: r.SandboxID, Namespace: pod.Namespace, Name: pod.Name, PodUID: pod.RuntimeUID,
			Netns: r.Path, NetnsInode: r.Inode, Userns: userns, Attachments: adoptedAttachments(r.Interfaces),
		}
		if box.ContainerID == "" {
			box.ContainerID = "adopted-" + pod.RuntimeUID
		}
		if err = a.boxes.put(box); err == nil {
			err = a.applyPod(ctx, box.ContainerID, time.Now())
		}
	}
	if err != nil {
		a.notAdopted(pod, reasonFailed, fmt.Errorf("redirect pod %s/%s, which is older than the agent: %w", pod.Namespace, pod.Name, err))
		return
	}
	a.adopted.Add(1)
	a.log.Info("pod that is older than the agent is redirected", "pod", pod.Namespace+"/"+pod.Name, "netns", r.Path)
	a.reporter.Event(podwatch.PodRef{Namespace: pod.Namespace, Name: pod.Name, UID: pod.RuntimeUID}, podwatch.EventNormal, reasonAdopted, "redirected although it started before the agent: new connections lead through the sidecar")
}

// saidOf returns what is wrong with an object, as problem noted it; empty if
// nothing is.
func (a *agent) saidOf(object string) string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.problems[object]
}

// adoptedAttachments are what CNI would have told. DEL will name the interface;
// the network cannot be known, so that GC passes such sandboxes by.
func adoptedAttachments(interfaces []podnetns.Interface) map[string]attachment {
	var at attachment
	for _, i := range interfaces {
		at.Interfaces = append(at.Interfaces, cniapi.Interface{Name: i.Name, Addrs: i.Addrs})
	}
	if len(interfaces) == 0 {
		return nil
	}
	return map[string]attachment{interfaces[0].Name: at}
}
