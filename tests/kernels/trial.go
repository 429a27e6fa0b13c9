package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/sluicemesh/sluice/tests/kernels/wire"
)

// A printer prints lines from several goroutines.
type printer struct {
	mu sync.Mutex
	w  io.Writer
}

func (p *printer) printf(format string, args ...any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, _ = fmt.Fprintf(p.w, format+"\n", args...)
}

// A trial is one kernel, tried.
type trial struct {
	settings
	want     support
	recorded recorded
	qemu     string
	// tmp is for what goes with this program, dir for what stays to be looked at.
	tmp, dir string
	print    *printer

	kernel   kernel
	booted   wire.Boot
	facts    *wire.Facts
	logs     map[string]*stepLog
	passed   int
	took     time.Duration
	problems []string
}

func (t *trial) problem(format string, args ...any) {
	t.problems = append(t.problems, fmt.Sprintf(format, args...))
}

// factsStep is the first step of every machine.
const factsStep = "facts"

// run tries the kernel; what is wrong becomes a problem.
func (t *trial) run(ctx context.Context, common tree) {
	began := time.Now()
	defer func() { t.took = time.Since(began) }()
	var err error
	if t.kernel, err = openKernel(filepath.Join(t.repo, kernelsDir), t.want.Name); err != nil {
		t.problem("%v", err)
		return
	}
	if t.kernel.notServed != "" {
		return
	}
	if err := errors.Join(os.RemoveAll(t.dir), os.MkdirAll(t.dir, 0o755)); err != nil {
		t.problem("make directory of results: %v", err)
		return
	}
	suites := t.suites()
	todo := append([]wire.Step{{Name: factsStep, Args: []string{factsProgram, agentProgram}, Dir: "/", Timeout: 3 * time.Minute}}, steps(suites)...)
	limit := bootTimeout
	for _, s := range todo {
		limit += s.Timeout
	}
	m := machine{
		qemu: t.qemu, accel: t.accel, image: t.kernel.image(), initramfs: filepath.Join(t.tmp, t.want.Name+".cpio"),
		console: filepath.Join(t.dir, "console.log"), cpus: 2, memory: 1536,
	}
	if err := initramfs(m.initramfs, common, t.kernel, todo); err != nil {
		t.problem("%v", err)
		return
	}
	t.print.printf("%-8s boots %s", t.want.Name, t.kernel.release)
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("not done after %v", limit))
	defer cancel()
	if err := m.run(ctx, t.on); err != nil {
		t.problem("%v", err)
	}
	for _, l := range t.logs {
		_ = l.file.Close()
	}
	t.judge(suites)
}

func (t *trial) suites() []suite {
	switch {
	case t.verifyOnly:
		return nil
	case t.match != "":
		all := allSuites(t.want.Backend)
		for i := range all {
			all[i].run = t.match
		}
		return all
	case t.all:
		return allSuites(t.want.Backend)
	}
	return shortSuites(t.want.Backend)
}

// A stepLog keeps what a step says.
type stepLog struct {
	file   *os.File
	stdout strings.Builder
	ended  *wire.Ended
}

func (l *stepLog) name() string { return filepath.Base(l.file.Name()) }

// on takes an event of the machine.
func (t *trial) on(e wire.Event) {
	switch {
	case e.Boot != nil:
		t.booted = *e.Boot
	case e.Output != nil:
		l, err := t.log(e.Output.Step)
		if err != nil {
			t.problem("%v", err)
			return
		}
		if !e.Output.Error {
			l.stdout.WriteString(e.Output.Text)
		}
		if _, err := l.file.WriteString(e.Output.Text); err != nil {
			t.problem("write log: %v", err)
		}
	case e.Ended != nil:
		l, err := t.log(e.Ended.Step)
		if err != nil {
			t.problem("%v", err)
			return
		}
		l.ended = e.Ended
		t.print.printf("%-8s %8v  %s%s", t.want.Name, e.Ended.Took.Round(round), e.Ended.Step, prefixed(": ", e.Ended.Problem))
	}
}

func prefixed(prefix, s string) string {
	if s == "" {
		return ""
	}
	return prefix + s
}

