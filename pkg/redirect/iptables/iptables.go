package iptables

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/pkg/redirect/netns"
)

// DefaultStateDir is where records are unless Options say otherwise. It must
// not outlive the machine's uptime: namespaces do not either.
const DefaultStateDir = "/run/sluice/iptables"

// DefaultProbeSource4 and DefaultProbeSource6 are where connections of the
// node's own processes come from, unless Options say otherwise.
const (
	DefaultProbeSource4 = "169.254.81.206"
	DefaultProbeSource6 = "fd51:ce00::51ce"
)

// probeTimeout bounds the look at what the kernel can do.
const probeTimeout = 10 * time.Second

// Options say how to redirect with iptables.
type Options struct {
	// StateDir holds one small file per workload; empty means DefaultStateDir.
	// It is made if it is not there.
	StateDir string
	// Variant is VariantNFT or VariantLegacy; empty takes, for each family and
	// pod, what the pod's namespace has rules of, else nft, else legacy, of
	// those that the machine and its kernel have.
	Variant string
	// HostNetns is a path that opens the node's own network namespace, whose
	// processes are exempt unless they are a pod's. Empty means this process'.
	HostNetns string
	// Cgroup is where cgroup v2 is mounted, below which the cgroups of pods are
	// looked for; empty finds it.
	Cgroup string
	// HostCgroupNS is a path that opens the cgroup namespace whose root is what
	// Cgroup shows, /proc/1/ns/cgroup of the node; empty means this process'.
	HostCgroupNS string
	// ProbeSource4 and ProbeSource6 are addresses that nobody on the node's
	// networks has. Connections that are exempt come from there, so pods must
	// route them to the node. Zero means the defaults.
	ProbeSource4, ProbeSource6 netip.Addr
	// Log gets one line for each change of a pod's rules; nil drops them.
	Log *slog.Logger
}

// A Redirector redirects with nat rules in the namespaces of pods.
type Redirector struct {
	records records
	log     *slog.Logger
	// tools are what works here, the preferred first; why says what does not,
	// by family.
	tools map[bool][]tool // by "is IPv4"
	why   map[bool]error
	// host is the node's own namespace.
	host *host

	turns redirect.Turns[redirect.ID]

	mu sync.Mutex
	// shown are the highest values that Counters has returned.
	shown map[counterKey]uint64
}

var (
	_ redirect.Redirector = (*Redirector)(nil)
	_ redirect.Yielder    = (*Redirector)(nil)
	_ redirect.Meter      = (*Redirector)(nil)
)

// New finds out which variants work here and opens the records, which one
// process at a time may use. The error wraps
// redirect.ErrNotSupported if none works for IPv4 nor for IPv6.
func New(o Options) (*Redirector, error) { return open(o, lookPath) }

