package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/sluicemesh/sluice/pkg/podwatch"
	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/pkg/xds"
	"github.com/sluicemesh/sluice/pkg/xds/server"
)

// healInterval is how long after one comparison of the kernel with what is
// wanted the next begins. All changes are applied at once; this only mends what
// others broke.
const healInterval = 30 * time.Second

// A translator turns plans into xDS resources. *translate.Translator is one.
// Errors come beside the resources that could be made.
type translator interface {
	Base(xds.OutboundPolicy) ([]xds.Resource, error)
	Service(xds.Service) ([]xds.Resource, error)
	Pod(xds.Pod) ([]xds.Resource, error)
}

// A sidecarServer serves the resources to the sidecars. *server.Server is one.
type sidecarServer interface {
	SetShared(owner string, resources []xds.Resource, since time.Time)
	SetPod(pod server.Pod, resources []xds.Resource, since time.Time)
	RemovePod(uid string)
	Open(uid, netnsPath string, proxyUID uint32) error
	ClosePod(uid string) error
	SetReady()
	Status() []server.PodStatus
}

// An agent makes the node do what the source and CNI say. Everything that it
// changes it changes from one goroutine, that of Run: other goroutines hand it
// functions with call.
type agent struct {
	log        *slog.Logger
	store      *podwatch.Store
	planner    planner
	redirector redirect.Redirector
	translator translator
	sidecars   sidecarServer
	// setPodAddrs tells the source which addresses CNI gave a pod.
	setPodAddrs func(namespace, name string, addrs []netip.Addr)

	calls chan func()
	// started is closed once the source was read and all was done about it.
	started chan struct{}

	// Owned by the goroutine of Run.
	boxes *sandboxes
	pods  map[string]*podState // by container ID
	fed   map[podwatch.Key][]podwatch.Key

	mu       sync.Mutex
	problems map[string]string // by object, for /readyz and metrics
	counts   podCounts
}

// A podState is what the agent did for a sandbox.
type podState struct {
	pod      *podwatch.Pod // as last seen: a pod may be deleted before its sandbox is
	services []podwatch.Key
	workload *redirect.Workload // nil while the pod is not redirected
}

type podCounts struct{ redirected, untouched, failed int }

// Run brings the node to what the source says once the source has been read,
// and then follows every change, until ctx ends. It leaves the traffic as it is.
func (a *agent) Run(ctx context.Context) error {
	heal := time.NewTimer(healInterval)
	defer heal.Stop()
	surveyed := make(chan survey)
	changed := make(chan podwatch.Batch)
	synced := a.store.Synced()
	var others sync.WaitGroup
	defer others.Wait() // they end with ctx
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-synced:
			synced = nil
			if err := a.start(ctx); err != nil {
				return err
			}
			others.Go(func() { a.watch(ctx, changed) })
		case b := <-changed:
			a.apply(ctx, b.Keys, b.Since)
		case f := <-a.calls:
			f()
		case <-heal.C:
			if !a.ready() {
				heal.Reset(healInterval)
				continue
			}
			// Not here: with many pods it takes long, and ADD must not wait.
			others.Go(func() {
				select {
				case surveyed <- a.survey(ctx):
				case <-ctx.Done():
				}
			})
		case s := <-surveyed:
			a.heal(ctx, s)
			heal.Reset(healInterval)
		}
	}
}

// watch hands on what changed in the source until ctx ends.
func (a *agent) watch(ctx context.Context, changed chan<- podwatch.Batch) {
	for {
		b, err := a.store.Wait(ctx)
		if err != nil {
			return // ctx has ended
		}
		select {
		case changed <- b:
		case <-ctx.Done():
			return
		}
	}
}

func (a *agent) ready() bool {
	select {
	case <-a.started:
		return true
	default:
		return false
	}
}

// call runs f on the goroutine of Run and returns its error.
func (a *agent) call(ctx context.Context, f func() error) error {
	done := make(chan error, 1)
	select {
	case a.calls <- func() { done <- f() }:
	case <-ctx.Done():
		return fmt.Errorf("wait for the agent's loop: %w", ctx.Err())
	}
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("wait for the agent's loop: %w", ctx.Err())
	}
}

