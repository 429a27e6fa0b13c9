package redirect

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// journal is what fake backends were told, in order.
type journal struct{ lines []string }

func (j *journal) note(format string, args ...any) {
	j.lines = append(j.lines, fmt.Sprintf(format, args...))
}

func (j *journal) take() []string {
	lines := j.lines
	j.lines = nil
	return lines
}

// fake is a backend in memory.
type fake struct {
	name Backend
	log  *journal
	have map[ID]Workload
	err  error
}

func (f *fake) Add(_ context.Context, w Workload) error {
	f.log.note("%s add", f.name)
	if f.err != nil {
		return f.err
	}
	f.have[w.ID] = w
	return nil
}

func (f *fake) Remove(_ context.Context, id ID) error {
	if _, ok := f.have[id]; ok {
		f.log.note("%s remove", f.name)
	}
	delete(f.have, id)
	return nil
}

func (f *fake) Yield(_ context.Context, id ID) error {
	if _, ok := f.have[id]; ok {
		f.log.note("%s yield", f.name)
	}
	delete(f.have, id)
	return nil
}

func (f *fake) List(context.Context) ([]Installed, error) {
	var list []Installed
	for id, w := range f.have {
		list = append(list, Installed{ID: id, Pod: w.Pod, Digest: w.Digest()})
	}
	return list, nil
}

func (f *fake) Counters(context.Context) ([]Counter, error) {
	return []Counter{{Reason: string(f.name)}}, nil
}

func (f *fake) MapUsage(context.Context) ([]MapUsage, error) { return nil, nil }

func (f *fake) Close() error {
	f.log.note("%s close", f.name)
	return nil
}

// world is a node with both backends.
type world struct {
	journal
	ebpf, iptables fake
	// openErr is what opening a backend fails with.
	openErr map[Backend]error
	opened  []Backend
	out     bytes.Buffer
}

func newWorld() *world {
	w := &world{openErr: make(map[Backend]error)}
	w.ebpf = fake{name: BackendEBPF, log: &w.journal, have: make(map[ID]Workload)}
	w.iptables = fake{name: BackendIPTables, log: &w.journal, have: make(map[ID]Workload)}
	return w
}

func (w *world) options(node Backend) Options {
	open := func(f *fake) func() (Redirector, error) {
		return func() (Redirector, error) {
			w.opened = append(w.opened, f.name)
			if err := w.openErr[f.name]; err != nil {
				return nil, err
			}
			return f, nil
		}
	}
	return Options{Node: node, NewEBPF: open(&w.ebpf), NewIPTables: open(&w.iptables), Log: slog.New(slog.NewTextHandler(&w.out, nil))}
}

func TestChoose(t *testing.T) {
	lacks := fmt.Errorf("load sk_lookup program: %w", ErrNotSupported)
	boom := errors.New("boom")
	for _, tc := range []struct {
		node   Backend
		ebpf   error
		want   Backend
		err    error
		reason string
	}{
		{node: "", want: BackendEBPF},
		{node: BackendAuto, want: BackendEBPF},
		{node: BackendEBPF, want: BackendEBPF},
		{node: BackendIPTables, want: BackendIPTables},
		{node: BackendIPTables, ebpf: lacks, want: BackendIPTables},
		{node: BackendAuto, ebpf: lacks, want: BackendIPTables, reason: "sk_lookup"},
		{node: BackendAuto, ebpf: boom, err: boom},
		{node: BackendEBPF, ebpf: lacks, err: ErrNotSupported},
	} {
		t.Run(fmt.Sprintf("%s with %v", tc.node, tc.ebpf), func(t *testing.T) {
			w := newWorld()
			w.openErr[BackendEBPF] = tc.ebpf
			c, err := Choose(w.options(tc.node))
			if !errors.Is(err, tc.err) {
				t.Fatalf("got error %v, want %v", err, tc.err)
			}
			if err != nil {
				return
			}
			if c.Backend() != tc.want {
				t.Errorf("backend is %s, want %s", c.Backend(), tc.want)
			}
			if (c.Reason() == "") != (tc.reason == "") || !strings.Contains(c.Reason(), tc.reason) {
				t.Errorf("reason is %q, want one with %q", c.Reason(), tc.reason)
			}
			warnings := strings.Count(w.out.String(), "level=WARN")
			if want := map[bool]int{true: 1, false: 0}[tc.reason != ""]; warnings != want {
				t.Errorf("%d warnings, want %d:\n%s", warnings, want, w.out.String())
			}
		})
	}
}

