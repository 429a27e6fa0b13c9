package bpf

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/pkg/redirect/cgroup"
)

// DefaultPinDir is where the kernel's objects are pinned.
const DefaultPinDir = "/sys/fs/bpf/sluice"

// AgentMark is the socket mark (SO_MARK) by which the agent may connect to a
// sidecar's admin port from inside the pod's namespace, which every process
// but the proxy is refused. Setting it takes CAP_NET_ADMIN.
const AgentMark = 0x51ce

// ErrIncompatible: maps of another build are pinned that this one would
// misread. Uninstall removes them, and with them all redirection.
var ErrIncompatible = errors.New("pinned by an incompatible build, remove it with uninstall")

// Options say where the backend lives. The zero value is usable.
type Options struct {
	// PinDir is a directory for pins, made if absent; empty means
	// DefaultPinDir. A bpffs is mounted on its parent, which must exist,
	// unless it lies in one.
	PinDir string
	// NoMount means that a bpffs is neither mounted nor unmounted: PinDir must
	// be in one that outlives this process. In a container a mount of its own
	// would end with it, and redirection with that.
	NoMount bool
	// Cgroup is the root of the cgroup v2 hierarchy, or what stands for it on
	// this node; empty finds it. Hooks that serve pods alone attach to the
	// cgroup of all pods below it (kubepods.slice or kubepods) where there is
	// one, all others to the root.
	Cgroup string
	// HostNetns is a path that opens the node's own network namespace, whose
	// processes are exempt unless they are a pod's. Empty means this process'.
	HostNetns string
	// Sizes of maps that do not exist yet; those that exist keep theirs.
	Sizes Sizes
	// Log receives what happened to the node's hooks. Nil discards it.
	Log *slog.Logger
	// Accelerate is the node's setting; empty means AccelerateOff. Unless off,
	// New tries once what the kernel can do, which takes seconds. With
	// AccelerateOn New fails where connections between proxies cannot be
	// accelerated.
	Accelerate redirect.Accelerate
	// AccelerateCache is a file that remembers what was found; empty means none.
	// It is of use until the next boot.
	AccelerateCache string
	// PairCheck is the command that calls paircheck.Child; empty means this
	// program with the argument "paircheck".
	PairCheck []string
}

// Sizes are numbers of entries; 0 means the default.
type Sizes struct {
	// Pods that can be redirected at a time: 1024.
	Pods uint32
	// Ports and CIDRs of all pods' policies together: 131072 each.
	Ports uint32
	CIDRs uint32
	// Handover: connections that are being opened at the same time: 65536.
	Handover uint32
	// Probes: connections that processes of the node outside of pods have open
	// to pods at the same time: 16384.
	Probes uint32
}

// A Redirector is the eBPF data plane of this node. It implements
// redirect.Redirector and redirect.Meter.
type Redirector struct {
	store    store
	programs redirectPrograms
	dir      string
	cgroup   string // the root; empty: find it
	log      *slog.Logger
	turns    redirect.Turns[redirect.ID]

	finder     finder
	accel      acceleration
	podCgroups podCgroups
	hooksMu    sync.Mutex
	attached   []attachedHook
}

var (
	_ redirect.Redirector = (*Redirector)(nil)
	_ redirect.Yielder    = (*Redirector)(nil)
	_ redirect.Meter      = (*Redirector)(nil)
)

// withDefaults returns o with its empty fields filled.
func (o Options) withDefaults() Options {
	if o.PinDir == "" {
		o.PinDir = DefaultPinDir
	}
	o.PinDir = filepath.Clean(o.PinDir)
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return o
}

// New loads the programs and attaches them, or takes over what an earlier
// process has pinned, in which case every hook runs this build's program from
// one connection to the next. It needs Linux 5.17 or newer; errors wrap
// redirect.ErrNotSupported where the kernel lacks something or, with NoMount,
// the node a bpffs, and ErrIncompatible if what is pinned cannot be taken over;
// nothing is changed then. Close the Redirector when done; what is pinned stays.
func New(o Options) (*Redirector, error) { return newFrom(o, loadForKernel) }