// open is New with another way to find programs.
func open(o Options, look func(string) (string, error)) (*Redirector, error) {
	if o.StateDir == "" {
		o.StateDir = DefaultStateDir
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	switch o.Variant {
	case "", VariantNFT, VariantLegacy:
	default:
		return nil, fmt.Errorf("choose variant of iptables: there is no %q", o.Variant)
	}
	if err := os.MkdirAll(o.StateDir, 0o700); err != nil {
		return nil, fmt.Errorf("make directory of records: %w", err)
	}
	r := &Redirector{
		records: records{o.StateDir},
		log:     o.Log,
		tools:   make(map[bool][]tool),
		why:     make(map[bool]error),
		shown:   make(map[counterKey]uint64),
	}
	ctx, cancel := context.WithTimeout(context.Background(), probeTimeout)
	defer cancel()
	for _, v4 := range []bool{true, false} {
		for _, variant := range []string{VariantNFT, VariantLegacy} {
			if o.Variant != "" && o.Variant != variant {
				continue
			}
			t, err := findTool(look, variant, v4, filepath.Join(o.StateDir, "xtables.lock"))
			if err == nil {
				err = t.probe(ctx, "")
			}
			if err == nil {
				t.noCgroups = t.probeCgroups(ctx)
			}
			if err != nil {
				r.why[v4] = errors.Join(r.why[v4], err)
				continue
			}
			r.tools[v4] = append(r.tools[v4], t)
		}
	}
	if len(r.tools) == 0 {
		return nil, errors.Join(r.why[true], r.why[false])
	}
	if err := r.records.sweep(); err != nil {
		return nil, err
	}
	r.host = newHost(o, r.tools)
	all, err := r.records.all()
	if err != nil {
		r.log.Warn("records of workloads are lost", "err", err)
	}
	for _, rec := range all {
		if addrs := rec.exempt(); rec.Complete && !rec.Draining && len(addrs) > 0 {
			r.host.pods[rec.ID] = addrs
		}
	}
	return r, nil
}

// Probe says whether New would work: nil, or an error that wraps
// redirect.ErrNotSupported and names what is missing.
func Probe(o Options) error {
	dir, err := os.MkdirTemp("", "sluice-iptables-")
	if err != nil {
		return fmt.Errorf("make directory of records: %w", err)
	}
	o.StateDir = dir
	_, err = New(o)
	return errors.Join(err, os.RemoveAll(dir))
}

// Uninstall removes the rules of all workloads that have a record in
// o.StateDir, those of the node even if there is no record, then the directory.
// It ends the connections that are redirected. After an error it goes on, and
// the directory stays.
func Uninstall(ctx context.Context, o Options) error {
	if o.StateDir == "" {
		o.StateDir = DefaultStateDir
	}
	rs := records{o.StateDir}
	all, unread := rs.all()
	if errors.Is(unread, os.ErrNotExist) {
		// The directory may have been removed before the rules. It is made once
		// more for as long as this takes.
		unread = nil
	}
	r, err := New(o)
	switch {
	case errors.Is(err, redirect.ErrNotSupported) && len(all) == 0 && unread == nil:
	case err != nil:
		return errors.Join(unread, err)
	default:
		errs := []error{unread}
		for _, rec := range all {
			errs = append(errs, r.remove(ctx, rec.ID, atOnce))
		}
		errs = append(errs, r.host.set(ctx, redirect.ID{}, nil))
		if err := errors.Join(errs...); err != nil {
			return err
		}
	}
	if err := os.RemoveAll(o.StateDir); err != nil {
		return fmt.Errorf("remove directory of records: %w", err)
	}
	return nil
}

// Add implements redirect.Redirector.
func (r *Redirector) Add(ctx context.Context, w redirect.Workload) error {
	defer r.turns.Take(w.ID)()
	if err := validate(w); err != nil {
		return err
	}
	if err := present(w.ID, w.Netns); err != nil {
		return err
	}
	if err := netns.Do(w.Netns, func() error { return haveInterfaces(w.Interfaces) }); err != nil {
		return fmt.Errorf("redirect pod %s with iptables: %w", w.Pod, err)
	}
	old, ok, err := r.records.read(w.ID)
	if err != nil {
		// A record that cannot be read says nothing; the rules say the rest.
		r.log.WarnContext(ctx, "record of workload is lost", "pod", w.Pod, "pod_uid", w.ID.PodUID, "err", err)
	}
	if ok && old.Digest == w.Digest() && old.Netns == w.Netns && !r.host.inDoubt() && r.problem(ctx, old) == nil {
		return nil
	}
	rec := record{Format: format, ID: w.ID, Pod: w.Pod, Netns: w.Netns, Digest: w.Digest(), Interfaces: w.Interfaces, Rules: old.Rules, ProxySource: old.ProxySource}
	// Already now: what is added below is found again if this process dies first.
	if _, has6 := address(w, false); has6 {
		rec.ProxySource = true
	}
	if err := r.records.write(rec); err != nil {
		return err
	}
	// The node's rules come first: until they drop what others send from the
	// reserved address, no pod may trust it.
	noWayBack, err := r.exempt(ctx, w)
	if err != nil {
		return err
	}
	if rec.Rules, err = r.install(ctx, w, old, noWayBack); err != nil {
		return fmt.Errorf("redirect pod %s with iptables: %w", w.Pod, err)
	}
	if rec.variant(false) != "" {
		if err := addProxySource(ctx, w.Netns); err != nil {
			return err
		}
		rec.ProxySource = true // also if another backend has left it here
	}
	rec.Complete = true
	if err := r.records.write(rec); err != nil {
		return err
	}
	r.log.InfoContext(ctx, "redirecting pod", "pod", w.Pod, "pod_uid", w.ID.PodUID, "netns", w.Netns,
		"backend", redirect.BackendIPTables, "iptables", rec.variant(true), "ip6tables", rec.variant(false))
	return nil
}

// exempt makes the node's own connections to w known as such, in the families
// in which the pod's answers lead back to the node; it returns the others.
func (r *Redirector) exempt(ctx context.Context, w redirect.Workload) (noWayBack map[bool]bool, err error) {
	noWayBack = make(map[bool]bool)
	var addrs []netip.Addr
	err = netns.Do(w.Netns, func() error {
		for _, a := range w.Addrs {
			source := r.host.sources[a.Is4()]
			ok, err := leadsTo(source, w.Interfaces)
			if err != nil {
				return err
			}
			if ok {
				addrs = append(addrs, a)
				continue
			}
			noWayBack[a.Is4()] = true
			r.log.WarnContext(ctx, "probes of the kubelet are captured: the pod has no route to the address that exempt ones come from",
				"pod", w.Pod, "pod_uid", w.ID.PodUID, "netns", w.Netns, "backend", redirect.BackendIPTables, "address", source)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return noWayBack, r.host.set(ctx, w.ID, addrs)
}

// install brings the namespace from whatever is there to the rules of w, both
// families side by side.
func (r *Redirector) install(ctx context.Context, w redirect.Workload, old record, noWayBack map[bool]bool) ([]installedRules, error) {
	families := []bool{true, false}
	found := make([]*installedRules, len(families))
	var g errgroup.Group
	for i, v4 := range families {
		g.Go(func() error {
			return netns.Do(w.Netns, func() error {
				return r.host.withCgroups(func() (err error) {
					found[i], err = r.installFamily(ctx, w, v4, old, noWayBack[v4])
					return err
				})
			})
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	var rules []installedRules
	for _, f := range found {
		if f != nil {
			rules = append(rules, *f)
		}
	}
	return rules, nil
}

// installFamily is install for one family, inside the namespace. It returns nil
// if the pod does not have the family.
func (r *Redirector) installFamily(ctx context.Context, w redirect.Workload, v4 bool, old record, noWayBack bool) (*installedRules, error) {
	addr, ok := address(w, v4)
	have := make(map[string]saved)
	var foreign []string
	for _, t := range r.tools[v4] {
		s, others, err := t.read(ctx)
		if err != nil {
			return nil, err
		}
		have[t.variant] = s
		if others {
			foreign = append(foreign, t.variant)
		}
	}
	var chosen tool
	var rules *installedRules
	if ok {
		var err error
		if chosen, err = r.choose(v4, append([]string{old.variant(v4)}, foreign...)); err != nil {
			return nil, err
		}
		var source netip.Addr
		if !noWayBack {
			source = r.host.source(v4)
		}
		if w.ProxyCgroup != "" && chosen.noCgroups != nil {
			r.log.WarnContext(ctx, "any process with the proxy's user passes for the proxy: rules cannot tell its container",
				"pod", w.Pod, "pod_uid", w.ID.PodUID, "netns", w.Netns, "backend", redirect.BackendIPTables, "reason", chosen.noCgroups)
			w.ProxyCgroup = ""
		}
		// From here on traffic is affected.
		if err := chosen.apply(ctx, installText(tables(w, addr, source), have[chosen.variant])); err != nil {
			return nil, err
		}
		s, _, err := chosen.read(ctx)
		if err != nil {
			return nil, err
		}
		rules = &installedRules{
			V4: v4, Variant: chosen.variant, Hash: s.hash(),
			Addr: addr, Source: source, NoWayBack: noWayBack,
		}
	}
	for _, t := range r.tools[v4] {
		if text := removeText(have[t.variant]); t.variant != chosen.variant && text != "" {
			if err := t.apply(ctx, text); err != nil {
				return nil, err
			}
		}
	}
	return rules, nil
}

// choose returns the first of the wanted variants that works here, else the
// preferred one.
func (r *Redirector) choose(v4 bool, wanted []string) (tool, error) {
	for _, variant := range wanted {
		for _, t := range r.tools[v4] {
			if t.variant == variant {
				return t, nil
			}
		}
	}
	if len(r.tools[v4]) == 0 {
		return tool{}, r.why[v4]
	}
	return r.tools[v4][0], nil
}

// Remove implements redirect.Redirector. While connections live that were
// redirected, an idle rule stays that keeps the kernel's NAT for them; List takes
// it away when they have ended. Empty built-in chains stay: they belong to the
// namespace.
func (r *Redirector) Remove(ctx context.Context, id redirect.ID) error {
	return r.remove(ctx, id, whenIdle)
}

// Yield implements redirect.Yielder. It leaves what Remove leaves, and ::6.
func (r *Redirector) Yield(ctx context.Context, id redirect.ID) error {
	return r.remove(ctx, id, yielded)
}

// An ending says what becomes of what connections still need.
type ending int

const (
	atOnce   ending = iota // it goes, and the connections end
	whenIdle               // it stays as long as they do
	yielded                // as whenIdle, but ::6 is the next backend's
)

// remove ends a redirection.
func (r *Redirector) remove(ctx context.Context, id redirect.ID, how ending) error {
	defer r.turns.Take(id)()
	rec, ok, err := r.records.read(id)
	if err != nil || !ok {
		return err
	}
	alive, drained := false, rec.Draining
	if how == yielded && rec.ProxySource {
		rec.ProxySource, drained = false, false
	}
	err = present(id, rec.Netns)
	if err == nil {
		alive, err = r.uninstall(ctx, rec, how != atOnce)
	}
	if err != nil && !errors.Is(err, redirect.ErrGone) {
		return fmt.Errorf("end redirection of pod %s with iptables: %w", rec.Pod, err)
	}
	if err := r.host.set(ctx, id, nil); err != nil {
		return err
	}
	r.forget(id)
	switch {
	case alive && drained:
		return nil
	case alive:
		rec.Draining = true
		err = r.records.write(rec)
	default:
		err = r.records.remove(id)
	}
	if err != nil {
		return err
	}
	r.log.InfoContext(ctx, "no longer redirecting pod", "pod", rec.Pod, "pod_uid", id.PodUID, "netns", rec.Netns,
		"backend", redirect.BackendIPTables, "connections_left", alive)
	return nil
}

// uninstall takes everything away, or with drain set what new connections meet
// as long as old ones are alive.
func (r *Redirector) uninstall(ctx context.Context, rec record, drain bool) (alive bool, err error) {
	families := []bool{true, false}
	held := make([]bool, len(families))
	var g errgroup.Group
	for i, v4 := range families {
		g.Go(func() error {
			return netns.Do(rec.Netns, func() (err error) {
				held[i], err = r.uninstallFamily(ctx, rec, v4, drain)
				return err
			})
		})
	}
	err = g.Wait()
	alive = slices.Contains(held, true)
	if err == nil && rec.ProxySource && !alive {
		err = removeProxySource(rec.Netns)
	}
	return alive, err
}

// uninstallFamily is uninstall for one family, inside the namespace.
func (r *Redirector) uninstallFamily(ctx context.Context, rec record, v4, drain bool) (alive bool, err error) {
	hold := false
	if drain {
		if hold, err = draining(v4); err != nil {
			return false, err
		}
	}
	var errs []error
	for _, t := range r.tools[v4] {
		s, _, err := t.read(ctx)
		text := removeText(s)
		if hold && text != "" {
			alive = true
			text = installText(holdTables(), s)
			if rec.Draining {
				text = "" // done before
			}
		}
		if err == nil && text != "" {
			err = t.apply(ctx, text)
		}
		errs = append(errs, err)
	}
	return alive, errors.Join(errs...)
}

// List implements redirect.Redirector.
func (r *Redirector) List(ctx context.Context) ([]redirect.Installed, error) {
	all, unread := r.records.all()
	node := r.host.check(ctx)
	var g errgroup.Group
	g.SetLimit(runtime.GOMAXPROCS(0))
	problems := make([]error, len(all))
	for i, rec := range all {
		if rec.Draining {
			g.Go(func() error {
				problems[i] = r.drained(ctx, rec.ID)
				return nil
			})
			continue
		}
		g.Go(func() error {
			defer r.turns.Take(rec.ID)()
			problems[i] = r.problem(ctx, rec)
			return nil
		})
	}
	err := errors.Join(unread, g.Wait())
	var list []redirect.Installed
	for i, rec := range all {
		if !rec.Draining && problems[i] == nil {
			problems[i] = node
		}
		// Of what Remove has left only what will not go is of interest.
		if !rec.Draining || problems[i] != nil {
			list = append(list, redirect.Installed{ID: rec.ID, Pod: rec.Pod, Netns: rec.Netns, Digest: rec.Digest, Problem: problems[i]})
		}
	}
	return list, err
}

// drained ends what Remove has left for the sake of connections, if it was not
// taken up by Add again.
func (r *Redirector) drained(ctx context.Context, id redirect.ID) error {
	rec, ok, err := r.records.read(id)
	if err != nil || !ok || !rec.Draining {
		return err
	}
	return r.Remove(ctx, id)
}

// problem compares a record with the kernel.
func (r *Redirector) problem(ctx context.Context, rec record) error {
	if rec.Format != format {
		return fmt.Errorf("rules have layout %d, not %d", rec.Format, format)
	}
	if !rec.Complete {
		return errors.New("installation was interrupted")
	}
	if err := present(rec.ID, rec.Netns); err != nil {
		return err
	}
	for _, i := range rec.Rules {
		if source := r.host.source(i.V4); !i.NoWayBack && i.Source != source {
			return fmt.Errorf("%s rules know exempt connections of the node by source %s, not %s", familyName(i.V4), i.Source, source)
		}
	}
	err := netns.Do(rec.Netns, func() error {
		if err := haveInterfaces(rec.Interfaces); err != nil {
			return err
		}
		for _, i := range rec.Rules {
			t, err := r.choose(i.V4, []string{i.Variant})
			if err != nil {
				return err
			}
			s, _, err := t.read(ctx)
			if err != nil {
				return err
			}
			if s.hash() != i.Hash {
				return fmt.Errorf("%s rules (%s) were changed by others", familyName(i.V4), i.Variant)
			}
		}
		return nil
	})
	if err != nil || rec.variant(false) == "" {
		return err
	}
	has, err := hasProxySource(rec.Netns)
	if err == nil && !has {
		err = errors.New("address ::6 is missing on lo")
	}
	return err
}

// Close implements redirect.Redirector; there is nothing to free.
func (r *Redirector) Close() error { return nil }

// present returns an error that wraps redirect.ErrGone unless path leads to
// the namespace of id.
func present(id redirect.ID, path string) error {
	ino, err := netns.Inode(path)
	if err != nil {
		return err
	}
	if ino != id.NetnsInode {
		return fmt.Errorf("open network namespace %s: another one is there, %d: %w", path, ino, redirect.ErrGone)
	}
	return nil
}

// address returns the workload's address of a family.
func address(w redirect.Workload, v4 bool) (netip.Addr, bool) {
	for _, a := range w.Addrs {
		if a.Is4() == v4 {
			return a, true
		}
	}
	return netip.Addr{}, false
}

// validate refuses what cannot be said in rules. Names of interfaces come from
// annotations and become part of them.
func validate(w redirect.Workload) error {
	if len(w.Addrs) == 0 {
		return fmt.Errorf("redirect pod %s: it has no address", w.Pod)
	}
	for i, a := range w.Addrs {
		if !a.IsValid() || a.Is4In6() || a.Zone() != "" || i > 0 && a.Is4() == w.Addrs[0].Is4() || i > 1 {
			return fmt.Errorf("redirect pod %s: unexpected address %s", w.Pod, a)
		}
	}
	for _, names := range [][]string{w.Interfaces, w.Policy.ExcludeInterfaces} {
		for _, n := range names {
			// A + at the end is iptables' wildcard.
			if n == "" || len(n) > 15 || strings.ContainsAny(n, " \t\n\"'\\/+!") {
				return fmt.Errorf("redirect pod %s: interface name %q cannot be used in rules", w.Pod, n)
			}
		}
	}
	return nil
}
