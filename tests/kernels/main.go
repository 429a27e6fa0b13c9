package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	err := run(ctx, os.Args[1:], os.Stdout)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "kernels:", err)
		os.Exit(1)
	}
}

// settings are what the command line says.
type settings struct {
	repo    string
	kernels []string
	// verifyOnly leaves the tests out, all runs the whole root tier, match those
	// of its tests alone.
	verifyOnly, all bool
	match           string
	// update renews the recorded counts in place of comparing.
	update   bool
	accel    string
	machines int
}

func parseSettings(args []string) (settings, error) {
	var s settings
	var kernels string
	flags := flag.NewFlagSet("kernels", flag.ContinueOnError)
	flags.StringVar(&s.repo, "repo", ".", "root of the repository")
	flags.StringVar(&kernels, "kernels", "", "names of kernels, separated by spaces; empty: all of support.yaml")
	flags.BoolVar(&s.verifyOnly, "verify", false, "verify programs and compare, run no tests")
	flags.BoolVar(&s.all, "all", false, "run the whole root tier, not the short form")
	flags.StringVar(&s.match, "run", "", "run these tests of the whole root tier, as go test -run")
	flags.BoolVar(&s.update, "update", false, "renew instructions.txt")
	flags.StringVar(&s.accel, "accel", oneThread, "qemu's accelerator: "+oneThread+" or kvm")
	flags.IntVar(&s.machines, "machines", max(1, runtime.NumCPU()), "machines at a time")
	if err := flags.Parse(args); err != nil {
		return s, err
	}
	if flags.NArg() > 0 {
		return s, fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	s.kernels = strings.Fields(kernels)
	return s, nil
}

// Files of the table, and where kernels are and results go, in the repository.
const (
	supportFile = "tests/kernels/support.yaml"
	countsFile  = "tests/kernels/instructions.txt"
	kernelsDir  = ".tools/kernels"
	resultsDir  = "bin/kernels"
)

// run boots the kernels and says what is wrong with them.
func run(ctx context.Context, args []string, out io.Writer) error {
	s, err := parseSettings(args)
	if errors.Is(err, flag.ErrHelp) {
		return nil
	}
	if err != nil {
		return err
	}
	if s.repo, err = filepath.Abs(s.repo); err != nil {
		return err
	}
	table, counts, err := readTable(s.repo)
	if err != nil {
		return err
	}
	chosen, err := choose(table, s.kernels)
	if err != nil {
		return err
	}
	qemu, err := findProgram("qemu-system-x86_64")
	if err != nil {
		return fmt.Errorf("find qemu (Debian: apt-get install qemu-system-x86): %w", err)
	}
	results := filepath.Join(s.repo, resultsDir)
	tmp, err := os.MkdirTemp("", "sluice-kernels-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(tmp) }()
	b := builder{repo: s.repo, bin: tmp}
	packages := testPackages()
	if s.verifyOnly {
		packages = nil
	}
	common, err := b.programs(ctx, packages)
	if err != nil {
		return err
	}
	p := &printer{w: out}
	all := make([]*trial, len(chosen))
	var group errgroup.Group
	group.SetLimit(s.machines)
	for i, want := range chosen {
		t := &trial{settings: s, want: want, recorded: counts[want.Name], qemu: qemu, tmp: tmp, print: p, dir: filepath.Join(results, want.Name)}
		all[i] = t
		group.Go(func() error {
			t.run(ctx, common)
			return nil
		})
	}
	_ = group.Wait() // problems are in the trials
	if ctx.Err() != nil {
		return errors.New("interrupted")
	}
	if s.update {
		if err := update(s.repo, table, counts, all); err != nil {
			return err
		}
	}
	return summarize(p, all)
}

func readTable(repo string) ([]support, map[string]recorded, error) {
	b, err := os.ReadFile(filepath.Join(repo, supportFile))
	if err != nil {
		return nil, nil, fmt.Errorf("read table of support: %w", err)
	}
	table, err := parseSupport(b)
	if err != nil {
		return nil, nil, err
	}
	b, err = os.ReadFile(filepath.Join(repo, countsFile))
	if err != nil {
		return nil, nil, fmt.Errorf("read counts: %w", err)
	}
	counts, err := parseCounts(b)
	return table, counts, err
}

// choose returns the rows with those names, all if there are none.
func choose(table []support, names []string) ([]support, error) {
	if len(names) == 0 {
		return table, nil
	}
	var chosen []support
	for _, name := range names {
		i := slices.IndexFunc(table, func(s support) bool { return s.Name == name })
		if i < 0 {
			return nil, fmt.Errorf("there is no kernel %q in %s", name, supportFile)
		}
		chosen = append(chosen, table[i])
	}
	return chosen, nil
}

// update writes the counts of the trials in place of those recorded before.
func update(repo string, table []support, counts map[string]recorded, all []*trial) error {
	var names []string
	for _, s := range table {
		names = append(names, s.Name)
	}
	for _, t := range all {
		if t.facts != nil {
			counts[t.want.Name] = count(t.kernel.version, *t.facts)
		}
	}
	var b bytes.Buffer
	if err := writeCounts(&b, names, counts); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(repo, countsFile), b.Bytes(), 0o644); err != nil {
		return fmt.Errorf("write counts: %w", err)
	}
	return nil
}

// summarize prints a line for each kernel, and returns an error if one has a problem.
func summarize(p *printer, all []*trial) error {
	bad := 0
	for _, t := range all {
		p.printf("%-8s %s", t.want.Name, t.verdict())
		for _, problem := range t.problems {
			p.printf("%-8s   %s", "", strings.ReplaceAll(problem, "\n", "\n             "))
		}
		if len(t.problems) > 0 {
			bad++
		}
	}
	if bad > 0 {
		return fmt.Errorf("%d of %d kernels have problems; all that their machines said is in %s", bad, len(all), resultsDir)
	}
	return nil
}

// round is how exact times are shown.
const round = 100 * time.Millisecond
