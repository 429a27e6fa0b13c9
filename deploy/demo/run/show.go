package main

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A printer prints what the demo shows; with colours on a terminal.
type printer struct {
	w      io.Writer
	colour bool
	start  time.Time
	failed []string
}

func newPrinter(f *os.File) *printer {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return &printer{w: f, colour: err == nil && os.Getenv("NO_COLOR") == "", start: time.Now()}
}

func (p *printer) paint(code, s string) string {
	if !p.colour {
		return s
	}
	return "\x1b[" + code + "m" + s + "\x1b[0m"
}

func (p *printer) heading(format string, a ...any) {
	fmt.Fprintf(p.w, "\n%s\n", p.paint("1;36", "== "+fmt.Sprintf(format, a...)+" =="))
}

func (p *printer) line(format string, a ...any) { fmt.Fprintf(p.w, format+"\n", a...) }

// note is a line about what is being done.
func (p *printer) note(format string, a ...any) {
	fmt.Fprintf(p.w, "%s %s\n", p.paint("2", fmt.Sprintf("[%5.1fs]", time.Since(p.start).Seconds())), fmt.Sprintf(format, a...))
}

func (p *printer) done(format string, a ...any) {
	fmt.Fprintf(p.w, "\n%s\n", p.paint("1;32", fmt.Sprintf(format, a...)))
}

// expect prints a fact and whether it is as it should be.
func (p *printer) expect(ok bool, format string, a ...any) {
	text := fmt.Sprintf(format, a...)
	if ok {
		fmt.Fprintf(p.w, "  %s %s\n", p.paint("32", "ok"), text)
		return
	}
	p.failed = append(p.failed, text)
	fmt.Fprintf(p.w, "  %s %s\n", p.paint("1;31", "NOT OK"), text)
}

// verdict is an error if any expectation was not met.
func (p *printer) verdict() error {
	if len(p.failed) == 0 {
		return nil
	}
	return errors.New("not as it should be: " + strings.Join(p.failed, "; "))
}

// compare prints what of before and after differs and returns it as an error.
func (p *printer) compare(what string, before, after state) error {
	kinds := slices.Sorted(maps.Keys(before))
	for k := range after {
		if _, ok := before[k]; !ok {
			kinds = append(kinds, k)
		}
	}
	var diff, same []string
	for _, k := range kinds {
		d := difference("+", after[k], before[k])
		d = append(d, difference("-", before[k], after[k])...)
		for _, line := range d {
			diff = append(diff, k+" "+line)
		}
		if len(d) == 0 {
			same = append(same, fmt.Sprintf("%d %s", len(before[k]), k))
		}
	}
	p.expect(len(diff) == 0, "%s is as before: %s", what, strings.Join(same, ", "))
	for _, d := range diff {
		p.line("     %s", d)
	}
	if len(diff) > 0 {
		return fmt.Errorf("%s is not as before: %s", what, strings.Join(diff, "; "))
	}
	return nil
}

// difference returns what is in a more often than in b.
func difference(mark string, a, b []string) []string {
	n := map[string]int{}
	for _, s := range b {
		n[s]++
	}
	var out []string
	for _, s := range a {
		if n[s]--; n[s] < 0 {
			out = append(out, mark+" "+s)
		}
	}
	return out
}
