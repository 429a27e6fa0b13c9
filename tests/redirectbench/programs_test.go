package redirectbench

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/tests/redirectbench/load"
)

// programs prints what the kernel says that each program takes. Its statistics
// make programs slower, so this is no part of the other measurements.
func (n *node) programs(t *testing.T) {
	t.Helper()
	stop, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
	if err != nil {
		t.Fatalf("turn on statistics of programs: %v", err)
	}
	defer func() { _ = stop.Close() }()
	for _, m := range n.chosen(true) {
		if m.backend == redirect.BackendEBPF {
			n.in(t, m, func() { n.programTimes(t, m) })
		}
	}
}

func (n *node) programTimes(t *testing.T, m mode) {
	t.Helper()
	n.warmUp(t, m)
	programs := n.loaded(t)
	defer func() {
		for _, p := range programs {
			_ = p.Close()
		}
	}()
	var names []string // some programs are attached once, others in each pod
	for _, p := range programs {
		if !slices.Contains(names, p.name) {
			names = append(names, p.name)
		}
	}
	uses := []struct {
		name string
		req  load.Request
	}{
		{"connection with 1 round trip", load.Request{Op: "connect", Addrs: n.addrs(m.way, load.Echo), N: count(5000), Size: 64}},
		{"round trip of 64 B", load.Request{Op: "round", Addrs: n.addrs(m.way, load.Echo), N: count(20_000), Size: 64}},
		{"write of 64 KiB", load.Request{Op: "stream", Addrs: n.addrs(m.way, load.Sink), N: count(10_000), Size: 64 << 10}},
	}
	rows := [][]string{{m.name + ", program"}}
	times := map[string][]string{}
	var sums []string
	for _, use := range uses {
		rows[0] = append(rows[0], "runs of a "+use.name, "ns each", "ns of a "+use.name)
		before := read(t, programs)
		res := n.call(t, use.req)
		var sum float64
		after := read(t, programs)
		for _, name := range names {
			runs, ns := after[name].runs-before[name].runs, after[name].time-before[name].time
			each := 0.0
			if runs > 0 {
				each = float64(ns.Nanoseconds()) / float64(runs)
			}
			whole := float64(ns.Nanoseconds()) / float64(use.req.N)
			sum += whole
			times[name] = append(times[name], fmt.Sprintf("%.2f", float64(runs)/float64(use.req.N)), number(each), number(whole))
		}
		of := res.P50
		if of == 0 {
			of = res.Elapsed / time.Duration(use.req.N)
		}
		sums = append(sums, "", "", fmt.Sprintf("%s of %s", number(sum), number(float64(of.Nanoseconds()))))
	}
	for _, name := range names {
		rows = append(rows, append([]string{name}, times[name]...))
	}
	printTable(append(rows, append([]string{"all, of the time it takes"}, sums...)))
}

// A program is one that is loaded, by the name that it has in bpf/.
type program struct {
	*ebpf.Program
	name string
}

// A cost is what the kernel has counted of a program.
type cost struct {
	runs uint64
	time time.Duration
}

// read sums by name.
func read(t *testing.T, programs []program) map[string]cost {
	t.Helper()
	costs := map[string]cost{}
	for _, p := range programs {
		s, err := p.Stats()
		if err != nil {
			t.Fatalf("read statistics of %s: %v", p.name, err)
		}
		c := costs[p.name]
		costs[p.name] = cost{c.runs + s.RunCount, c.time + s.Runtime}
	}
	return costs
}

// loaded are the programs that use this node's maps, sorted by name.
func (n *node) loaded(t *testing.T) []program {
	t.Helper()
	own := map[ebpf.MapID]bool{}
	dir := filepath.Join(n.ebpf.PinDir, "maps")
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatalf("list maps: %v", err)
	}
	for _, e := range entries {
		m, err := ebpf.LoadPinnedMap(filepath.Join(dir, e.Name()), nil)
		if err != nil {
			t.Fatalf("open map: %v", err)
		}
		info, err := m.Info()
		if err != nil {
			t.Fatalf("ask for a map: %v", err)
		}
		id, _ := info.ID()
		own[id] = true
		_ = m.Close()
	}
	var found []program
	for id := ebpf.ProgramID(0); ; {
		if id, err = ebpf.ProgramGetNextID(id); errors.Is(err, os.ErrNotExist) {
			break
		}
		if err != nil {
			t.Fatalf("list programs: %v", err)
		}
		p, err := ebpf.NewProgramFromID(id)
		if errors.Is(err, os.ErrNotExist) {
			continue // it was another's, and has just ended
		}
		if err != nil {
			t.Fatalf("open program: %v", err)
		}
		info, err := p.Info()
		if err != nil {
			t.Fatalf("ask for a program: %v", err)
		}
		ids, _ := info.MapIDs()
		if slices.ContainsFunc(ids, func(id ebpf.MapID) bool { return own[id] }) {
			found = append(found, program{p, info.Name})
			continue
		}
		_ = p.Close()
	}
	slices.SortFunc(found, func(a, b program) int { return strings.Compare(a.name, b.name) })
	return found
}