func choose(t *testing.T, w *world, node Backend) *Chosen {
	t.Helper()
	c, err := Choose(w.options(node))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func add(t *testing.T, c *Chosen, b Backend) {
	t.Helper()
	w := Workload{ID: ID{PodUID: "a"}, Pod: "shop/web", Policy: Policy{Backend: b}}
	if err := c.Add(t.Context(), w); err != nil {
		t.Fatal(err)
	}
}

func TestPodMovesWithoutAGap(t *testing.T) {
	w := newWorld()
	c := choose(t, w, BackendAuto)
	add(t, c, BackendAuto)
	if diff := cmp.Diff([]string{"ebpf add"}, w.take()); diff != "" {
		t.Errorf("first: %s", diff)
	}
	if slices.Contains(w.opened, BackendIPTables) {
		t.Error("iptables was opened before anyone asked for it")
	}
	add(t, c, BackendIPTables)
	if diff := cmp.Diff([]string{"iptables add", "ebpf yield"}, w.take()); diff != "" {
		t.Errorf("move: %s", diff)
	}
	add(t, c, BackendIPTables)
	if diff := cmp.Diff([]string{"iptables add"}, w.take()); diff != "" {
		t.Errorf("stay: %s", diff)
	}
	add(t, c, "")
	if diff := cmp.Diff([]string{"ebpf add", "iptables yield"}, w.take()); diff != "" {
		t.Errorf("move back: %s", diff)
	}
	if err := c.Remove(t.Context(), ID{PodUID: "a"}); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"ebpf remove"}, w.take()); diff != "" {
		t.Errorf("remove: %s", diff)
	}
}

func TestFailedMoveKeepsTheOld(t *testing.T) {
	w := newWorld()
	c := choose(t, w, BackendEBPF)
	add(t, c, "")
	w.take()
	w.iptables.err = errors.New("boom")
	err := c.Add(t.Context(), Workload{ID: ID{PodUID: "a"}, Policy: Policy{Backend: BackendIPTables}})
	if !errors.Is(err, w.iptables.err) {
		t.Errorf("got %v, want the backend's error", err)
	}
	if diff := cmp.Diff([]string{"iptables add"}, w.take()); diff != "" {
		t.Error(diff)
	}
}

func TestPodAsksForWhatTheNodeLacks(t *testing.T) {
	w := newWorld()
	w.openErr[BackendEBPF] = fmt.Errorf("load sk_lookup program: %w", ErrNotSupported)
	c := choose(t, w, BackendAuto)
	err := c.Add(t.Context(), Workload{ID: ID{PodUID: "a"}, Policy: Policy{Backend: BackendEBPF}})
	if !errors.Is(err, ErrNotSupported) || !strings.Contains(err.Error(), "ebpf") || !strings.Contains(err.Error(), "sk_lookup") {
		t.Errorf("got %v, want an error that names backend and what is missing", err)
	}
	add(t, c, "")
	if _, ok := w.iptables.have[ID{PodUID: "a"}]; !ok {
		t.Error("a pod without a wish is not with the node's backend")
	}
	if n := len(w.opened); n != 2 {
		t.Errorf("backends were opened %d times: %v", n, w.opened)
	}
}

func TestOpeningIsTriedAgain(t *testing.T) {
	w := newWorld()
	c := choose(t, w, BackendEBPF)
	w.openErr[BackendIPTables] = errors.New("no space left")
	wish := Workload{ID: ID{PodUID: "a"}, Policy: Policy{Backend: BackendIPTables}}
	if err := c.Add(t.Context(), wish); err == nil {
		t.Fatal("added without a backend")
	}
	w.openErr[BackendIPTables] = nil
	if err := c.Add(t.Context(), wish); err != nil {
		t.Errorf("second time: %v", err)
	}
}

func TestRestartFindsBothBackends(t *testing.T) {
	w := newWorld()
	a, b := Workload{ID: ID{PodUID: "a"}}, Workload{ID: ID{PodUID: "b"}}
	w.ebpf.have[a.ID], w.iptables.have[b.ID] = a, b
	w.iptables.have[a.ID] = a // its move was cut short
	o := w.options(BackendEBPF)
	o.Left = func(name Backend) bool { return name == BackendIPTables }
	c, err := Choose(o)
	if err != nil {
		t.Fatal(err)
	}
	list, err := c.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(list) != 2 || list[0].ID != a.ID || list[0].Problem == nil || list[1].ID != b.ID || list[1].Problem != nil {
		t.Errorf("List() = %+v", list)
	}
	if err := Reconcile(t.Context(), c, list, []Workload{a}, nil); err != nil {
		t.Fatal(err)
	}
	if len(w.ebpf.have) != 1 || len(w.iptables.have) != 0 {
		t.Errorf("eBPF has %v, iptables %v", w.ebpf.have, w.iptables.have)
	}
	counters, err := c.Counters(t.Context())
	if err != nil || len(counters) != 2 {
		t.Errorf("Counters() = %v, %v", counters, err)
	}
	w.take()
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if got := w.take(); len(got) != 2 {
		t.Errorf("closed: %v", got)
	}
}
