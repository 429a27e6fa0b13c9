package kube

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"text/tabwriter"
	"time"
)

// settings are what the environment says; see the package's comment.
type settings struct {
	backends             []string
	agent, agent2, envoy string
	app, helm, lab, out  string
	snapshotter          string
	keep, throwaway      bool
}

func readSettings() settings {
	get := func(name, otherwise string) string { return cmp.Or(os.Getenv("SLUICE_E2E_"+name), otherwise) }
	return settings{
		backends: strings.Fields(get("BACKENDS", "ebpf iptables")),
		agent:    get("AGENT_IMAGE", ""), agent2: get("AGENT_IMAGE_2", ""),
		envoy: get("PROXY_IMAGE", "envoyproxy/envoy:v1.40.0"), app: get("APP_IMAGE", "sluicemesh/bookshop:e2e"),
		helm: get("HELM", "helm"), lab: get("LAB", ""), out: get("OUT", ""), keep: get("KEEP", "") != "",
		snapshotter: get("SNAPSHOT", ""), throwaway: get("THROWAWAY", "") != "",
	}
}

// A row is a line of the table.
type row struct {
	scenario, backend, note string
	requests, failed        int
	ran                     string // ok, FAILED or not run
	took                    time.Duration
}

type table struct {
	mu   sync.Mutex
	rows []row
}

func (t *table) add(r row) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.rows = append(t.rows, r)
}

func (t *table) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "scenario\tbackend\tresult\trequests\tfailed\ttime\tnote")
	for _, r := range t.rows {
		fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%d\t%.0f s\t%s\n", r.scenario, r.backend, r.ran, r.requests, r.failed, r.took.Seconds(), r.note)
	}
	_ = w.Flush()
	return b.String()
}

// TestKube installs Sluice with each backend and runs all scenarios on it. They
// build on each other's pods and run in the order below.
func TestKube(t *testing.T) {
	if os.Getenv("SLUICE_E2E") == "" {
		t.Skip("changes a cluster: run it with make e2e")
	}
	set := readSettings()
	if set.out == "" {
		set.out = t.TempDir()
	}
	// An interrupt ends the scenario; what is installed is taken away then.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	rows := &table{}
	defer func() {
		fmt.Printf("\n%s\n", rows)
		if err := os.WriteFile(filepath.Join(set.out, "table.txt"), []byte(rows.String()), 0o644); err != nil {
			t.Errorf("write table: %v", err)
		}
	}()
	for _, backend := range set.backends {
		t.Run(backend, func(t *testing.T) {
			s := newSuite(ctx, t, set, backend, rows)
			s.run(t)
		})
	}
}

// A suite is one installation and what runs on it.
type suite struct {
	settings
	cluster
	backend string
	rows    *table
	// a and b are two nodes; a may run the control plane.
	a, b string
	// current is the line of the scenario that runs.
	current *row
	// extra pods put load on others, beside those that always do.
	extra []string
	// bypass means that servers may be reached past their sidecars.
	bypass bool
}

func newSuite(ctx context.Context, t *testing.T, set settings, backend string, rows *table) *suite {
	t.Helper()
	s := &suite{settings: set, backend: backend, rows: rows, cluster: newCluster(ctx, t)}
	nodes := s.readyNodes(t)
	if len(nodes) < 2 {
		t.Fatalf("the cluster has %d ready nodes, want 2: %v", len(nodes), nodes)
	}
	s.a, s.b = nodes[0], nodes[1]
	return s
}

// A scenario is one line of the table.
type scenario struct {
	name string
	run  func(*suite, *testing.T)
	// lab means that it needs to get at the nodes.
	lab bool
}

func (s *suite) run(t *testing.T) {
	before := s.snapshots(t)
	defer func() {
		if s.keep || (s.throwaway && s.ctx.Err() != nil) {
			return
		}
		// Also after an interrupt.
		s.ctx = context.WithoutCancel(s.ctx)
		s.remove(t, before)
	}()
	s.install(t)
	for _, sc := range scenarios() {
		if s.ctx.Err() != nil {
			t.Fatal("interrupted")
		}
		if sc.lab && s.lab == "" {
			s.rows.add(row{scenario: sc.name, backend: s.backend, ran: "not run", note: "needs SLUICE_E2E_LAB"})
			continue
		}
		t.Run(sc.name, func(t *testing.T) { s.scenario(t, sc) })
	}
}

// scenario runs sc and adds its line to the table.
func (s *suite) scenario(t *testing.T, sc scenario) {
	began := time.Now()
	s.current = &row{scenario: sc.name, backend: s.backend, ran: "FAILED"}
	defer func() {
		s.current.took = time.Since(began)
		switch {
		case t.Skipped():
			s.current.ran = "not run"
		case !t.Failed():
			s.current.ran = "ok"
		default:
			s.dump(t)
		}
		s.rows.add(*s.current)
		fmt.Printf("%-8s %-9s %-28s %6d requests %4d failed %4.0f s  %s\n", s.current.ran, s.backend, sc.name, s.current.requests, s.current.failed, s.current.took.Seconds(), s.current.note)
	}()
	sc.run(s, t)
}

// note adds to the note of the scenario that runs.
func (s *suite) note(format string, args ...any) {
	if s.current.note != "" {
		s.current.note += "; "
	}
	s.current.note += fmt.Sprintf(format, args...)
}

// command runs a program and returns its standard output; err has what it wrote
// to standard error.
func command(ctx context.Context, stdin string, name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	var stdout, stderr strings.Builder
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &stdout, &stderr
	// An interrupt of this program's group is not for what takes things away.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = 5 * time.Second
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("%s %.200s: %w: %s", filepath.Base(name), strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}
