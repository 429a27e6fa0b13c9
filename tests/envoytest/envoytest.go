package envoytest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"sigs.k8s.io/yaml"

	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/pkg/redirect/netns"
	"github.com/sluicemesh/sluice/tests/need"
)

// agentMark is the socket mark by which the data plane lets the agent reach
// the admin port of a pod's Envoy.
const agentMark = 0x51ce

// Options say how to start Envoy. Config is required.
type Options struct {
	// Name is shown in front of what Envoy logged; empty means "envoy".
	Name string
	// Netns is a path to the network namespace; empty means the test's own.
	Netns string
	// UID is the user that Envoy runs as; 0 means redirect.DefaultProxyUID.
	UID uint32
	// Config is the bootstrap, YAML or JSON.
	Config []byte
	// Concurrency is the number of workers; 0 means 1.
	Concurrency int
	// LogLevel is one of Envoy's log levels; empty means "warning".
	LogLevel string
	// Args are further arguments.
	Args []string
	// LogDir keeps standard output (the access log) and standard error as
	// access.log and envoy.log; empty means a temporary directory.
	LogDir string
}

// An Envoy is a running Envoy. Its methods are safe for concurrent use.
type Envoy struct {
	tb     testing.TB
	opts   Options
	cmd    *exec.Cmd
	dir    string
	client *http.Client
	stop   sync.Once
	exited chan struct{}
}

// Start starts Envoy and returns once its admin interface answers, which is
// before it has received anything over xDS. The test ends it.
func Start(tb testing.TB, opts Options) *Envoy {
	tb.Helper()
	need.Root(tb)
	path := need.Envoy(tb)
	if opts.Name == "" {
		opts.Name = "envoy"
	}
	if opts.UID == 0 {
		opts.UID = redirect.DefaultProxyUID
	}
	if opts.Concurrency == 0 {
		opts.Concurrency = 1
	}
	if opts.LogLevel == "" {
		opts.LogLevel = "warning"
	}
	dir := opts.LogDir
	if dir == "" {
		dir = tb.TempDir()
	}
	e := &Envoy{tb: tb, opts: opts, dir: dir, exited: make(chan struct{})}
	e.client = &http.Client{Transport: &http.Transport{DialContext: e.dial, DisableKeepAlives: true}}

	cmd, err := command(path, opts.Config, "--concurrency", strconv.Itoa(opts.Concurrency),
		"--log-level", opts.LogLevel, "--file-flush-interval-msec", "20")
	if err != nil {
		tb.Fatalf("prepare %s: %v", opts.Name, err)
	}
	defer func() { _ = cmd.ExtraFiles[0].Close() }()
	cmd.Args = append(cmd.Args, opts.Args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: opts.UID, Gid: opts.UID}, Setpgid: true}
	stdout, err := os.OpenFile(e.accessLog(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		tb.Fatalf("open access log of %s: %v", opts.Name, err)
	}
	defer func() { _ = stdout.Close() }()
	stderr, err := os.OpenFile(e.serverLog(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		tb.Fatalf("open log of %s: %v", opts.Name, err)
	}
	defer func() { _ = stderr.Close() }()
	cmd.Stdout, cmd.Stderr = stdout, stderr
	e.cmd = cmd

	if err := e.inNetns(cmd.Start); err != nil {
		tb.Fatalf("start %s: %v", opts.Name, err)
	}
	go func() {
		_ = cmd.Wait() // however it ends, Log says why
		close(e.exited)
	}()
	tb.Cleanup(func() {
		e.Stop()
		if tb.Failed() {
			tb.Logf("%s logged:\n%s%s access log:\n%s", opts.Name, tail(e.Log()), opts.Name, tail(e.AccessLog()))
		}
	})
	ctx, cancel := context.WithTimeout(tb.Context(), 30*time.Second)
	defer cancel()
	if err := e.poll(ctx, "/server_info"); err != nil {
		tb.Fatalf("start %s: %v", opts.Name, err)
	}
	return e
}

// Validate ends the test unless Envoy accepts the bootstrap, YAML or JSON, and
// has no word against it: no field is deprecated or unfinished.
// Resources that come over xDS are not part of that: put them into
// static_resources.
func Validate(tb testing.TB, bootstrap []byte) {
	tb.Helper()
	if err := Check(tb, bootstrap); err != nil {
		tb.Fatal(err)
	}
}

// Check returns Envoy's reason for not accepting the bootstrap, or nil.
func Check(tb testing.TB, bootstrap []byte) error {
	tb.Helper()
	path := need.Envoy(tb)
	jsonConfig, err := yaml.YAMLToJSON(bootstrap)
	if err != nil {
		tb.Fatalf("parse configuration: %v", err)
	}
	name := filepath.Join(tb.TempDir(), "bootstrap.json")
	if err := os.WriteFile(name, jsonConfig, 0o600); err != nil {
		tb.Fatalf("write configuration: %v", err)
	}
	ctx, cancel := context.WithTimeout(tb.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, "-c", name, "--mode", "validate", "--disable-hot-restart", "--log-level", "warning")
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("validate with Envoy: %w\n%s", err, tail(string(out)))
	}
	for _, complaint := range []string{"Deprecated field", "work-in-progress"} {
		if bytes.Contains(out, []byte(complaint)) {
			return fmt.Errorf("validate with Envoy: it warns\n%s", tail(string(out)))
		}
	}
	return nil
}