// newFrom is New for another build's object.
func newFrom(o Options, object func() (*ebpf.CollectionSpec, error)) (*Redirector, error) {
	o = o.withDefaults()
	if err := probe(o.Cgroup); err != nil {
		return nil, err
	}
	host, err := hostCookie(o.HostNetns)
	if err != nil {
		return nil, err
	}
	if err := provideBPFFS(filepath.Dir(o.PinDir), o.NoMount); err != nil {
		return nil, err
	}
	if err := writable(o.PinDir); err != nil {
		return nil, err
	}
	r := &Redirector{dir: o.PinDir, cgroup: o.Cgroup, log: o.Log}
	for _, dir := range []string{r.dir, r.mapDir(), r.hookDir(), r.podsDir(), filepath.Join(r.dir, twReuseDir)} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("make pin directory: %w", err)
		}
	}
	if err := r.decide(o); err != nil {
		return nil, err
	}
	unlock, err := lock(r.dir, false)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := r.load(o.Sizes, host, object); err != nil {
		return nil, err
	}
	if err := r.startAcceleration(); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	if err := r.takeOver(); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

func (r *Redirector) mapDir() string  { return filepath.Join(r.dir, "maps") }
func (r *Redirector) hookDir() string { return filepath.Join(r.dir, "links") }
func (r *Redirector) podsDir() string { return filepath.Join(r.dir, "pods") }

// podDir holds the links of one pod. bpffs allows no dots in names.
func (r *Redirector) podDir(id redirect.ID) string { return podDir(r.podsDir(), id) }

// load opens or makes the maps and loads this build's programs.
func (r *Redirector) load(sizes Sizes, host uint64, object func() (*ebpf.CollectionSpec, error)) error {
	spec, err := object()
	if err != nil {
		return fmt.Errorf("read eBPF object: %w", err)
	}
	if err := setUp(spec, host); err != nil {
		return err
	}
	if err := r.knowPins(spec); err != nil {
		return err
	}
	for name, n := range map[string]uint32{
		redirectMapPods: sizes.Pods, redirectMapPodMeta: sizes.Pods, redirectMapStats: sizes.Pods, redirectMapProxyCgroups: sizes.Pods,
		redirectMapPodIps: 2 * sizes.Pods, redirectMapListeners: 2 * sizes.Pods,
		redirectMapPorts: sizes.Ports, redirectMapCidrs: sizes.CIDRs, redirectMapHandover: sizes.Handover,
		redirectMapProbes: sizes.Probes,
	} {
		if n != 0 {
			spec.Maps[name].MaxEntries = n
		}
	}
	if r.accel.possible() {
		if err := spec.Variables[redirectVarSlAccelerate].Set(uint8(1)); err != nil {
			return fmt.Errorf("set up eBPF object: %w", err)
		}
	}
	if err := adopt(spec, r.mapDir()); err != nil {
		return err
	}
	var o redirectObjects
	if err := spec.LoadAndAssign(&o, &ebpf.CollectionOptions{Maps: ebpf.MapOptions{PinPath: r.mapDir()}}); err != nil {
		var verifier *ebpf.VerifierError
		if errors.As(err, &verifier) {
			r.log.Debug("program was rejected", "err", fmt.Sprintf("%+v", verifier))
		}
		return fmt.Errorf("load eBPF programs: %w", err)
	}
	r.store.redirectMaps, r.programs = o.redirectMaps, o.redirectPrograms
	if r.finder, err = loadFinder(spec, &r.store.redirectMaps); err != nil {
		return errors.Join(err, r.Close())
	}
	if err := r.store.writeLayouts(spec); err != nil {
		return errors.Join(err, r.Close())
	}
	return nil
}

// prepare returns the embedded object, set up for this kernel and the node's
// network namespace with the cookie host.
func prepare(host uint64) (*ebpf.CollectionSpec, error) {
	spec, err := loadForKernel()
	if err != nil {
		return nil, fmt.Errorf("read eBPF object: %w", err)
	}
	return spec, setUp(spec, host)
}

