package soak

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/sluicemesh/sluice/tests/sluicetest"
)

// A measure is something that must not grow.
type measure struct {
	name string
	// more is how much it may grow, by and in part of what it was.
	more, part float64
	// read is its value now.
	read func(s *soak) (float64, error)
}

const mib = 1 << 20

// measures of what lives through the second half. Memory is what the kernel
// says, so that a collector's mood and a heap's pages have some room.
func (s *soak) measures() []measure {
	all := []measure{
		{"agent: goroutines", 2, 0, agentMetric("go_goroutines")},
		{"agent: open files", 2, 0, agentMetric("process_open_fds")},
		{"agent: memory (MiB)", 12, 0.15, scaled(agentMetric("process_resident_memory_bytes"))},
		{"pins and maps", 0, 0, countPins},
		{"interfaces of the node", 0, 0, (*soak).interfaces},
		{"rules of the client", 0, 0, (*soak).clientRules},
	}
	for name, p := range map[string]*sluicetest.Pod{"client": s.client, "anchor": s.anchor} {
		pid := p.Envoy.PID()
		all = append(all,
			measure{"Envoy of " + name + ": open files", 10, 0, openFiles(pid)},
			measure{"Envoy of " + name + ": memory (MiB)", 10, 0.15, resident(pid)})
	}
	for _, m := range []string{"pods", "pod_ips", "ports", "cidrs", "listeners"} {
		all = append(all, measure{"map " + m, 0, 0, mapEntries(m)})
	}
	slices.SortStableFunc(all, func(a, b measure) int { return strings.Compare(a.name, b.name) })
	return all
}

// sample reads all measures. Of what goes up and down with each request it takes
// the lowest of many values.
func (s *soak) sample() map[string]float64 {
	s.Helper()
	lowest := make(map[string]float64)
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for range 40 {
		for _, m := range s.measures() {
			var v float64
			var err error
			// A scrape of a busy machine may lack what could not be read in time.
			sluicetest.Eventually(s.T, func() bool {
				v, err = m.read(s)
				return err == nil
			}, func() string { return fmt.Sprintf("read %s: %v", m.name, err) })
			if low, ok := lowest[m.name]; !ok || v < low {
				lowest[m.name] = v
			}
		}
		<-tick.C
	}
	return lowest
}

// judge says what failed and what grew.
func (s *soak) judge(before, after map[string]float64) {
	s.Helper()
	for _, m := range s.measures() {
		b, a := before[m.name], after[m.name]
		if a > b+m.more+m.part*b {
			s.Errorf("%s: it was %.1f and is %.1f", m.name, b, a)
		}
	}
	for _, k := range s.load.kinds {
		if k.ok == 0 {
			s.Errorf("%s: nothing succeeded", k.name)
		}
		if left := s.load.unexplained(k); len(left) > 0 {
			s.Errorf("%s: %d failed without a cause, first at %s: %v", k.name, len(left), left[0].began.Format(time.TimeOnly), left[0].err)
		}
	}
	if _, body, err := s.n.Get("/readyz"); err != nil || strings.Contains(body, "[!]") {
		s.Errorf("/readyz: %v\n%s", err, body)
	}
}

// table shows all of it.
func (s *soak) table(before, after map[string]float64) string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "traffic\tserved\tfailed, with a cause\twithout\n")
	for _, k := range s.load.kinds {
		left := len(s.load.unexplained(k))
		fmt.Fprintf(w, "%s\t%d\t%d\t%d\n", k.name, k.ok, len(k.failures)-left, left)
	}
	fmt.Fprintf(w, "\t\t\t\nevents\tnumber\t\t\n")
	fmt.Fprintf(w, "agent killed\t%d\t\t\nagent ended\t%d\t\t\npods replaced\t%d\t\t\nproxies killed\t%d\t\t\n", s.killed, s.ended, s.rolled-1, s.restarted)
	fmt.Fprintf(w, "\t\t\t\nwhat must not grow\tbefore\tafter\t\n")
	for _, name := range slices.Sorted(maps.Keys(before)) {
		fmt.Fprintf(w, "%s\t%.4g\t%.4g\t\n", name, before[name], after[name])
	}
	_ = w.Flush() // a strings.Builder takes everything
	return b.String()
}

// wantDrained waits until nothing is left of connections that have ended.
func (s *soak) wantDrained() {
	s.Helper()
	for _, m := range []string{"handover", "probes"} {
		var v float64
		var err error
		sluicetest.Eventually(s.T, func() bool {
			v, err = mapEntries(m)(s)
			return err == nil && v == 0
		}, func() string { return fmt.Sprintf("map %s has %v entries after the load has ended, %v", m, v, err) })
	}
}

func agentMetric(name string) func(*soak) (float64, error) {
	line := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(name) + ` (\S+)$`)
	return func(s *soak) (float64, error) {
		_, body, err := s.n.Get("/metrics")
		if err != nil {
			return 0, err
		}
		m := line.FindStringSubmatch(body)
		if m == nil {
			return 0, fmt.Errorf("the agent has no metric %s", name)
		}
		return strconv.ParseFloat(m[1], 64)
	}
}

// mapEntries is 0 with a backend that has no maps.
func mapEntries(name string) func(*soak) (float64, error) {
	read := agentMetric(`sluice_map_entries{map="` + name + `"}`)
	return func(s *soak) (float64, error) {
		if s.pinned() == "" {
			return 0, nil
		}
		return read(s)
	}
}

// pinned returns the directory of pins, "" if there is none.
func (s *soak) pinned() string {
	if _, err := os.Stat(filepath.Join(sluicetest.PinDir(), "maps")); err != nil {
		return ""
	}
	return sluicetest.PinDir()
}

func countPins(s *soak) (n float64, err error) {
	dir := s.pinned()
	if dir == "" {
		return 0, nil
	}
	err = filepath.WalkDir(dir, func(_ string, _ fs.DirEntry, err error) error {
		n++
		return err
	})
	return n, err
}

func (s *soak) interfaces() (n float64, err error) {
	err = s.n.Do(func() error {
		b, err := os.ReadFile("/proc/thread-self/net/dev")
		n = float64(strings.Count(string(b), "\n"))
		return err
	})
	return n, err
}

func (s *soak) clientRules() (float64, error) {
	if s.pinned() != "" {
		return 0, nil
	}
	out, err := s.client.Command(s.T, 0, "iptables-save").CombinedOutput()
	return float64(strings.Count(string(out), "\n-A ")), err
}

func openFiles(pid int) func(*soak) (float64, error) {
	return func(*soak) (float64, error) {
		fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
		return float64(len(fds)), err
	}
}

func resident(pid int) func(*soak) (float64, error) {
	return scaled(func(*soak) (float64, error) {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
		if err != nil {
			return 0, err
		}
		f := strings.Fields(string(b))
		if len(f) < 2 {
			return 0, errors.New("no resident pages")
		}
		pages, err := strconv.ParseFloat(f[1], 64)
		return pages * float64(os.Getpagesize()), err
	})
}

// scaled turns bytes into MiB.
func scaled(read func(*soak) (float64, error)) func(*soak) (float64, error) {
	return func(s *soak) (float64, error) {
		v, err := read(s)
		return v / mib, err
	}
}