// start does all there is to do after the source was read for the first time.
// The sidecars get their configuration first: traffic is led only to listeners
// that are there.
func (a *agent) start(ctx context.Context) error {
	now := time.Now()
	for _, p := range []xds.OutboundPolicy{xds.OutboundPassthrough, xds.OutboundBlock} {
		resources, err := a.translator.Base(p)
		if err != nil {
			return fmt.Errorf("translate what all sidecars share: %w", err)
		}
		a.sidecars.SetShared(baseOwner(p), resources, now)
	}
	var keys []podwatch.Key
	for _, s := range a.store.Services() {
		keys = append(keys, s.Key())
	}
	for _, r := range a.store.Routes() {
		a.remember(r.Key())
	}
	a.applyServices(keys, now)
	a.heal(ctx, a.survey(ctx))
	a.sidecars.SetReady()
	close(a.started)
	a.log.Info("node is in the desired state", "services", len(keys), "sandboxes", len(a.boxes.byID))
	return nil
}

// A survey is what was installed a moment ago.
type survey struct {
	installed []redirect.Installed
	err       error // some of it could not be read
}

// survey may be called on any goroutine. It ends in time for the next one, even
// if a program that it runs hangs.
func (a *agent) survey(ctx context.Context) survey {
	ctx, cancel := context.WithTimeout(ctx, healInterval)
	defer cancel()
	installed, err := a.redirector.List(ctx)
	if err != nil {
		err = fmt.Errorf("list installed workloads: %w", err)
	}
	return survey{installed, err}
}

// whole says whether the survey has found w with nothing missing.
func (s survey) whole(w redirect.Workload) bool {
	return slices.ContainsFunc(s.installed, func(i redirect.Installed) bool { return i.Whole(w) })
}

// heal brings every sandbox of the node, and nothing else, to be redirected as
// wanted, whatever s says that the kernel has. What an earlier agent installed
// for a pod stays while it cannot be told what the pod wants: else a bad
// annotation and a restart would lead the pod's traffic past its proxy.
func (a *agent) heal(ctx context.Context, s survey) {
	var keep []redirect.ID
	for _, box := range a.boxes.all() {
		if netnsGone(box.Netns, box.NetnsInode) {
			a.forget(ctx, box)
			continue
		}
		if err := a.bring(ctx, box, time.Now(), s); err != nil {
			a.log.Error("pod is not redirected as its source says", "pod", box.Namespace+"/"+box.Name, "err", err)
			keep = append(keep, box.id())
		}
	}
	orphans, err := a.orphans(s.installed)
	keep = append(keep, orphans...)
	a.problem("sandboxes", err)
	var want []redirect.Workload
	for _, s := range a.pods {
		if s.workload != nil {
			want = append(want, *s.workload)
		}
	}
	if err := errors.Join(s.err, redirect.Reconcile(ctx, a.redirector, s.installed, want, keep)); err != nil {
		a.log.Error("redirection differs from what is wanted", "err", err)
		a.problem("redirection", err)
		return
	}
	a.problem("redirection", nil)
}

// orphans returns the workloads that are installed in namespaces that live and
// of which no sandbox is known, and an error that names them: their records
// were lost, with the state directory for example. They stay as they are, for
// without redirection their traffic would go past their proxies.
func (a *agent) orphans(installed []redirect.Installed) (ids []redirect.ID, err error) {
	known := map[redirect.ID]bool{}
	for _, box := range a.boxes.byID {
		known[box.id()] = true
	}
	for _, i := range installed {
		if known[i.ID] || netnsGone(i.Netns, i.ID.NetnsInode) {
			continue // it is looked after, or taken away
		}
		ids = append(ids, i.ID)
		err = errors.Join(err, fmt.Errorf("pod %s is redirected, but the record of its sandbox is lost: it stays as it is, follows no change, and is whole again once it is deleted and made anew", i.Pod))
	}
	return ids, err
}