// loadForKernel returns the embedded object, with what the programs must know of
// this kernel.
func loadForKernel() (*ebpf.CollectionSpec, error) {
	spec, err := loadRedirect()
	if err != nil {
		return nil, err
	}
	tc := haveTCRegister()
	if tc != nil && !errors.Is(tc, ebpf.ErrNotSupported) {
		return nil, fmt.Errorf("find out whether tc programs may register listeners: %w", tc)
	}
	for variable, missing := range map[string]error{
		redirectVarSlHaveMptcp: haveMPTCP(), redirectVarSlTcMayRegister: tc,
	} {
		have := uint8(0)
		if missing == nil {
			have = 1
		}
		if err := spec.Variables[variable].Set(have); err != nil {
			return nil, err
		}
	}
	return spec, nil
}

// setUp sets what the programs must know of this node.
func setUp(spec *ebpf.CollectionSpec, host uint64) error {
	if err := spec.Variables[redirectVarSlHostNetns].Set(host); err != nil {
		return fmt.Errorf("set up eBPF object: %w", err)
	}
	return nil
}

// root returns the root of the cgroup v2 hierarchy.
func (r *Redirector) root() (string, error) {
	if r.cgroup != "" {
		return r.cgroup, nil
	}
	return cgroup.Root()
}

// A hook is a program that serves all pods.
type hook struct {
	name   string
	attach ebpf.AttachType
	prog   *ebpf.Program
	cgroup string
}

// hooks returns them in the order in which they are attached: who answers
// first, who asks last, so that a connection is led away only when all that it
// then needs is in place.
func (r *Redirector) hooks() ([]hook, error) {
	root, err := r.root()
	if err != nil {
		return nil, err
	}
	pods := podsCgroup(root)
	return []hook{
		{"getsockopt", ebpf.AttachCGroupGetsockopt, r.programs.SlGetsockopt, pods},
		{"sockops", ebpf.AttachCGroupSockOps, r.programs.SlSockops, root},
		{"host_connect4", ebpf.AttachCGroupInet4Connect, r.programs.SlHost4, root},
		{"host_connect6", ebpf.AttachCGroupInet6Connect, r.programs.SlHost6, root},
		{"getpeername4", ebpf.AttachCgroupInet4GetPeername, r.programs.SlGetpeername4, pods},
		{"getpeername6", ebpf.AttachCgroupInet6GetPeername, r.programs.SlGetpeername6, pods},
		{"connect4", ebpf.AttachCGroupInet4Connect, r.programs.SlConnect4, pods},
		{"connect6", ebpf.AttachCGroupInet6Connect, r.programs.SlConnect6, pods},
	}, nil
}

// An attachedHook is the link of a hook, kept open so that it can be looked at
// with one call to the kernel.
type attachedHook struct {
	pin    string
	cgroup uint64
	link   link.Link
}

// keepHooks closes the links that were kept and keeps fresh ones in their place.
func (r *Redirector) keepHooks(fresh []attachedHook) error {
	err := closeHooks(r.attached)
	r.attached = fresh
	return err
}

func closeHooks(hooks []attachedHook) error {
	var errs []error
	for _, h := range hooks {
		errs = append(errs, h.link.Close())
	}
	return errors.Join(errs...)
}

// ensureHooks attaches the hooks unless those that this process has attached are
// as they were.
func (r *Redirector) ensureHooks() error {
	r.hooksMu.Lock()
	defer r.hooksMu.Unlock()
	reason := r.attachedProblem()
	if reason == nil {
		return nil
	}
	r.log.Warn("mending hooks", "reason", reason)
	return r.attachHooks()
}

// attachedProblem is a hookProblem that costs little: it does not look for
// cgroups that have appeared since, nor at what others put in a pin's place.
func (r *Redirector) attachedProblem() error {
	if len(r.attached) == 0 {
		return errors.New("hooks were not found whole")
	}
	for _, h := range r.attached {
		if _, err := os.Lstat(h.pin); err != nil {
			return fmt.Errorf("look at pinned link: %w", err)
		}
		if err := onCgroup(h.link, h.cgroup); err != nil {
			return fmt.Errorf("hook %s: %w", filepath.Base(h.pin), err)
		}
	}
	return nil
}

