package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
)

// clusterSize is the size of a cluster in bytes, about that of the translator's.
const clusterSize = 575

// limits of what one server is measured by in one round: at least both.
const (
	minUpdates = 10
	minTime    = time.Second
)

// A size says how much there is to be served.
type size struct{ pods, clusters int }

// A result is what one round found for one server: the time of a first fill, and
// of an update as the clock has it and as this process used it.
type result struct{ fill, update, cpu time.Duration }

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

func run(args []string, stdout, stderr io.Writer) int {
	fs := flag.NewFlagSet("bench-xds", flag.ContinueOnError)
	fs.SetOutput(stderr)
	rounds := fs.Int("rounds", 5, "rounds that are counted; each measures all servers")
	pods := fs.Int("pods", 110, "pods of the node")
	clusters := fs.Int("clusters", 5000, "clusters that every pod has")
	if err := fs.Parse(args); err != nil {
		return 2
	}
	if *rounds < 1 || *pods < 1 || *clusters < 1 || fs.NArg() > 0 {
		fs.Usage()
		return 2
	}
	if err := bench(stdout, stderr, *rounds, size{*pods, *clusters}); err != nil {
		_, _ = fmt.Fprintln(stderr, "bench-xds:", err) // nowhere else to say it
		return 1
	}
	return 0
}

func bench(stdout, progress io.Writer, rounds int, sz size) (err error) {
	dir, err := os.MkdirTemp("", "sluice-bench-")
	if err != nil {
		return fmt.Errorf("make directory for sockets: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	all := contenders()
	results := make([][]result, len(all))
	// Round 0 is not counted: whoever is first in a process pays for its memory.
	for round := range rounds + 1 {
		for i := range all {
			i = (i + round) % len(all) // none is always first
			r, err := measure(filepath.Join(dir, fmt.Sprint(round, "-", i)), all[i], sz)
			if err != nil {
				return fmt.Errorf("measure %s: %w", all[i].name, err)
			}
			if _, err := fmt.Fprintf(progress, "round %d: %s: fill %s ms, update %s ms, CPU %s ms\n", round, all[i].name, ms(r.fill), ms(r.update), ms(r.cpu)); err != nil {
				return err
			}
			if round > 0 {
				results[i] = append(results[i], r)
			}
		}
	}
	return report(stdout, all, results, sz)
}

// measure starts a server, fills all pods and changes one cluster again and again.
func measure(dir string, sv contender, sz size) (r result, err error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return r, fmt.Errorf("make directory for sockets: %w", err)
	}
	all := make([]*clusterv3.Cluster, sz.clusters)
	for i := range all {
		all[i] = cluster(i, 0)
	}
	cp, err := sv.start(dir, sz, all)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, cp.close()) }()
	ctx, cancel := context.WithCancel(context.Background())
	f := &fleet{sz: sz, got: make(chan error, 2*sz.pods)}
	defer func() { // before the server, whose sockets it uses
		cancel()
		err = errors.Join(err, f.close())
	}()
	runtime.GC()

	began := time.Now()
	if err := f.connect(ctx, cp.socket); err != nil {
		return r, err
	}
	r.fill = time.Since(began)

	// The same cluster changes each time; the first is not counted, so that
	// what an answer costs after it was sent is in the figure of the next.
	version := 1
	change := func() error {
		f.want.Store(new(mark(version)))
		if err := cp.update(cluster(sz.clusters/2, version)); err != nil {
			return fmt.Errorf("update: %w", err)
		}
		version++
		return f.wait()
	}
	if err := change(); err != nil {
		return r, err
	}
	runtime.GC()
	used, err := cpuTime()
	if err != nil {
		return r, err
	}
	began = time.Now()
	for n := 1; ; n++ {
		if err := change(); err != nil {
			return r, err
		}
		if d := time.Since(began); n >= minUpdates && d >= minTime {
			end, err := cpuTime()
			r.update, r.cpu = d/time.Duration(n), (end-used)/time.Duration(n)
			return r, err
		}
	}
}

// cpuTime is what this process has used, in all threads and in the kernel.
func cpuTime() (time.Duration, error) {
	var ru syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &ru); err != nil {
		return 0, fmt.Errorf("read CPU time: %w", err)
	}
	return time.Duration(ru.Utime.Nano() + ru.Stime.Nano()), nil
}

// mark is in the bytes of version v of a cluster, and of no other.
func mark(v int) string { return fmt.Sprintf("<version %d>", v) }

func cluster(i, v int) *clusterv3.Cluster {
	name, m := fmt.Sprintf("out/namespace/service-%04d/80", i), mark(v)
	return &clusterv3.Cluster{Name: name, AltStatName: m + strings.Repeat("x", clusterSize-len(name)-len(m))}
}

// report prints the table, in Markdown.
func report(w io.Writer, all []contender, results [][]result, sz size) error {
	columns := []func(result) time.Duration{
		func(r result) time.Duration { return r.update },
		func(r result) time.Duration { return r.cpu },
		func(r result) time.Duration { return r.fill },
	}
	rows := [][]string{
		{"", "one update to all pods", "ratio", "its CPU time", "ratio", "first fill of all pods", "ratio"},
		{"---", "---", "---", "---", "---", "---", "---"},
	}
	for i, c := range all {
		row := []string{c.name}
		for _, of := range columns {
			median, low, high := spread(results[i], of)
			ours, _, _ := spread(results[0], of)
			row = append(row, fmt.Sprintf("%s (%s - %s)", ms(median), ms(low), ms(high)), short(float64(median)/float64(ours)))
		}
		rows = append(rows, row)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "\n%d pods, %d clusters, %d rounds, %d of %d cores; ms: median (min - max)\n\n",
		sz.pods, sz.clusters, len(results[0]), runtime.GOMAXPROCS(0), cores())
	for _, row := range rows {
		fmt.Fprintf(&b, "| %s |\n", strings.Join(row, " | "))
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// cores is the number of cores of the machine, on which this process may have
// only some.
func cores() int {
	found, err := filepath.Glob("/sys/devices/system/cpu/cpu[0-9]*")
	if err != nil || len(found) == 0 {
		return runtime.NumCPU()
	}
	return len(found)
}

func spread(all []result, of func(result) time.Duration) (median, low, high time.Duration) {
	var ds []time.Duration
	for _, r := range all {
		ds = append(ds, of(r))
	}
	slices.Sort(ds)
	n := len(ds)
	return (ds[(n-1)/2] + ds[n/2]) / 2, ds[0], ds[n-1]
}

func ms(d time.Duration) string { return short(float64(d) / float64(time.Millisecond)) }

// short has three significant digits, or more if there are more before the point.
func short(x float64) string {
	digits := 2
	for _, limit := range []float64{10, 100} {
		if x >= limit {
			digits--
		}
	}
	return strconv.FormatFloat(x, 'f', digits, 64)
}