// apply does what the changed objects ask for, and no more.
func (a *agent) apply(ctx context.Context, keys []podwatch.Key, since time.Time) {
	services := map[podwatch.Key]bool{}
	boxes := map[string]sandbox{}
	for _, key := range keys {
		for _, s := range a.remember(key) {
			services[s] = true
		}
		for _, box := range a.concerned(key) {
			boxes[box.ContainerID] = box
		}
	}
	var dirty []podwatch.Key
	for key := range services {
		dirty = append(dirty, key)
	}
	a.applyServices(dirty, since)
	for _, box := range boxes {
		if err := a.applyPod(ctx, box, since); err != nil {
			a.log.Error("pod is not redirected as its source says", "pod", box.Namespace+"/"+box.Name, "err", err)
		}
	}
}

// remember returns the services that an object feeds or fed before its change.
func (a *agent) remember(key podwatch.Key) []podwatch.Key {
	before, now := a.fed[key], feeds(a.store, key)
	if _, exists := a.store.Get(key); exists {
		a.fed[key] = now
	} else {
		delete(a.fed, key)
	}
	return append(slices.Clone(before), now...)
}

// concerned returns the sandboxes whose plan depends on an object.
func (a *agent) concerned(key podwatch.Key) []sandbox {
	switch key.Kind {
	case podwatch.KindPod:
		return a.boxes.of(key.Namespace, key.Name)
	case podwatch.KindNamespace:
		return slices.DeleteFunc(a.boxes.all(), func(b sandbox) bool { return b.Namespace != key.Name })
	case podwatch.KindService: // it may decide the protocol of an inbound port
		return slices.DeleteFunc(a.boxes.all(), func(b sandbox) bool {
			s := a.pods[b.ContainerID]
			return s == nil || b.Namespace != key.Namespace || !slices.Contains(s.services, key) && !slices.Contains(a.selecting(s.pod), key)
		})
	}
	return nil
}

// selecting returns the services whose selector matches the pod, none for nil.
func (a *agent) selecting(pod *podwatch.Pod) (keys []podwatch.Key) {
	if pod == nil {
		return nil
	}
	for _, s := range a.store.ServicesSelecting(pod) {
		keys = append(keys, s.Key())
	}
	return keys
}

// applyServices sends the sidecars what they need to know of services that
// changed or went. What could be translated of a service takes effect.
func (a *agent) applyServices(keys []podwatch.Key, since time.Time) {
	for _, key := range keys {
		var resources []xds.Resource
		var err error
		if svc, ok := get[*podwatch.Service](a.store, key); ok {
			if model, ok := a.planner.service(a.store, svc); ok {
				resources, err = a.translator.Service(model)
			}
		}
		object := "service " + key.Namespace + "/" + key.Name
		if err != nil {
			a.log.Error("part of a service cannot be served", "service", key.Namespace+"/"+key.Name, "err", err)
		}
		a.problem(object, err)
		a.sidecars.SetShared("service/"+key.Namespace+"/"+key.Name, resources, since)
	}
}

// applyPod brings one sandbox to what its pod asks for: first the sidecar's
// configuration and socket, then redirection. On an error with what the pod
// asks for, what was in place before stays.
func (a *agent) applyPod(ctx context.Context, box sandbox, since time.Time) error {
	return a.bring(ctx, box, since, survey{})
}