// onCgroup returns an error unless the link is attached to the cgroup with this
// number.
func onCgroup(l link.Link, id uint64) error {
	info, err := l.Info()
	if err != nil {
		return fmt.Errorf("read link: %w", err)
	}
	if info.Cgroup() == nil || info.Cgroup().CgroupId != id {
		return fmt.Errorf("it is not attached to cgroup %d", id)
	}
	return nil
}

// attachHooks attaches what serves all pods, or updates it.
func (r *Redirector) attachHooks() error {
	hooks, err := r.hooks()
	if err != nil {
		return err
	}
	var kept []attachedHook
	for _, h := range hooks {
		id, err := cgroupID(h.cgroup)
		if err != nil {
			return err
		}
		err = attachPinned(filepath.Join(r.hookDir(), h.name), h.prog, link.CgroupType,
			func(i *link.Info) bool { return i.Cgroup() != nil && i.Cgroup().CgroupId == id },
			func() (link.Link, error) {
				r.log.Info("attaching hook", "hook", h.name, "cgroup", h.cgroup)
				l, err := link.AttachCgroup(link.CgroupOptions{Path: h.cgroup, Attach: h.attach, Program: h.prog})
				if errors.Is(err, unix.EPERM) {
					// The kernel's word for what somebody attached without BPF_F_ALLOW_MULTI.
					err = fmt.Errorf("another program is there, or above, that admits none beside it: %w", err)
				}
				if err != nil {
					return nil, fmt.Errorf("attach %s to cgroup %s: %w", h.name, h.cgroup, err)
				}
				return l, nil
			})
		if err != nil {
			return errors.Join(err, closeHooks(kept))
		}
		pin := filepath.Join(r.hookDir(), h.name)
		l, err := link.LoadPinnedLink(pin, nil)
		if err != nil {
			return errors.Join(fmt.Errorf("open pinned link %s: %w", pin, err), closeHooks(kept))
		}
		kept = append(kept, attachedHook{pin: pin, cgroup: id, link: l})
	}
	return r.keepHooks(kept)
}

// hookProblem names the first hook that is not attached as it should be. The
// next Add mends it.
func (r *Redirector) hookProblem() error {
	err := r.findHookProblem()
	if err != nil {
		r.hooksMu.Lock()
		defer r.hooksMu.Unlock()
		err = errors.Join(err, r.keepHooks(nil))
	}
	return err
}

func (r *Redirector) findHookProblem() error {
	hooks, err := r.hooks()
	if err != nil {
		return err
	}
	for _, h := range hooks {
		id, err := cgroupID(h.cgroup)
		if err != nil {
			return err
		}
		l, err := link.LoadPinnedLink(filepath.Join(r.hookDir(), h.name), nil)
		if err != nil {
			return fmt.Errorf("hook %s: open pinned link: %w", h.name, err)
		}
		err = onCgroup(l, id)
		_ = l.Close()
		if err != nil {
			return fmt.Errorf("hook %s for %s: %w", h.name, h.cgroup, err)
		}
	}
	return nil
}

// takeOver makes every hook of the node and of the pods run this build's
// programs. All builds that may do so share the maps, so the order is free.
func (r *Redirector) takeOver() error {
	r.hooksMu.Lock()
	err := r.attachHooks()
	r.hooksMu.Unlock()
	if err != nil {
		return err
	}
	if err := r.knowPods(true); err != nil {
		return err
	}
	if err := r.store.purge(); err != nil {
		return err
	}
	return r.store.each(func(cookie uint64, meta *redirectSlMeta) error {
		pod, err := r.store.pod(cookie)
		if err != nil || pod == nil {
			return err // half removed: List says so
		}
		if err := r.takeOverPod(meta, pod); err != nil {
			r.log.Warn("pod keeps its old programs", "pod", text(meta.Pod[:]), "pod_uid", text(meta.Uid[:]), "err", err)
		}
		return nil
	})
}

