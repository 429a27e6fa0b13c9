package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sluicemesh/sluice/pkg/podwatch"
	"github.com/sluicemesh/sluice/pkg/podwatch/cniapi"
	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/pkg/redirect/netns"
	"github.com/sluicemesh/sluice/pkg/xds"
	"github.com/sluicemesh/sluice/pkg/xds/server"
)

// healInterval is how long after one comparison of the kernel with what is
// wanted the next begins. All changes are applied at once; this only mends what
// others broke.
const healInterval = 30 * time.Second

// firstRetry is how long after something failed the next comparison begins; as
// long as it fails, each takes twice as long to come as the one before.
const firstRetry = time.Second

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

// An agent makes the node do what the source and CNI say. All that it knows and
// plans is under one lock, which call takes. What takes time, in the kernel above
// all, happens with the lock released (outside) and in the sandbox's turn: one
// operation on a sandbox never begins before another has come to its end, from
// the plan to the note of what became of it.
type agent struct {
	log        *slog.Logger
	store      *podwatch.Store
	planner    planner
	redirector redirect.Redirector
	translator translator
	sidecars   sidecarServer
	// setPodAddrs tells the source which addresses CNI gave a pod.
	setPodAddrs func(namespace, name string, addrs []netip.Addr)
	// cutOff says whether the API server answers nobody just now.
	cutOff   func() bool
	reporter reporter
	backend  backendChoice
	find     finder // nil: all pods come through CNI
	// hostUID tells what a user ID in a user namespace is on the node, see
	// netns.HostUID.
	hostUID func(userns uint64, uid uint32) (uint32, error)
	// containers are the cgroups of the node's containers.
	containers nodeContainers
	// drain tells a sidecar that its pod is about to end; nil: nobody is told.
	drain func(context.Context, proxyTarget) error

	// lock is held by whoever has sent to it; turns are taken before it.
	lock  chan struct{}
	turns redirect.Turns[string] // by container ID
	// adding and removing bound how many sandboxes are worked on in the kernel at
	// a time. They are two so that a burst of DELs leaves room for ADD.
	adding, removing chan struct{}
	// started is closed once the source was read and all was done about it.
	started chan struct{}

	// Under the lock.
	boxes *sandboxes
	pods  map[string]*podState // by container ID
	fed   map[podwatch.Key][]podwatch.Key
	// background are errands of the loop and of those who ask the agent; they end
	// with their context, and are waited for once nobody asks any more.
	background sync.WaitGroup
	awaiting   map[string]bool // sandboxes whose turn applySoon awaits
	adopting   bool
	missing    map[string]time.Time // older pods that were not found, by UID, and since when
	adopted    atomic.Int64
	drained    struct{ told, failed atomic.Uint64 }
	turned     atomic.Int64 // when the loop last did, in ns since 1970; 0: it has not begun
	// failing asks the loop to compare soon; see soon.
	failing chan struct{}

	mu       sync.Mutex
	problems map[string]string // by object, for /readyz and metrics
	counts   podCounts
	// sidecarsOf are the sidecars of redirected pods.
	sidecarsOf []proxyTarget
	// proxyCgroups are those of the sidecars' containers, as far as they are
	// known, by what the sidecar server knows the pod by.
	proxyCgroups map[string]string
}

// A podState is what the agent did for a sandbox.
type podState struct {
	pod      *podwatch.Pod // as last seen: a pod may be deleted before its sandbox is
	services []podwatch.Key
	workload *redirect.Workload // nil while the pod is not redirected
	told     told
	drained  bool
	looked   time.Time // when redirection was last asked to look at it
	// hostUIDs are what users of the pod are on the node, as far as was found out.
	hostUIDs map[uint32]uint32
	// proxy is the sidecar's container as it was last found.
	proxy proxyContainer
}

type podCounts struct{ redirected, untouched, failed int }

