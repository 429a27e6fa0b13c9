package redirectbench

import (
	"cmp"
	"fmt"
	"math"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// A goal is a bound for what eBPF is of another mode's figures.
type goal struct {
	over  string
	kinds []kind
	// bound of the ratio, at most or, where more is better, at least.
	bound float64
}

// Where more is better, 1.01 is the bound of the inverse.
var goals = []goal{
	{modeSame, []kind{kindConnect, kindTail}, 1.03},
	{modeSame, []kind{kindRound, kindCPU}, 1.01},
	{modeSame, []kind{kindStream, kindBig, kindHTTP}, 1 / 1.01},
	{modeIPTables, []kind{kindConnect, kindRound}, 0.95},
	{modeIPTables, []kind{kindBig}, 1.3},
}

// samples are the figures of all rounds.
type samples struct {
	figures []figure // the first of each name
	modes   []string
	// values by figure and mode, one for each round.
	values map[string]map[string][]float64
}

func newSamples() *samples { return &samples{values: map[string]map[string][]float64{}} }

func (s *samples) add(mode string, figures []figure) {
	if !slices.Contains(s.modes, mode) {
		s.modes = append(s.modes, mode)
	}
	for _, f := range figures {
		if s.values[f.name] == nil {
			s.values[f.name] = map[string][]float64{}
			s.figures = append(s.figures, f)
		}
		s.values[f.name][mode] = append(s.values[f.name][mode], f.value)
	}
}

// inOrder sorts the modes as they are listed: in the first round they took
// turns in another order.
func (s *samples) inOrder() []string {
	place := func(name string) int {
		return slices.IndexFunc(modes, func(m mode) bool { return m.name == name })
	}
	slices.SortFunc(s.modes, func(a, b string) int { return cmp.Compare(place(a), place(b)) })
	return s.modes
}

// print prints two tables, in Markdown that can be read as it is.
func (s *samples) print(title string) {
	names := s.inOrder()
	rows := [][]string{append([]string{title}, names...)}
	for _, f := range s.figures {
		row := []string{f.name + ", " + f.unit}
		for _, m := range names {
			q := quartiles(s.values[f.name][m])
			row = append(row, fmt.Sprintf("%s (%s - %s)", number(q[1]), number(q[0]), number(q[2])))
		}
		rows = append(rows, row)
	}
	printTable(rows)

	for _, m := range names {
		if i := slices.IndexFunc(modes, func(o mode) bool { return o.name == m }); !strings.HasPrefix(m, modeEBPF) || modes[i].backend == "" {
			continue
		}
		others := []string{modeExplicit, modeSame, modeIPTables}
		if m != modeEBPF {
			others = append(others, modeEBPF)
		}
		others = slices.DeleteFunc(others, func(o string) bool { return !slices.Contains(names, o) })
		if len(others) == 0 {
			continue
		}
		rows = [][]string{append([]string{m + " as a multiple of"}, others...)}
		for _, f := range s.figures {
			row := []string{f.name}
			for _, o := range others {
				row = append(row, compare(f, s.values[f.name][m], s.values[f.name][o], m, o))
			}
			rows = append(rows, row)
		}
		printTable(rows)
	}
}

// compare says what one mode's figures are of another's, round by round, and what
// that is to a goal.
func compare(f figure, own, other []float64, mode, over string) string {
	ratios := make([]float64, min(len(own), len(other)))
	for i := range ratios {
		ratios[i] = own[i] / other[i]
	}
	median, low, high := interval(ratios)
	text := fmt.Sprintf("%.3f (%.3f - %.3f)", median, low, high)
	if over == modeEBPF {
		return text + gain(f.more, median, low, high)
	}
	for _, g := range goals {
		if mode != modeEBPF || g.over != over || !slices.Contains(g.kinds, f.kind) {
			continue
		}
		sign, met := "<=", func(x float64) bool { return x <= g.bound }
		if f.more {
			sign, met = ">=", func(x float64) bool { return x >= g.bound }
		}
		verdict := "met"
		if !met(median) {
			verdict = "missed"
		}
		if met(low) != met(high) || len(ratios) < 6 {
			verdict += ", not certain"
		}
		text += fmt.Sprintf(" %s %.2f %s", sign, g.bound, verdict)
	}
	return text
}

// gain says whether what is added to eBPF is worth it: it must gain a twentieth
// somewhere and lose nothing anywhere.
func gain(more bool, median, low, high float64) string {
	if !more { // then what is less is more
		median, low, high = 1/median, 1/high, 1/low
	}
	switch {
	case low > 1 && median >= 1.05:
		return " gains"
	case high < 1 && median < 0.99:
		return " loses"
	}
	return ""
}

// interval is the median and the bounds within which it lies at 95 %, by the
// ranks of the values; of less than six, least and greatest.
func interval(values []float64) (median, low, high float64) {
	v := slices.Sorted(slices.Values(values))
	n := float64(len(v))
	k := max(0, int(math.Floor((n-1.96*math.Sqrt(n))/2)))
	return quartiles(v)[1], v[k], v[len(v)-1-k]
}

// quartiles are the values a quarter, half and three quarters of the way up.
func quartiles(values []float64) (q [3]float64) {
	v := slices.Sorted(slices.Values(values))
	for i := range q {
		at := float64(len(v)-1) * float64(i+1) / 4
		low := int(at)
		high := min(low+1, len(v)-1)
		q[i] = v[low] + (v[high]-v[low])*(at-float64(low))
	}
	return q
}

// number has three digits that say something.
func number(v float64) string {
	switch {
	case v >= 100 || v == 0:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}

func printTable(rows [][]string) {
	width := make([]int, len(rows[0]))
	for _, row := range rows {
		for i, cell := range row {
			width[i] = max(width[i], len(cell))
		}
	}
	var b strings.Builder
	for i, row := range rows {
		for j, cell := range row {
			fmt.Fprintf(&b, "| %-*s ", width[j], cell)
		}
		b.WriteString("|\n")
		if i == 0 {
			for j := range row {
				b.WriteString("| " + strings.Repeat("-", width[j]) + " ")
			}
			b.WriteString("|\n")
		}
	}
	fmt.Println(b.String())
}

// conditions say where and when this ran.
func conditions(t *testing.T) string {
	t.Helper()
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatalf("ask for the kernel: %v", err)
	}
	load, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		t.Fatalf("read load: %v", err)
	}
	return fmt.Sprintf("Linux %s, load average %s", unix.ByteSliceToString(u.Release[:]), strings.Join(strings.Fields(string(load))[:3], " "))
}