// takeOverPod makes a pod's hooks run this build's programs.
func (r *Redirector) takeOverPod(meta *redirectSlMeta, pod *redirectSlPod) error {
	path := text(meta.Netns[:])
	if err := sameNamespace(path, meta.NetnsInode); err != nil {
		return err
	}
	if err := within(path, func(h inside) error { return r.attachPod(h, meta, pod) }); err != nil {
		return err
	}
	// Earlier builds had tcx links where there is a filter now.
	old, err := filepath.Glob(filepath.Join(r.podDir(meta.id()), pinTCX+"*"))
	if err != nil {
		return fmt.Errorf("find links of an earlier build: %w", err)
	}
	var errs []error
	for _, pin := range old {
		errs = append(errs, detachPinned(pin))
	}
	return errors.Join(errs...)
}

// Close implements redirect.Redirector.
func (r *Redirector) Close() error {
	r.hooksMu.Lock()
	defer r.hooksMu.Unlock()
	return errors.Join(r.keepHooks(nil), r.store.Close(), r.programs.Close(), r.finder.Close(), r.accel.programs.Close())
}

// Probe returns nil if this machine has all that New needs, else an error that
// wraps redirect.ErrNotSupported and names the first thing that is missing. It
// loads the programs and attaches nothing.
func Probe() error { return probe("") }

// probe is Probe for one who attaches to the given cgroup; empty: the root,
// which must be mounted then.
func probe(root string) error {
	for _, have := range []struct {
		what string
		err  func() error
	}{
		{"cgroup v2 mounted", func() error { return haveCgroup(root) }},
		{"file system bpf", haveBPFFS},
		{"program type cgroup_sock_addr", haveType(ebpf.CGroupSockAddr)},
		{"program type sock_ops", haveType(ebpf.SockOps)},
		{"program type cgroup_sockopt", haveType(ebpf.CGroupSockopt)},
		{"program type sched_cls", haveType(ebpf.SchedCLS)},
		{"program type sk_lookup", haveType(ebpf.SkLookup)},
		{"map type sk_storage", func() error { return features.HaveMapType(ebpf.SkStorage) }},
		{"map type sockhash", func() error { return features.HaveMapType(ebpf.SockHash) }},
		{"map type lpm_trie", func() error { return features.HaveMapType(ebpf.LPMTrie) }},
		{"helper bpf_get_netns_cookie in connect", haveHelper(ebpf.CGroupSockAddr, asm.FnGetNetnsCookie)},
		{"helper bpf_get_current_ancestor_cgroup_id in connect", haveHelper(ebpf.CGroupSockAddr, asm.FnGetCurrentAncestorCgroupId)},
		{"helper bpf_get_netns_cookie in sockops", haveHelper(ebpf.SockOps, asm.FnGetNetnsCookie)},
		{"helper bpf_get_netns_cookie in getsockopt", haveHelper(ebpf.CGroupSockopt, asm.FnGetNetnsCookie)},
		{"helper bpf_sk_storage_get in connect", haveHelper(ebpf.CGroupSockAddr, asm.FnSkStorageGet)},
		{"helper bpf_sk_storage_get in sockops", haveHelper(ebpf.SockOps, asm.FnSkStorageGet)},
		{"helper bpf_sk_storage_get in getsockopt", haveHelper(ebpf.CGroupSockopt, asm.FnSkStorageGet)},
		{"helper bpf_skc_lookup_tcp in sched_cls", haveHelper(ebpf.SchedCLS, asm.FnSkcLookupTcp)},
		{"helper bpf_sk_assign in sk_lookup", haveHelper(ebpf.SkLookup, asm.FnSkAssign)},
		{"loading of the eBPF programs", loadUnpinned},
	} {
		switch err := have.err(); {
		case errors.Is(err, redirect.ErrNotSupported):
			return fmt.Errorf("%s: %w", have.what, err)
		case err != nil:
			return fmt.Errorf("%s: %w: %w", have.what, redirect.ErrNotSupported, err)
		}
	}
	return nil
}