// Run brings the node to what the source says once the source has been read,
// and then follows every change, until ctx ends. It leaves the traffic as it is.
func (a *agent) Run(ctx context.Context) error {
	heal := time.NewTimer(healInterval)
	defer heal.Stop()
	var retry time.Duration // how soon, while something fails
	failing := a.failing    // nil while a comparison is under way
	surveyed := make(chan survey)
	changed := make(chan podwatch.Batch)
	synced := a.store.Synced()
	var others sync.WaitGroup // they end with ctx
	defer others.Wait()
	for {
		a.turned.Store(time.Now().UnixNano())
		select {
		case <-ctx.Done():
			return nil
		case <-synced:
			synced = nil
			if err := a.call(ctx, func() error { return a.start(ctx) }); err != nil {
				return ignoreEnd(ctx, err)
			}
			others.Go(func() { a.watch(ctx, changed) })
		case b := <-changed:
			_ = a.call(ctx, func() error { a.apply(ctx, b.Keys, b.Since); return nil }) // fails only when ctx has ended
		case <-failing:
			if retry == 0 {
				retry = firstRetry
				heal.Reset(retry)
			}
		case <-heal.C:
			if !a.ready() {
				heal.Reset(healInterval)
				continue
			}
			failing = nil
			// Not here: with many pods it takes long, and ADD must not wait.
			others.Go(func() {
				select {
				case surveyed <- a.survey(ctx):
				case <-ctx.Done():
				}
			})
		case s := <-surveyed:
			_ = a.call(ctx, func() error { // as above
				a.heal(ctx, s)
				a.adopt(ctx)
				a.tellRejections()
				return nil
			})
			select {
			case <-a.failing:
				retry = min(max(2*retry, firstRetry), healInterval)
			default:
				retry = 0
			}
			failing = a.failing
			heal.Reset(cmp.Or(retry, healInterval))
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

// soon has the loop compare the kernel with what is wanted before its time, because
// something has failed.
func (a *agent) soon() {
	select {
	case a.failing <- struct{}{}:
	default: // it was asked already
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

// ignoreEnd returns nil in place of an error that comes from the end of ctx.
func ignoreEnd(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// installers is how many sandboxes are redirected at a time: more than there are
// processors, because the kernel makes some of them wait.
func installers() int { return 2 * runtime.GOMAXPROCS(0) }

// removers is how many are released at a time.
func removers() int { return max(1, runtime.GOMAXPROCS(0)/2) }

// call runs f under the agent's lock and returns its error.
func (a *agent) call(ctx context.Context, f func() error) error {
	select {
	case a.lock <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("wait for the agent: %w", ctx.Err())
	}
	defer func() { <-a.lock }()
	return f()
}

// outside runs f without the lock that the caller holds: other operations may
// change everything but what the caller has the turn of.
func (a *agent) outside(f func() error) error {
	<-a.lock
	defer func() { a.lock <- struct{}{} }()
	return f()
}

// within is outside in one of so many places.
func (a *agent) within(ctx context.Context, places chan struct{}, f func() error) error {
	return a.outside(func() error {
		select {
		case places <- struct{}{}:
		case <-ctx.Done():
			return fmt.Errorf("wait for other pods: %w", ctx.Err())
		}
		defer func() { <-places }()
		return f()
	})
}

// turn waits for the sandbox's turn, without the lock if it has to wait.
func (a *agent) turn(ctx context.Context, containerID string) (end func(), err error) {
	if end = a.turns.Try(containerID); end != nil {
		return end, nil
	}
	err = a.outside(func() error {
		end, err = a.turns.TakeContext(ctx, containerID)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("wait for another operation on sandbox %s: %w", containerID, err)
	}
	return end, nil
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
	var s survey
	_ = a.outside(func() error { s = a.survey(ctx); return nil })
	a.heal(ctx, s)
	a.sidecars.SetReady()
	close(a.started)
	a.adopt(ctx)
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
	errs := []error{s.err}
	for _, box := range a.boxes.all() {
		errs = append(errs, a.healBox(ctx, box.ContainerID, s))
	}
	keep, err := a.orphans(s.installed)
	a.problem("sandboxes", err)
	for _, box := range a.boxes.all() {
		keep = append(keep, box.id()) // each was seen to in its turn
	}
	errs = append(errs, a.within(ctx, a.removing, func() error {
		return redirect.Reconcile(ctx, a.redirector, s.installed, nil, keep)
	}))
	if err := errors.Join(errs...); err != nil {
		a.log.Error("redirection differs from what is wanted", "err", err)
		a.problem("redirection", err)
		a.soon()
		return
	}
	a.problem("redirection", nil)
}

// healBox is heal for one sandbox. One whose turn is another operation's is
// brought to what is wanted by that.
func (a *agent) healBox(ctx context.Context, containerID string, s survey) error {
	end := a.turns.Try(containerID)
	if end == nil {
		return nil
	}
	defer end()
	box, known := a.boxes.byID[containerID]
	if !known {
		return nil // it has ended since
	}
	if netnsGone(box.Netns, box.NetnsInode) {
		a.forget(ctx, box)
		return nil
	}
	err := a.bring(ctx, box, time.Now(), s)
	if err == nil {
		return nil
	}
	a.log.Error("pod is not redirected as its source says", "pod", box.Namespace+"/"+box.Name, "err", err)
	state := a.pods[containerID]
	if state.workload == nil || s.whole(*state.workload) {
		return nil
	}
	// What was in place is kept whole.
	err = a.within(ctx, a.adding, func() error { return a.redirector.Add(ctx, *state.workload) })
	if err != nil && !errors.Is(err, redirect.ErrGone) {
		return fmt.Errorf("redirect pod %s: %w", state.workload.Pod, err)
	}
	return nil
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
		err = errors.Join(err, fmt.Errorf("pod %s is redirected, but the record of its sandbox is lost: it stays as it is and follows no change until it is found among the processes of the node, or deleted and made anew", i.Pod))
	}
	return ids, err
}

// apply does what the changed objects ask for, and no more.
func (a *agent) apply(ctx context.Context, keys []podwatch.Key, since time.Time) {
	services := map[podwatch.Key]bool{}
	boxes := map[string]bool{}
	for _, key := range keys {
		for _, s := range a.remember(key) {
			services[s] = true
		}
		concerned := a.concerned(key)
		for _, box := range concerned {
			boxes[box.ContainerID] = true
		}
		if _, exists := a.store.Get(key); key.Kind == podwatch.KindPod && !exists && len(concerned) == 0 {
			a.problem("pod "+key.Namespace+"/"+key.Name, nil) // it was never brought here
		}
	}
	var dirty []podwatch.Key
	for key := range services {
		dirty = append(dirty, key)
	}
	a.applyServices(dirty, since)
	for id := range boxes {
		a.applySoon(ctx, id, since)
	}
	if slices.ContainsFunc(keys, func(k podwatch.Key) bool { return k.Kind == podwatch.KindPod || k.Kind == podwatch.KindNamespace }) {
		a.adopt(ctx)
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

// applySoon brings one sandbox to what its pod asks for, beside the loop: while
// the kernel works for one pod, or its turn is another operation's, all others
// must go on, the endpoints above all.
func (a *agent) applySoon(ctx context.Context, containerID string, since time.Time) {
	if a.awaiting[containerID] {
		return // it will see this change, too
	}
	a.awaiting[containerID] = true
	a.background.Go(func() {
		ctx, cancel := context.WithTimeout(ctx, cniapi.ServerWorkBudget)
		defer cancel()
		_ = a.call(ctx, func() error { // fails only when ctx has ended
			err := a.applyPod(ctx, containerID, since)
			if box, known := a.boxes.byID[containerID]; err != nil && known {
				a.log.Error("pod is not redirected as its source says", "pod", box.Namespace+"/"+box.Name, "err", err)
			}
			return nil
		})
	})
}

// applyPod brings one sandbox, if it is still there in its turn, to what its pod
// asks for.
func (a *agent) applyPod(ctx context.Context, containerID string, since time.Time) error {
	end, err := a.turn(ctx, containerID)
	delete(a.awaiting, containerID)
	if err != nil {
		return err
	}
	defer end()
	box, known := a.boxes.byID[containerID]
	if !known {
		return nil
	}
	return a.bring(ctx, box, since, survey{})
}

// bring brings a sandbox, in its turn, to what its pod asks for: first the
// sidecar's configuration and socket, then redirection. On an error with what the
// pod asks for, what was in place before stays. s is what is known already to be
// installed.
func (a *agent) bring(ctx context.Context, box sandbox, since time.Time, s survey) (err error) {
	object := "pod " + box.Namespace + "/" + box.Name
	var partly error // is reported, but keeps no pod from starting
	state := a.pods[box.ContainerID]
	if state == nil {
		state = &podState{}
		a.pods[box.ContainerID] = state
	}
	defer func() {
		a.problem(object, errors.Join(err, partly))
		a.count()
		a.tell(box, state, err, partly)
	}()
	if pod, ok := get[*podwatch.Pod](a.store, podwatch.Key{Kind: podwatch.KindPod, Namespace: box.Namespace, Name: box.Name}); ok && a.store.IsPod(pod, box.PodUID) {
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
	proxyUID, err := a.proxyUID(box, state, workload.Policy.ProxyUID)
	if err != nil {
		return fmt.Errorf("tell the proxy of pod %s by its user: %w", workload.Pod, err)
	}
	if proxyUID != workload.Policy.ProxyUID {
		workload.HostProxyUID = proxyUID
	}
	workload.ProxyCgroup = a.proxyCgroup(box, state)
	if box.Userns != 0 {
		if workload.Policy.Backend, err = usernsBackend(workload.Policy.Backend); err != nil {
			return fmt.Errorf("redirect pod %s: %w", workload.Pod, err)
		}
	}
	a.drainOnce(ctx, box, state)
	// A survey does not tell which backend has the pod: once in the agent's life
	// that must be looked at.
	installed := state.workload != nil && s.whole(workload)
	if !installed {
		state.looked = time.Now()
	}
	err = a.within(ctx, a.adding, func() error {
		if err := a.sidecars.Open(sidecar.UID, box.Netns, proxyUID); err != nil {
			return fmt.Errorf("open xDS socket of pod %s: %w", workload.Pod, err)
		}
		if installed {
			return nil
		}
		// From here on the pod's traffic is affected.
		if err := a.redirector.Add(ctx, workload); err != nil {
			if !errors.Is(err, redirect.ErrGone) {
				a.soon()
			}
			return fmt.Errorf("redirect pod %s: %w", workload.Pod, err)
		}
		return nil
	})
	if err != nil || installed {
		return err
	}
	if state.workload == nil {
		a.log.Info("pod is redirected", "pod", workload.Pod, "pod_uid", box.PodUID, "netns", box.NetnsInode)
	}
	state.workload = &workload
	return nil
}

// usernsBackend is the backend of a pod with a user namespace of its own, whatever
// the node's is: the kernel refuses iptables' owner match, which tells the proxy,
// to whoever is outside of that namespace (xt_owner, EINVAL).
func usernsBackend(asked redirect.Backend) (redirect.Backend, error) {
	if asked == redirect.BackendIPTables {
		return "", errors.New("the pod has a user namespace of its own (hostUsers: false), in which iptables cannot tell its proxy: remove the annotation sluice.dev/backend, or hostUsers: false")
	}
	return redirect.BackendEBPF, nil
}

// proxyUID is what the pod's user ID uid is on the node. In a pod with a user
// namespace of its own that can be told only once a process runs there; until
// then nobody is the proxy, and refused asks again when the proxy comes.
func (a *agent) proxyUID(box sandbox, state *podState, uid uint32) (uint32, error) {
	if box.Userns == 0 {
		return uid, nil
	}
	if mapped, known := state.hostUIDs[uid]; known {
		return mapped, nil // it never changes
	}
	mapped, err := a.hostUID(box.Userns, uid)
	switch {
	case errors.Is(err, netns.ErrNoProcess):
		return redirect.NoUID, nil
	case err != nil:
		return 0, err
	case state.hostUIDs == nil:
		state.hostUIDs = map[uint32]uint32{}
	}
	state.hostUIDs[uid] = mapped
	return mapped, nil
}

// refused is told that somebody who is not known as the proxy of a sandbox asked
// for its configuration: the proxy itself, if it has a user ID that could not be
// known before, or was started again.
func (a *agent) refused(ctx context.Context, id string) {
	a.background.Go(func() {
		err := a.call(ctx, func() error {
			for _, box := range a.boxes.all() {
				state := a.pods[box.ContainerID]
				if box.id().String() != id || state == nil {
					continue
				}
				if box.Userns != 0 && state.hostUIDs == nil || state.proxy.cgroup != "" && !a.containers.has(state.proxy.cgroup) {
					return a.applyPod(ctx, box.ContainerID, time.Now())
				}
			}
			return nil
		})
		if err != nil && ctx.Err() == nil {
			a.log.Warn("sidecar that was refused stays unknown", "err", err)
		}
	})
}

// drainOnce tells the sidecar of a pod that is being deleted, once.
func (a *agent) drainOnce(ctx context.Context, box sandbox, state *podState) {
	if !state.pod.Terminating || state.drained || a.drain == nil {
		return
	}
	state.drained = true
	a.background.Go(func() {
		if err := a.drain(ctx, box.target()); err != nil && !errors.Is(err, redirect.ErrGone) && ctx.Err() == nil {
			a.log.Warn("sidecar of a pod that ends is not told", "pod", box.Namespace+"/"+box.Name, "err", err)
			a.drained.failed.Add(1)
			// Once more at the next change or check, if the pod is still there then.
			_ = a.call(ctx, func() error { state.drained = false; return nil })
		} else if err == nil {
			a.drained.told.Add(1)
		}
	})
}

// target is the sandbox's sidecar.
func (s sandbox) target() proxyTarget {
	return proxyTarget{Namespace: s.Namespace, Pod: s.Name, Netns: s.Netns, NetnsInode: s.NetnsInode}
}

// targets returns the sidecars of the node's redirected pods. It may be called
// on any goroutine.
func (a *agent) targets() []proxyTarget {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.sidecarsOf)
}

// release ends all that was done for a sandbox, in its turn, redirection first.
func (a *agent) release(ctx context.Context, box sandbox) error {
	id := box.id()
	if err := a.within(ctx, a.removing, func() error { return a.redirector.Remove(ctx, id) }); err != nil {
		return fmt.Errorf("end redirection of pod %s/%s: %w", box.Namespace, box.Name, err)
	}
	if s := a.pods[box.ContainerID]; s != nil && s.workload != nil {
		s.workload = nil
		a.log.Info("pod is no longer redirected", "pod", box.Namespace+"/"+box.Name, "pod_uid", box.PodUID, "netns", box.NetnsInode)
	}
	return a.endServing(box)
}

// endServing ends what the sidecar of a sandbox is told.
func (a *agent) endServing(box sandbox) error {
	id := box.id().String()
	a.mu.Lock()
	delete(a.proxyCgroups, id)
	a.mu.Unlock()
	err := a.outside(func() error { return a.sidecars.ClosePod(id) })
	a.sidecars.RemovePod(id)
	if err != nil {
		return fmt.Errorf("close xDS socket of pod %s/%s: %w", box.Namespace, box.Name, err)
	}
	return nil
}

// forget releases a sandbox that has ended, in its turn. What cannot be released is taken
// away by a later heal, once the namespace is gone.
func (a *agent) forget(ctx context.Context, box sandbox) {
	err := a.release(ctx, box)
	if err != nil { // the socket would keep the namespace from going
		err = errors.Join(err, a.endServing(box))
	}
	if err = errors.Join(err, a.boxes.forget(box.ContainerID)); err != nil {
		a.log.Warn("something of an ended pod is left until the next check", "pod", box.Namespace+"/"+box.Name, "err", err)
		a.soon()
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
	a.sidecarsOf = nil
	for id, s := range a.pods {
		box, known := a.boxes.byID[id]
		if known && s.workload != nil {
			t := box.target()
			if s.pod != nil {
				t.Workload = s.pod.Workload.Name
			}
			a.sidecarsOf = append(a.sidecarsOf, t)
		}
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
