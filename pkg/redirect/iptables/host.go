package iptables

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/pkg/redirect/cgroup"
	"github.com/sluicemesh/sluice/pkg/redirect/netns"
)

// ownNetns is the namespace of an agent on the node's network, which is the
// node's.
const ownNetns = "/proc/self/ns/net"

// A host keeps the rules of the node's own namespace, by which pods know
// connections of the node's processes that are in no pod: those come from a
// reserved address. The rules are one set for all pods, and there as long as
// one pod is.
type host struct {
	netns   string
	cgroup  string // where cgroup v2 is mounted; empty: find it
	cgroups string // a path that opens the node's cgroup namespace; empty: the own
	sources map[bool]netip.Addr
	tools   map[bool][]tool
	log     *slog.Logger

	mu sync.Mutex
	// pods are the addresses of those that know the reserved addresses.
	pods map[redirect.ID][]netip.Addr
	// known are the cgroups of pods; none means that they are not known, and
	// nothing is exempt.
	known []cgroup.Cgroup
	// lacking is why the rules of a family cannot be had.
	lacking map[bool]error
	// rules are those installed; doubt says that they may be others by now, left
	// that some of no use could not be taken away.
	rules map[bool]hostRules
	doubt bool
	left  bool
	// told is what was last logged, so that it is logged once.
	told string

	// waiting are changes that nobody has taken up; done and err of a change are
	// under mu.
	waitingMu sync.Mutex
	waiting   []*hostChange
}

// newHost returns the node's namespace, unread.
func newHost(o Options, tools map[bool][]tool) *host {
	h := &host{
		netns: cmp.Or(o.HostNetns, ownNetns), cgroup: o.Cgroup, cgroups: o.HostCgroupNS,
		sources: map[bool]netip.Addr{true: o.ProbeSource4, false: o.ProbeSource6},
		tools:   make(map[bool][]tool), log: o.Log,
		pods: make(map[redirect.ID][]netip.Addr), lacking: make(map[bool]error),
		rules: make(map[bool]hostRules), doubt: true,
	}
	if !o.ProbeSource4.IsValid() {
		h.sources[true] = netip.MustParseAddr(DefaultProbeSource4)
	}
	if !o.ProbeSource6.IsValid() {
		h.sources[false] = netip.MustParseAddr(DefaultProbeSource6)
	}
	for v4, list := range tools {
		for _, t := range list {
			t.lock = "" // others change rules here, too
			h.tools[v4] = append(h.tools[v4], t)
		}
	}
	return h
}

// hostRules are those of one family.
type hostRules struct {
	tool tool
	walk string
}

// hostTables returns what the node's namespace needs for the family of source:
// what its processes outside of the cgroups dial in pods comes from source, and
// what others send from there is dropped. What a Service has led to a pod was
// not meant for that pod, so it is not exempt.
func hostTables(source netip.Addr, cgroups []string, pods []netip.Addr) []table {
	// A packet without a socket of this namespace matches no rule about cgroups,
	// negated or not.
	var outside strings.Builder
	for _, path := range cgroups {
		fmt.Fprintf(&outside, " -m cgroup ! --path %s", quote(path))
	}
	exempt := fmt.Sprintf("-p tcp%s -m conntrack ! --ctstate DNAT -j SNAT --to-source %s", outside.String(), source)
	var to []string
	for _, a := range pods {
		if a.Is4() == source.Is4() {
			to = append(to, fmt.Sprintf("-d %s -g SLUICE_EXEMPT", netip.PrefixFrom(a, a.BitLen())))
		}
	}
	return []table{
		{
			name:  "raw",
			jumps: []jump{{"PREROUTING", fmt.Sprintf("-s %s -j SLUICE_FORGED", netip.PrefixFrom(source, source.BitLen()))}},
			walk:  []chain{{"SLUICE_FORGED", []string{"-j DROP"}}},
		},
		{
			name:  "nat",
			jumps: []jump{{"POSTROUTING", syn + " -j SLUICE_NODE"}},
			walk:  []chain{{"SLUICE_NODE", to}, {"SLUICE_EXEMPT", []string{exempt}}},
		},
	}
}