// haveCgroup looks whether root is a cgroup of v2. On a node that is itself a
// container its root is not that of the hierarchy, which is mounted nowhere.
func haveCgroup(root string) error {
	if root == "" {
		_, err := cgroup.Root()
		return err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(root, &st); err != nil {
		return fmt.Errorf("look at file system of %s: %w", root, err)
	}
	if st.Type != unix.CGROUP2_SUPER_MAGIC {
		return fmt.Errorf("%s is no directory of cgroup v2: %w", root, redirect.ErrNotSupported)
	}
	return nil
}

func haveType(t ebpf.ProgramType) func() error {
	return func() error { return features.HaveProgramType(t) }
}

func haveHelper(t ebpf.ProgramType, f asm.BuiltinFunc) func() error {
	return func() error { return features.HaveProgramHelper(t, f) }
}

// loadUnpinned has the kernel verify all programs. What a probe cannot ask for
// shows here: attach types, fields of contexts, helpers in combination.
func loadUnpinned() error {
	spec, err := prepare(0)
	if err != nil {
		return err
	}
	for _, m := range spec.Maps {
		m.MaxEntries = min(m.MaxEntries, 1)
	}
	var o redirectObjects
	if err := spec.LoadAndAssign(&o, nil); err != nil {
		return err
	}
	f, err := loadFinder(spec, &o.redirectMaps)
	return errors.Join(err, f.Close(), o.Close())
}

// Uninstall removes everything of a node's data plane: redirection of all
// pods, hooks, filters, addresses, pins and maps, and the bpffs if New has
// mounted it. It needs no running Redirector and removes what it can even if
// some of it fails. It mounts nothing. Of the options PinDir, NoMount, Cgroup and
// Log are used.
func Uninstall(ctx context.Context, o Options) error {
	o = o.withDefaults()
	removeTrials(o.Cgroup)
	if ok, err := isBPFFS(filepath.Dir(o.PinDir)); err != nil || !ok {
		if errors.Is(err, os.ErrNotExist) {
			err = nil
		}
		return err
	}
	errs := []error{removeTree(ctx, o)}
	if !o.NoMount {
		errs = append(errs, unmountBPFFS(filepath.Dir(o.PinDir)))
	}
	return errors.Join(errs...)
}

func removeTree(ctx context.Context, o Options) error {
	if !isDir(o.PinDir) {
		return nil
	}
	unlock, err := lock(o.PinDir, false)
	if err != nil {
		return err
	}
	defer unlock()
	r := &Redirector{dir: o.PinDir, log: o.Log}
	// After this line nothing new is led out to a proxy, after the next nothing
	// in; what was keeps working, with the hooks that answer it until the end.
	errs := []error{detachPinned(filepath.Join(r.hookDir(), "connect4")), detachPinned(filepath.Join(r.hookDir(), "connect6"))}
	pods, err := os.ReadDir(r.podsDir())
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		errs = append(errs, fmt.Errorf("read pins: %w", err))
	}
	for _, pod := range pods {
		errs = append(errs, detachAll(filepath.Join(r.podsDir(), pod.Name())))
	}
	errs = append(errs, r.cleanNamespaces(ctx), endAcceleration(o.PinDir), detachAll(r.hookDir()))
	if err := os.RemoveAll(o.PinDir); err != nil {
		errs = append(errs, fmt.Errorf("remove pins: %w", err))
	}
	return errors.Join(errs...)
}

// cleanNamespaces removes what the pods that the pinned maps know have in their
// namespaces. Of the maps it must be able to read only this one.
func (r *Redirector) cleanNamespaces(ctx context.Context) error {
	spec, err := loadRedirect()
	if err != nil {
		return fmt.Errorf("read eBPF object: %w", err)
	}
	hashes, err := readLayouts(spec, r.mapDir())
	if err != nil {
		return fmt.Errorf("find the pods: %w", err)
	}
	r.store.PodMeta, err = openMap(spec.Maps[redirectMapPodMeta], r.mapDir(), hashes)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("find the pods: %w", err)
	}
	defer func() { _ = r.store.PodMeta.Close() }()
	var errs []error
	err = r.store.each(func(_ uint64, meta *redirectSlMeta) error {
		_, err := cleanNamespace(r.dir, meta, atOnce)
		errs = append(errs, err)
		return ctx.Err()
	})
	return errors.Join(append(errs, err)...)
}