// command prepares Envoy. The program is handed over as an open file and the
// configuration as an argument, at most 128 KiB of it: the proxy's user may not
// be able to reach the paths.
func command(path string, config []byte, args ...string) (*exec.Cmd, error) {
	jsonConfig, err := yaml.YAMLToJSON(config)
	if err != nil {
		return nil, fmt.Errorf("parse configuration: %w", err)
	}
	bin, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open Envoy: %w", err)
	}
	return &exec.Cmd{
		Path:       "/proc/self/fd/3",
		Args:       append([]string{path, "--config-yaml", string(jsonConfig), "--disable-hot-restart"}, args...),
		Env:        []string{},
		ExtraFiles: []*os.File{bin}, // 3
	}, nil
}

// PID returns the process ID of Envoy.
func (e *Envoy) PID() int { return e.cmd.Process.Pid }

// Stop kills Envoy and waits until it is gone. It may be called more than once.
func (e *Envoy) Stop() {
	e.stop.Do(func() {
		_ = e.cmd.Process.Kill() // an error means that it has ended already
		<-e.exited
		e.client.CloseIdleConnections()
	})
}

// Get asks the admin interface for path and returns status and body.
func (e *Envoy) Get(ctx context.Context, path string) (int, []byte, error) {
	return e.request(ctx, http.MethodGet, path)
}

// Post is Get for paths that change something, such as /logging?level=debug.
func (e *Envoy) Post(ctx context.Context, path string) (int, []byte, error) {
	return e.request(ctx, http.MethodPost, path)
}

func (e *Envoy) request(ctx context.Context, method, path string) (int, []byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://envoy"+path, nil)
	if err != nil {
		return 0, nil, fmt.Errorf("ask %s for %s: %w", e.opts.Name, path, err)
	}
	resp, err := e.client.Do(req)
	if err != nil {
		return 0, nil, fmt.Errorf("ask %s for %s: %w", e.opts.Name, path, err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, nil, fmt.Errorf("read %s of %s: %w", path, e.opts.Name, err)
	}
	return resp.StatusCode, body, nil
}

// WaitReady returns once Envoy is live: it has received its first listeners and
// clusters and serves them.
func (e *Envoy) WaitReady(ctx context.Context) error { return e.poll(ctx, "/ready") }

// poll asks for path until it is answered 200, ctx ends or Envoy exits.
func (e *Envoy) poll(ctx context.Context, path string) error {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		status, body, err := e.Get(ctx, path)
		if err == nil && status == http.StatusOK {
			return nil
		}
		if err == nil {
			err = fmt.Errorf("%s: status %d: %s", path, status, bytes.TrimSpace(body))
		}
		select {
		case <-e.exited:
			return fmt.Errorf("%s has ended: %s\n%s", e.opts.Name, e.cmd.ProcessState, tail(e.Log()))
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w: %w", e.opts.Name, ctx.Err(), err)
		case <-tick.C:
		}
	}
}