// quote returns a path as iptables-save prints it.
func quote(path string) string {
	plain := func(r rune) bool {
		return r == '_' || r == '-' || '0' <= r && r <= '9' || 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z'
	}
	if strings.ContainsFunc(path, func(r rune) bool { return !plain(r) }) {
		return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, `'`, `\'`).Replace(path) + `"`
	}
	return path
}

// hostProblem says in what have differs from want, nil if in nothing.
func hostProblem(want []table, have saved) error {
	for _, t := range want {
		old := have[t.name]
		for _, j := range t.jumps {
			switch {
			case count(old.jumps, j) != 1:
				return fmt.Errorf("rule of %s %s that leads to Sluice's: there are %d", t.name, j.builtin, count(old.jumps, j))
			case slices.Contains(old.late, j):
				return fmt.Errorf("rule of %s %s that leads to Sluice's stands behind others", t.name, j.builtin)
			}
		}
		for _, c := range t.walk {
			o, ok := old.chains[c.name]
			if !ok || !slices.EqualFunc(o.rules, c.rules, savedRule.is) {
				return fmt.Errorf("chain %s of table %s was changed by others", c.name, t.name)
			}
		}
	}
	for name, t := range have {
		i := slices.IndexFunc(want, func(w table) bool { return w.name == name })
		for c := range t.chains {
			if i < 0 || !slices.ContainsFunc(want[i].walk, func(w chain) bool { return w.name == c }) {
				return fmt.Errorf("chain %s of table %s is of no use any more", c, name)
			}
		}
	}
	return nil
}

// dropsForged says whether one of the variants drops, as want does, what others
// send from the reserved address.
func dropsForged(want []table, have map[string]saved) bool {
	raw := slices.DeleteFunc(slices.Clone(want), func(t table) bool { return t.name != "raw" })
	for _, s := range have {
		if hostProblem(raw, saved{"raw": s["raw"]}) == nil {
			return true
		}
	}
	return false
}

// walkText returns what writes the chains of tables anew and touches nothing
// else.
func walkText(tables []table) string {
	var s strings.Builder
	for _, t := range tables {
		fmt.Fprintf(&s, "*%s\n", t.name)
		for _, c := range t.walk {
			fmt.Fprintf(&s, ":%s - [0:0]\n", c.name)
		}
		for _, c := range t.walk {
			for _, r := range c.rules {
				fmt.Fprintf(&s, "-A %s %s\n", c.name, r)
			}
		}
		s.WriteString("COMMIT\n")
	}
	return s.String()
}

// source returns where exempt connections of a family come from; the zero Addr
// if there are none.
func (h *host) source(v4 bool) netip.Addr {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.known) == 0 || h.lacking[v4] != nil {
		return netip.Addr{}
	}
	return h.sources[v4]
}

// set says which addresses of a pod are redirected, none when it is not any
// more, and brings the node's rules to that.
//
// What comes while another change is under way is done in one go after it: the
// node's rules are one list of all pods, and many pods may start at a time.
func (h *host) set(ctx context.Context, id redirect.ID, addrs []netip.Addr) error {
	own := &hostChange{id: id, addrs: addrs}
	h.waitingMu.Lock()
	h.waiting = append(h.waiting, own)
	h.waitingMu.Unlock()

	h.mu.Lock()
	defer h.mu.Unlock()
	if own.done {
		return own.err
	}
	h.waitingMu.Lock()
	changes := h.waiting
	h.waiting = nil
	h.waitingMu.Unlock()
	for _, c := range changes {
		if len(c.addrs) == 0 {
			delete(h.pods, c.id)
		} else {
			h.pods[c.id] = c.addrs
		}
	}
	err := h.refresh(ctx)
	for _, c := range changes {
		// One that gave up says nothing about the others, who try themselves.
		c.done, c.err = c == own || ctx.Err() == nil, err
	}
	return err
}

