package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"

	"go.yaml.in/yaml/v3"

	"github.com/sluicemesh/sluice/tests/kernels/wire"
)

// A support is what must work on a kernel, no less and no more: what begins to
// work unseen is promised to nobody.
type support struct {
	// Name is how the kernel is called, Debian where it comes from.
	Name   string `yaml:"kernel"`
	Debian string `yaml:"debian"`
	// Backend is what the setting auto takes; Reason is a part of why that is not
	// eBPF.
	Backend string `yaml:"backend"`
	Reason  string `yaml:"reason"`
	// Features are those of bpf.Features, IPTables the variants of iptables.
	Features []string `yaml:"features"`
	IPTables []string `yaml:"iptables"`
	// Refused are the programs that the kernel does not load. All others it does.
	Refused []string `yaml:"refused"`
}

// parseSupport reads the table.
func parseSupport(b []byte) ([]support, error) {
	var all []support
	d := yaml.NewDecoder(bytes.NewReader(b))
	d.KnownFields(true)
	if err := d.Decode(&all); err != nil {
		return nil, fmt.Errorf("read table of support: %w", err)
	}
	return all, nil
}

// problems says how what a kernel does differs from what it must do.
func (s support) problems(f wire.Facts) []string {
	var found []string
	add := func(format string, args ...any) { found = append(found, fmt.Sprintf(format, args...)) }
	switch {
	case f.Backend != s.Backend && s.Backend == "ebpf":
		add("falls back to %s, although this kernel can do eBPF: %s", f.Backend, f.Reason)
	case f.Backend != s.Backend:
		add("takes %s, the table says %s", f.Backend, s.Backend)
	case s.Reason != "" && !strings.Contains(f.Reason, s.Reason):
		add("falls back because %q, the table says %q", f.Reason, s.Reason)
	}
	compare := func(what string, have map[string]string, want []string) {
		for _, name := range sortedKeys(have) {
			switch why := have[name]; {
			case why != "" && slices.Contains(want, name):
				add("%s %s does not work: %s", what, name, why)
			case why == "" && !slices.Contains(want, name):
				add("%s %s works, which the table does not say", what, name)
			}
		}
		for _, name := range want {
			if _, ok := have[name]; !ok {
				add("%s %s is in the table, but nobody knows it", what, name)
			}
		}
	}
	compare("feature", f.Features, s.Features)
	compare("iptables", f.IPTables, s.IPTables)
	var names []string
	for _, p := range f.Programs {
		names = append(names, p.Name)
		switch refused := slices.Contains(s.Refused, p.Name); {
		case p.Refused != "" && !refused:
			add("program %s is refused: %s", p.Name, p.Refused)
		case p.Refused == "" && refused:
			add("program %s is loaded, the table says that it is refused", p.Name)
		}
	}
	for _, name := range s.Refused {
		if !slices.Contains(names, name) {
			add("program %s is in the table, but there is none of that name", name)
		}
	}
	return found
}

// counts are the instructions that a kernel verifies before it takes a program,
// by program.
type counts map[string]int

// A recorded is what was counted on a kernel.
type recorded struct {
	version string // of its package
	counts  counts
}

// How many hundredths a count may differ from the recorded one, and how many
// instructions, whichever is more. The limit of kernels is a million: what must be
// seen is a program that grows because a kernel follows more ways through it, which
// is by factors.
const (
	// sameSeries is for point releases, whose verifier gets fixes, and for changes of
	// the C code that nobody measured.
	sameSeries = 10
	// otherSeries is for the newest kernel, when the archive goes on to the next. The
	// same programs differ by up to a third between 6.1, 6.12, 6.18 and 7.3.
	otherSeries = 50
	slack       = 50
)

// series is the first two numbers of a version.
func series(version string) string {
	f := strings.SplitN(version, ".", 3)
	return strings.Join(f[:min(2, len(f))], ".")
}

// problems says which counts of a kernel with that version differ too much from
// what was recorded.
func (r recorded) problems(version string, f wire.Facts) []string {
	var found []string
	tolerance := sameSeries
	if series(version) != series(r.version) {
		tolerance = otherSeries
	}
	seen := map[string]bool{}
	for _, p := range f.Programs {
		if p.Refused != "" {
			continue
		}
		seen[p.Name] = true
		was, ok := r.counts[p.Name]
		may := max(slack, was*tolerance/100)
		switch {
		case !ok:
			found = append(found, fmt.Sprintf("program %s: no count of verified instructions is recorded, it has %d", p.Name, p.Instructions))
		case p.Instructions < was-may || p.Instructions > was+may:
			found = append(found, fmt.Sprintf("program %s: %d instructions are verified, on %s it were %d (%d more or less are tolerated)",
				p.Name, p.Instructions, r.version, was, may))
		}
	}
	for _, name := range sortedKeys(r.counts) {
		if !seen[name] {
			found = append(found, fmt.Sprintf("program %s: %d instructions are recorded, but it was not loaded", name, r.counts[name]))
		}
	}
	return found
}

const (
	// notLoaded stands for the count of a program that the kernel refuses.
	notLoaded = "-"
	countsTop = "# Instructions that a kernel verifies before it takes a program; " + notLoaded + ": it refuses it.\n" +
		"# Renewed by: make verify UPDATE=1\n"
)

// parseCounts reads the recorded counts: kernel to what was counted.
func parseCounts(b []byte) (map[string]recorded, error) {
	var names []string
	all := map[string]recorded{}
	lines := bufio.NewScanner(bytes.NewReader(b))
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		if len(f) == 0 || strings.HasPrefix(f[0], "#") {
			continue
		}
		if f[0] == "kernel" {
			names = f[1:]
			continue
		}
		if len(f) != len(names)+1 {
			return nil, fmt.Errorf("read counts: line %q has %d fields, want %d", lines.Text(), len(f), len(names)+1)
		}
		for i, name := range names {
			r := all[name]
			if f[0] == "version" {
				r.version, r.counts = f[i+1], counts{}
			} else if f[i+1] != notLoaded {
				n, err := strconv.Atoi(f[i+1])
				if err != nil || r.counts == nil {
					return nil, fmt.Errorf("read counts: line %q: no count, or before the versions: %w", lines.Text(), err)
				}
				r.counts[f[0]] = n
			}
			all[name] = r
		}
	}
	return all, lines.Err()
}

// writeCounts writes what parseCounts reads, kernels in the order of names.
func writeCounts(w io.Writer, names []string, all map[string]recorded) error {
	programs := map[string]bool{}
	head, versions := []string{"kernel"}, []string{"version"}
	for _, name := range names {
		head, versions = append(head, name), append(versions, all[name].version)
		for p := range all[name].counts {
			programs[p] = true
		}
	}
	rows := [][]string{head, versions}
	for _, p := range sortedKeys(programs) {
		row := []string{p}
		for _, name := range names {
			count := notLoaded
			if n, ok := all[name].counts[p]; ok {
				count = strconv.Itoa(n)
			}
			row = append(row, count)
		}
		rows = append(rows, row)
	}
	if _, err := io.WriteString(w, countsTop); err != nil {
		return err
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, row := range rows {
		if _, err := fmt.Fprintln(t, strings.Join(row, "\t")); err != nil {
			return err
		}
	}
	return t.Flush()
}

// count takes from facts what is recorded.
func count(version string, f wire.Facts) recorded {
	r := recorded{version: version, counts: counts{}}
	for _, p := range f.Programs {
		if p.Refused == "" {
			r.counts[p.Name] = p.Instructions
		}
	}
	return r
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