// Stats returns the counters and gauges whose names match the regular
// expression, with those that were never used as 0.
func (e *Envoy) Stats(ctx context.Context, regex string) map[string]uint64 {
	e.tb.Helper()
	status, body, err := e.Get(ctx, "/stats?format=json&filter="+url.QueryEscape(regex))
	if err != nil || status != http.StatusOK {
		e.tb.Fatalf("read statistics of %s: status %d, %v", e.opts.Name, status, err)
	}
	var doc struct {
		Stats []struct {
			Name  string          `json:"name"`
			Value json.RawMessage `json:"value"`
		} `json:"stats"`
	}
	if err := json.Unmarshal(body, &doc); err != nil {
		e.tb.Fatalf("parse statistics of %s: %v", e.opts.Name, err)
	}
	out := make(map[string]uint64, len(doc.Stats))
	for _, s := range doc.Stats {
		// Text readouts are no numbers; histograms have no name at this level.
		if v, err := strconv.ParseUint(string(s.Value), 10, 64); err == nil {
			out[s.Name] = v
		}
	}
	return out
}

// ConfigDump returns /config_dump with the endpoints, as JSON.
func (e *Envoy) ConfigDump(ctx context.Context) []byte {
	e.tb.Helper()
	status, body, err := e.Get(ctx, "/config_dump?include_eds")
	if err != nil || status != http.StatusOK {
		e.tb.Fatalf("dump configuration of %s: status %d, %v", e.opts.Name, status, err)
	}
	return body
}

// Log returns what Envoy has written to standard error.
func (e *Envoy) Log() string { return e.read(e.serverLog()) }

// AccessLog returns what Envoy has written to standard output.
func (e *Envoy) AccessLog() string { return e.read(e.accessLog()) }

// WaitAccessLog returns the lines of the access log as soon as match reports
// true for one of them, and ends the test when that takes too long.
func (e *Envoy) WaitAccessLog(ctx context.Context, match func(line string) bool) []string {
	e.tb.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		lines := strings.Split(strings.TrimSpace(e.AccessLog()), "\n")
		if slices.ContainsFunc(lines, match) {
			return lines
		}
		select {
		case <-ctx.Done():
			e.tb.Fatalf("wait for a line in the access log of %s: %v; it has:\n%s", e.opts.Name, ctx.Err(), strings.Join(lines, "\n"))
		case <-tick.C:
		}
	}
}

func (e *Envoy) accessLog() string { return filepath.Join(e.dir, "access.log") }
func (e *Envoy) serverLog() string { return filepath.Join(e.dir, "envoy.log") }

func (e *Envoy) read(path string) string {
	e.tb.Helper()
	b, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		e.tb.Errorf("read log of %s: %v", e.opts.Name, err)
	}
	return string(b)
}

// dial reaches the admin interface from inside the namespace.
func (e *Envoy) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	d := net.Dialer{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		if cerr := c.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, agentMark)
		}); cerr != nil {
			return cerr
		}
		return err
	}}
	var conn net.Conn
	err := e.inNetns(func() (err error) {
		conn, err = d.DialContext(ctx, "tcp4", fmt.Sprintf("127.0.0.1:%d", redirect.AdminPort))
		return err
	})
	return conn, err
}

func (e *Envoy) inNetns(fn func() error) error {
	if e.opts.Netns == "" {
		return fn()
	}
	return netns.Do(e.opts.Netns, fn)
}

// tail keeps the end of a long log.
func tail(s string) string {
	const most = 8 << 10
	if len(s) > most {
		s = "...\n" + s[len(s)-most:]
	}
	return s
}