// bring is applyPod for who knows already what is installed.
func (a *agent) bring(ctx context.Context, box sandbox, since time.Time, s survey) (err error) {
	object := "pod " + box.Namespace + "/" + box.Name
	var partly error // is reported, but keeps no pod from starting
	defer func() { a.problem(object, errors.Join(err, partly)); a.count() }()

	state := a.pods[box.ContainerID]
	if state == nil {
		state = &podState{}
		a.pods[box.ContainerID] = state
	}
	if pod, ok := get[*podwatch.Pod](a.store, podwatch.Key{Kind: podwatch.KindPod, Namespace: box.Namespace, Name: box.Name}); ok {
		state.pod = pod
	}
	if state.pod == nil {
		return fmt.Errorf("pod %s/%s is not in the source", box.Namespace, box.Name)
	}
	state.services = a.selecting(state.pod)
	on, err := a.planner.enabled(a.store, state.pod)
	if err != nil {
		return err
	}
	if !on {
		return a.release(ctx, box)
	}
	workload, err := a.planner.workload(state.pod, box)
	if err != nil {
		return err
	}
	sidecar, err := a.planner.sidecar(a.store, state.pod, box)
	if err != nil {
		return err
	}
	sidecar.UID = workload.ID.String() // a pod's sandbox may be made again while the old one still ends
	// What could be translated takes effect; nothing at all is not served.
	var resources []xds.Resource
	if resources, partly = a.translator.Pod(sidecar); len(resources) == 0 && partly != nil {
		err, partly = fmt.Errorf("translate pod %s: %w", workload.Pod, partly), nil
		return err
	}
	a.sidecars.SetPod(server.Pod{
		UID: sidecar.UID, Namespace: sidecar.Namespace, Name: sidecar.Name, Base: baseOwner(sidecar.OutboundPolicy),
	}, resources, since)
	if err := a.sidecars.Open(sidecar.UID, box.Netns, workload.Policy.ProxyUID); err != nil {
		return fmt.Errorf("open xDS socket of pod %s: %w", workload.Pod, err)
	}
	// A survey does not tell which backend has the pod: once in the agent's life
	// that must be looked at.
	if state.workload != nil && s.whole(workload) {
		return nil
	}
	// From here on the pod's traffic is affected.
	if err := a.redirector.Add(ctx, workload); err != nil {
		return fmt.Errorf("redirect pod %s: %w", workload.Pod, err)
	}
	if state.workload == nil {
		a.log.Info("pod is redirected", "pod", workload.Pod, "pod_uid", box.PodUID, "netns", box.NetnsInode)
	}
	state.workload = &workload
	return nil
}

// release ends all that was done for a sandbox, redirection first.
func (a *agent) release(ctx context.Context, box sandbox) error {
	id := box.id()
	if err := a.redirector.Remove(ctx, id); err != nil {
		return fmt.Errorf("end redirection of pod %s/%s: %w", box.Namespace, box.Name, err)
	}
	if s := a.pods[box.ContainerID]; s != nil && s.workload != nil {
		s.workload = nil
		a.log.Info("pod is no longer redirected", "pod", box.Namespace+"/"+box.Name, "pod_uid", box.PodUID, "netns", box.NetnsInode)
	}
	err := a.sidecars.ClosePod(id.String())
	a.sidecars.RemovePod(id.String())
	if err != nil {
		return fmt.Errorf("close xDS socket of pod %s/%s: %w", box.Namespace, box.Name, err)
	}
	return nil
}

// forget releases a sandbox that has ended. What cannot be released is taken
// away by a later heal, once the namespace is gone.
func (a *agent) forget(ctx context.Context, box sandbox) {
	if err := errors.Join(a.release(ctx, box), a.boxes.forget(box.ContainerID)); err != nil {
		a.log.Warn("something of an ended pod is left until the next check", "pod", box.Namespace+"/"+box.Name, "err", err)
	}
	delete(a.pods, box.ContainerID)
	if left := a.boxes.of(box.Namespace, box.Name); len(left) == 0 {
		a.setPodAddrs(box.Namespace, box.Name, nil)
		a.problem("pod "+box.Namespace+"/"+box.Name, nil)
	}
	a.count()
}

func baseOwner(p xds.OutboundPolicy) string { return "base/" + string(p) }

// problem notes what is wrong with an object, or with nil that nothing is.
func (a *agent) problem(object string, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err == nil {
		delete(a.problems, object)
		return
	}
	a.problems[object] = err.Error()
}

// count notes how many sandboxes there are of each state.
func (a *agent) count() {
	var c podCounts
	a.mu.Lock()
	defer a.mu.Unlock()
	for id, s := range a.pods {
		box, known := a.boxes.byID[id]
		_, failed := a.problems["pod "+box.Namespace+"/"+box.Name]
		switch {
		case !known:
		case failed:
			c.failed++
		case s.workload != nil:
			c.redirected++
		default:
			c.untouched++
		}
	}
	a.counts = c
}

// report returns what count and problem noted.
func (a *agent) report() (podCounts, map[string]string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	problems := make(map[string]string, len(a.problems))
	for k, v := range a.problems {
		problems[k] = v
	}
	return a.counts, problems
}