// refresh brings the node's rules to what is known of pods and cgroups.
func (h *host) refresh(ctx context.Context) error {
	if len(h.pods) > 0 && !h.current() {
		if err := h.look(ctx); err != nil {
			return err
		}
	}
	return h.apply(ctx)
}

// A hostChange is what set was asked for, and what became of it.
type hostChange struct {
	id    redirect.ID
	addrs []netip.Addr
	done  bool
	err   error
}

// check looks whether the node's rules are what they should be. It mends what
// follows from pods and cgroups that came and went, and names what others have
// changed, which set mends.
func (h *host) check(ctx context.Context) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	before := slices.Clone(h.known)
	h.lacking = make(map[bool]error) // it may have been the moment
	if err := h.look(ctx); err != nil {
		return err
	}
	if len(h.pods) == 0 || !slices.Equal(before, h.known) {
		return h.apply(ctx)
	}
	err := h.do(func() error {
		for _, v4 := range []bool{true, false} {
			rules, ok := h.rules[v4]
			if !ok {
				continue
			}
			s, _, err := rules.tool.read(ctx)
			if err == nil {
				err = hostProblem(h.want(v4), s)
			}
			if err != nil {
				return fmt.Errorf("node's %s rules (%s): %w", familyName(v4), rules.tool.variant, err)
			}
		}
		return nil
	})
	h.doubt = h.doubt || err != nil
	if err != nil {
		return err
	}
	return h.apply(ctx)
}

// inDoubt says whether set has something to do although no pod changed.
func (h *host) inDoubt() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.doubt || len(h.known) > 0 && !h.current()
}

// current says whether the cgroups found last are still those at their paths.
func (h *host) current() bool {
	for _, c := range h.known {
		if now, err := cgroup.Get(c.Path); err != nil || now != c {
			return false
		}
	}
	return len(h.known) > 0
}

// look finds the cgroups of pods.
func (h *host) look(ctx context.Context) error {
	root, err := h.root()
	var found []cgroup.Cgroup
	if err == nil {
		found, err = cgroup.Pods(root)
	}
	if err != nil && !errors.Is(err, cgroup.ErrUnknown) && !errors.Is(err, redirect.ErrNotSupported) {
		return err
	}
	h.known = found
	if err != nil {
		h.tell(ctx, err)
	}
	return nil
}

// root returns where cgroup v2 is mounted.
func (h *host) root() (string, error) {
	if h.cgroup != "" {
		return h.cgroup, nil
	}
	return cgroup.Root()
}

// tell logs, once for each state, whether and why not connections are exempt.
func (h *host) tell(ctx context.Context, err error) {
	told := "exempt"
	if err != nil {
		told = err.Error()
	}
	if told == h.told {
		return
	}
	h.told = told
	if err != nil {
		h.log.WarnContext(ctx, "probes of the kubelet are captured like any other connection",
			"backend", redirect.BackendIPTables, "reason", err)
		return
	}
	h.log.InfoContext(ctx, "processes of the node outside of pods are exempt",
		"backend", redirect.BackendIPTables, "pods", h.known[0].Path)
}