// log returns the log of a step, a new one if need be.
func (t *trial) log(step string) (*stepLog, error) {
	if l := t.logs[step]; l != nil {
		return l, nil
	}
	f, err := os.Create(filepath.Join(t.dir, fmt.Sprintf("step%d.log", len(t.logs))))
	if err != nil {
		return nil, fmt.Errorf("make log of step %s: %w", step, err)
	}
	if t.logs == nil {
		t.logs = map[string]*stepLog{}
	}
	l := &stepLog{file: f}
	t.logs[step] = l
	return l, nil
}

// judge turns what the steps said into problems.
func (t *trial) judge(suites []suite) {
	if l := t.ended(factsStep); l != nil {
		if l.ended.Problem != "" {
			t.problem("%s: %s (%s)", factsStep, l.ended.Problem, l.name())
		} else {
			t.judgeFacts(l.stdout.String())
		}
	}
	for i, s := range suites {
		if l := t.ended(stepName(i, s)); l != nil {
			t.judgeSuite(s, l)
		}
	}
	if t.match != "" && t.passed == 0 {
		t.problem("no test matches %q", t.match)
	}
}

// ended returns the log of a step that has ended, else nil.
func (t *trial) ended(step string) *stepLog {
	l := t.logs[step]
	if l == nil || l.ended == nil {
		t.problem("%s: it did not end", step)
		return nil
	}
	return l
}

func (t *trial) judgeSuite(s suite, l *stepLog) {
	o := readOutcome(l.stdout.String())
	t.passed += len(o.passed)
	for _, name := range o.failed {
		t.problem("%s: %s: failed (%s)", s.pkg, name, l.name())
	}
	for _, name := range o.skipped {
		t.problem("%s: %s: skipped (%s)", s.pkg, name, l.name())
	}
	for _, name := range s.must {
		if l.ended.Problem == "" && !slices.Contains(o.passed, name) {
			t.problem("%s: %s: did not run (%s)", s.pkg, name, l.name())
		}
	}
	if l.ended.Problem != "" && len(o.failed) == 0 {
		t.problem("%s: %s (%s)", s.pkg, l.ended.Problem, l.name())
	}
	// With a pattern of the caller's most packages have no such test.
	if len(o.passed) == 0 && t.match == "" {
		t.problem("%s: no test has passed (%s)", s.pkg, l.name())
	}
}

func (t *trial) judgeFacts(printed string) {
	var f wire.Facts
	if err := json.Unmarshal([]byte(printed), &f); err != nil {
		t.problem("read facts: %v", err)
		return
	}
	t.facts = &f
	t.problems = append(t.problems, t.want.problems(f)...)
	if !t.update {
		t.problems = append(t.problems, t.recorded.problems(t.kernel.version, f)...)
	}
}

// An outcome is what go test -v says of the tests of a package; one with subtests
// counts beside them.
type outcome struct {
	passed, failed, skipped []string
}

func readOutcome(printed string) outcome {
	var o outcome
	for line := range strings.Lines(printed) {
		f := strings.Fields(line)
		if len(f) != 4 || f[0] != "---" {
			continue
		}
		switch f[1] {
		case "PASS:":
			o.passed = append(o.passed, f[2])
		case "FAIL:":
			o.failed = append(o.failed, f[2])
		case "SKIP:":
			o.skipped = append(o.skipped, f[2])
		}
	}
	return o
}

// verdict is the end of the trial in one line.
func (t *trial) verdict() string {
	if t.kernel.notServed != "" {
		return "not tried: " + t.kernel.notServed
	}
	word := "ok"
	if len(t.problems) > 0 {
		word = "FAILED"
	}
	var what []string
	if t.facts != nil {
		loaded := 0
		for _, p := range t.facts.Programs {
			if p.Refused == "" {
				loaded++
			}
		}
		what = append(what, "backend "+t.facts.Backend+prefixed(" because ", t.facts.Reason),
			fmt.Sprintf("%d of %d programs loaded", loaded, len(t.facts.Programs)))
	}
	if t.passed > 0 {
		what = append(what, fmt.Sprintf("%d tests passed", t.passed))
	}
	return fmt.Sprintf("%s  %s, %v after start, %v in all: %s", word, t.kernel.version,
		t.booted.After.Round(round), t.took.Round(round), strings.Join(what, ", "))
}
