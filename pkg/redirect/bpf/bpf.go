package bpf

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/link"

	"github.com/sluicemesh/sluice/pkg/redirect"
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
	// Cgroup is the cgroup v2 directory that all hooks attach to. Empty means
	// the root of the hierarchy for sockops and for the others the cgroup of
	// all pods below it (kubepods.slice or kubepods), where there is one.
	Cgroup string
	// Sizes of maps that do not exist yet; those that exist keep theirs.
	Sizes Sizes
	// Log receives what happened to the node's hooks. Nil discards it.
	Log *slog.Logger

	// forceCLS uses cls_bpf although the kernel has tcx.
	forceCLS bool
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
}

// A Redirector is the eBPF data plane of this node. It implements
// redirect.Redirector and redirect.Meter.
type Redirector struct {
	store    store
	programs redirectPrograms
	dir      string
	cgroup   string // empty: find it
	log      *slog.Logger
	forceCLS bool
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
// one connection to the next. It needs Linux 5.17; errors wrap
// redirect.ErrNotSupported where the kernel lacks something, and
// ErrIncompatible if what is pinned cannot be taken over; nothing is changed
// then. Close the Redirector when done; what is pinned stays.
func New(o Options) (*Redirector, error) {
	o = o.withDefaults()
	if err := Probe(); err != nil {
		return nil, err
	}
	if err := mountBPFFS(filepath.Dir(o.PinDir)); err != nil {
		return nil, err
	}
	r := &Redirector{dir: o.PinDir, cgroup: o.Cgroup, log: o.Log, forceCLS: o.forceCLS}
	for _, dir := range []string{r.dir, r.mapDir(), r.hookDir(), r.podsDir()} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("make pin directory: %w", err)
		}
	}
	unlock, err := lock(r.dir)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := r.load(o.Sizes); err != nil {
		return nil, err
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
func (r *Redirector) load(sizes Sizes) error {
	spec, err := prepare()
	if err != nil {
		return err
	}
	for name, n := range map[string]uint32{
		redirectMapPods: sizes.Pods, redirectMapPodMeta: sizes.Pods, redirectMapStats: sizes.Pods,
		redirectMapPodIps: 2 * sizes.Pods, redirectMapListeners: 2 * sizes.Pods,
		redirectMapPorts: sizes.Ports, redirectMapCidrs: sizes.CIDRs, redirectMapHandover: sizes.Handover,
	} {
		if n != 0 {
			spec.Maps[name].MaxEntries = n
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
	if err := r.store.writeLayouts(spec); err != nil {
		return errors.Join(err, r.Close())
	}
	return nil
}

// prepare returns the embedded object, set up for this kernel.
func prepare() (*ebpf.CollectionSpec, error) {
	spec, err := loadRedirect()
	if err != nil {
		return nil, fmt.Errorf("read eBPF object: %w", err)
	}
	have := uint8(0)
	if features.HaveProgramHelper(ebpf.CGroupSockAddr, asm.FnSkcToMptcpSock) == nil {
		have = 1
	}
	if err := spec.Variables[redirectVarSlHaveMptcp].Set(have); err != nil {
		return nil, fmt.Errorf("set up eBPF object: %w", err)
	}
	return spec, nil
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
	root, pods := r.cgroup, r.cgroup
	if root == "" {
		var err error
		if root, err = findCgroup(); err != nil {
			return nil, err
		}
		pods = podsCgroup(root)
	}
	return []hook{
		{"getsockopt", ebpf.AttachCGroupGetsockopt, r.programs.SlGetsockopt, pods},
		{"sockops", ebpf.AttachCGroupSockOps, r.programs.SlSockops, root},
		{"getpeername4", ebpf.AttachCgroupInet4GetPeername, r.programs.SlGetpeername4, pods},
		{"getpeername6", ebpf.AttachCgroupInet6GetPeername, r.programs.SlGetpeername6, pods},
		{"connect4", ebpf.AttachCGroupInet4Connect, r.programs.SlConnect4, pods},
		{"connect6", ebpf.AttachCGroupInet6Connect, r.programs.SlConnect6, pods},
	}, nil
}

// attachHooks attaches what serves all pods, or updates it.
func (r *Redirector) attachHooks() error {
	hooks, err := r.hooks()
	if err != nil {
		return err
	}
	for _, h := range hooks {
		id, err := cgroupID(h.cgroup)
		if err != nil {
			return err
		}
		err = attachPinned(filepath.Join(r.hookDir(), h.name), h.prog,
			func(i *link.Info) bool { return i.Cgroup() != nil && i.Cgroup().CgroupId == id },
			func() (link.Link, error) {
				r.log.Info("attaching hook", "hook", h.name, "cgroup", h.cgroup)
				l, err := link.AttachCgroup(link.CgroupOptions{Path: h.cgroup, Attach: h.attach, Program: h.prog})
				if err != nil {
					return nil, fmt.Errorf("attach %s to cgroup %s: %w", h.name, h.cgroup, err)
				}
				return l, nil
			})
		if err != nil {
			return err
		}
	}
	return nil
}

// hookProblem names the first hook that is not attached as it should be.
func (r *Redirector) hookProblem() error {
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
		info, err := l.Info()
		_ = l.Close()
		if err != nil {
			return fmt.Errorf("hook %s: read link: %w", h.name, err)
		}
		if info.Cgroup() == nil || info.Cgroup().CgroupId != id {
			return fmt.Errorf("hook %s is not attached to cgroup %s", h.name, h.cgroup)
		}
	}
	return nil
}

// takeOver makes every hook of the node and of the pods run this build's
// programs. All builds that may do so share the maps, so the order is free.
func (r *Redirector) takeOver() error {
	if err := r.attachHooks(); err != nil {
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
		if err := r.attachPod(meta, pod); err != nil {
			r.log.Warn("pod keeps its old programs", "pod", text(meta.Pod[:]), "pod_uid", text(meta.Uid[:]), "err", err)
		}
		return nil
	})
}

// Close implements redirect.Redirector.
func (r *Redirector) Close() error {
	return errors.Join(r.store.Close(), r.programs.Close())
}

// Probe returns nil if this machine has all that New needs, else an error that
// wraps redirect.ErrNotSupported and names the first thing that is missing. It
// loads the programs and attaches nothing.
func Probe() error {
	for _, have := range []struct {
		what string
		err  func() error
	}{
		{"cgroup v2 mounted", func() error { _, err := findCgroup(); return err }},
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
		{"helper bpf_get_netns_cookie in sockops", haveHelper(ebpf.SockOps, asm.FnGetNetnsCookie)},
		{"helper bpf_get_netns_cookie in getsockopt", haveHelper(ebpf.CGroupSockopt, asm.FnGetNetnsCookie)},
		{"helper bpf_sk_storage_get in connect", haveHelper(ebpf.CGroupSockAddr, asm.FnSkStorageGet)},
		{"helper bpf_sk_storage_get in sockops", haveHelper(ebpf.SockOps, asm.FnSkStorageGet)},
		{"helper bpf_sk_storage_get in getsockopt", haveHelper(ebpf.CGroupSockopt, asm.FnSkStorageGet)},
		{"helper bpf_skc_lookup_tcp in tcx", haveHelper(ebpf.SchedCLS, asm.FnSkcLookupTcp)},
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

func haveType(t ebpf.ProgramType) func() error {
	return func() error { return features.HaveProgramType(t) }
}

func haveHelper(t ebpf.ProgramType, f asm.BuiltinFunc) func() error {
	return func() error { return features.HaveProgramHelper(t, f) }
}

// loadUnpinned has the kernel verify all programs. What a probe cannot ask for
// shows here: attach types, fields of contexts, helpers in combination.
func loadUnpinned() error {
	spec, err := prepare()
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
	return o.Close()
}

// Uninstall removes everything of a node's data plane: redirection of all
// pods, hooks, filters, addresses, pins and maps, and the bpffs if New has
// mounted it. It needs no running Redirector and removes what it can even if
// some of it fails. Only PinDir of the options is used.
func Uninstall(ctx context.Context, o Options) error {
	o = o.withDefaults()
	if ok, err := isBPFFS(filepath.Dir(o.PinDir)); err != nil || !ok {
		if errors.Is(err, os.ErrNotExist) {
			err = nil
		}
		return err
	}
	errs := []error{removeTree(ctx, o)}
	return errors.Join(append(errs, unmountBPFFS(filepath.Dir(o.PinDir)))...)
}

func removeTree(ctx context.Context, o Options) error {
	if !isDir(o.PinDir) {
		return nil
	}
	unlock, err := lock(o.PinDir)
	if err != nil {
		return err
	}
	defer unlock()
	r := &Redirector{dir: o.PinDir, log: o.Log}
	// The connect hooks come first in the directory: after this line nothing
	// new is led to a proxy, and what was keeps working.
	errs := []error{detachAll(r.hookDir())}
	pods, err := os.ReadDir(r.podsDir())
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		errs = append(errs, fmt.Errorf("read pins: %w", err))
	}
	for _, pod := range pods {
		errs = append(errs, detachAll(filepath.Join(r.podsDir(), pod.Name())))
	}
	errs = append(errs, r.cleanNamespaces(ctx))
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
		_, err := cleanNamespace(meta, atOnce)
		errs = append(errs, err)
		return ctx.Err()
	})
	return errors.Join(append(errs, err)...)
}