// want returns the tables of a family, nil if it needs none.
func (h *host) want(v4 bool) []table {
	var addrs []netip.Addr
	for _, pod := range h.pods {
		for _, a := range pod {
			if a.Is4() == v4 {
				addrs = append(addrs, a)
			}
		}
	}
	if len(addrs) == 0 || len(h.known) == 0 || h.lacking[v4] != nil {
		return nil
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	root, err := h.root()
	if err != nil {
		return nil // look has found it
	}
	var paths []string
	for _, c := range h.known {
		rel, err := filepath.Rel(root, c.Path)
		if err != nil {
			return nil // look has found c below it
		}
		paths = append(paths, rel)
	}
	return hostTables(h.sources[v4], paths, slices.Compact(addrs))
}

// apply brings the node's rules to what is wanted. What cannot be had is no
// error: then nothing is exempt, and the log says why. Where it was to be had
// before, what is there stays, and it is an error.
func (h *host) apply(ctx context.Context) error {
	var todo []bool
	for _, v4 := range []bool{true, false} {
		if h.doubt || h.left || walkText(h.want(v4)) != h.rules[v4].walk {
			todo = append(todo, v4)
		}
	}
	if len(todo) == 0 {
		return nil
	}
	h.left = false
	err := h.do(func() error {
		var errs []error
		for _, v4 := range todo {
			err := h.applyFamily(ctx, v4)
			// A cgroup of pods may have gone since it was found.
			for range 3 {
				if h.lacking[v4] == nil && err == nil || h.current() || ctx.Err() != nil {
					break
				}
				delete(h.lacking, v4)
				if err = h.look(ctx); err == nil {
					err = h.applyFamily(ctx, v4)
				}
			}
			if err != nil {
				errs = append(errs, fmt.Errorf("change the node's %s rules: %w", familyName(v4), err))
			}
		}
		return errors.Join(errs...)
	})
	h.doubt = err != nil
	return err
}

// applyFamily runs inside the node's namespace.
func (h *host) applyFamily(ctx context.Context, v4 bool) error {
	want := h.want(v4)
	if old, ok := h.rules[v4]; ok && !h.doubt && want != nil {
		walk := walkText(want)
		if err := old.tool.apply(ctx, walk); err != nil {
			return err
		}
		h.rules[v4] = hostRules{old.tool, walk}
		return nil
	}
	delete(h.rules, v4)
	have := make(map[string]saved)
	var chosen tool
	inUse := false
	for _, t := range h.tools[v4] {
		s, foreign, err := t.read(ctx)
		if err != nil {
			return err
		}
		have[t.variant] = s
		// What others use here, too; of rules of both variants the kernel may
		// look at one's NAT alone.
		if chosen.variant == "" || foreign && !inUse {
			chosen, inUse = t, foreign
		}
	}
	if want != nil {
		err := chosen.apply(ctx, installText(want, have[chosen.variant]))
		switch {
		// Pods trust the reserved address: who drops what others send from there
		// stays, and serves the pods that it knows.
		case err != nil && (ctx.Err() != nil || dropsForged(want, have)):
			return err
		case err != nil:
			h.lacking[v4], want = err, nil
			h.tell(ctx, err)
		default:
			h.rules[v4] = hostRules{chosen, walkText(want)}
			h.tell(ctx, nil)
		}
	}
	for _, t := range h.tools[v4] {
		if want != nil && t.variant == chosen.variant {
			continue
		}
		if text := removeText(have[t.variant]); text != "" {
			err := t.apply(ctx, text)
			if err != nil && (ctx.Err() != nil || h.lacking[v4] == nil) {
				return err
			}
			// Pods must learn in any case that nothing is exempt.
			h.left = h.left || err != nil
		}
	}
	return nil
}

// do runs fn on a thread in the node's network namespace and, where there is
// one, in its cgroup namespace: the kernel takes paths of cgroups from there.
func (h *host) do(fn func() error) error {
	return netns.Do(h.netns, func() error { return h.withCgroups(fn) })
}

// withCgroups is the part of do that concerns cgroups, on a thread that is its
// caller's alone.
func (h *host) withCgroups(fn func() error) error {
	if h.cgroups == "" {
		return fn()
	}
	home, err := unix.Open("/proc/thread-self/ns/cgroup", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open own cgroup namespace: %w", err)
	}
	defer func() { _ = unix.Close(home) }()
	there, err := unix.Open(h.cgroups, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open cgroup namespace %s: %w", h.cgroups, err)
	}
	defer func() { _ = unix.Close(there) }()
	if err := unix.Setns(there, unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("enter cgroup namespace %s: %w", h.cgroups, err)
	}
	err = fn()
	if unix.Setns(home, unix.CLONE_NEWCGROUP) != nil {
		runtime.Goexit() // and the thread with it
	}
	return err
}
