package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/sluicemesh/sluice/pkg/podwatch/cniinstall"
)

// A check is one line of /readyz.
type check struct {
	name    string
	err     error  // why the agent is not ready, nil if it is as far as this goes
	detail  string // said in any case
	problem bool   // detail is what is wrong with one object, which makes the node no less ready
}

// line is what a reader sees: see writeChecks.
func (c check) line() (mark, text string) {
	mark, text = "+", "ok"
	if c.err != nil {
		mark, text = "-", inOneLine(c.err.Error())
	}
	if c.detail != "" {
		text += " (" + c.detail + ")"
	}
	if c.problem {
		mark, text = "!", c.detail
	}
	return mark, text
}

// serveHTTP serves /healthz, /readyz, /status, /metrics and /metrics/proxies on addr until ctx ends.
func serveHTTP(ctx context.Context, log *slog.Logger, addr string, alive func(context.Context) error, ready func() []check, status http.Handler, metrics prometheus.Gatherer, proxies http.Handler) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, r *http.Request) {
		writeChecks(w, []check{{name: "loop", err: alive(r.Context())}})
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) { writeChecks(w, ready()) })
	mux.Handle("GET /status", status)
	mux.Handle("GET /metrics", promhttp.HandlerFor(metrics, promhttp.HandlerOpts{
		ErrorLog:      slog.NewLogLogger(log.Handler(), slog.LevelError),
		ErrorHandling: promhttp.ContinueOnError, // one collector that fails hides no other
	}))
	mux.Handle("GET /metrics/proxies", proxies)
	listener, err := net.Listen("tcp", addr)
	if err != nil {
		return fmt.Errorf("listen for /healthz, /readyz and /metrics, see --http-addr: %w", err)
	}
	s := newHTTPServer(log, mux)
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		<-ctx.Done()
		_ = s.Close()
	}()
	if err := s.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve %s: %w", addr, err)
	}
	<-stopped
	return nil
}

// newHTTPServer returns a server that lets nobody keep a connection, and with it
// a file of the agent, for long: its port is open to whoever reaches the node.
func newHTTPServer(log *slog.Logger, h http.Handler) *http.Server {
	return &http.Server{
		Handler: h, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelWarn),
		ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
		ReadTimeout: 30 * time.Second, WriteTimeout: 30 * time.Second, // longer than any answer takes
	}
}

// writeChecks answers in the form that kube-apiserver's /readyz?verbose has:
// one line a check, [+] or [-], with the reason, and [!] for problems that leave
// the node ready.
func writeChecks(w http.ResponseWriter, checks []check) {
	var b strings.Builder
	code := http.StatusOK
	for _, c := range checks {
		if c.err != nil {
			code = http.StatusServiceUnavailable
		}
		mark, text := c.line()
		fmt.Fprintf(&b, "[%s]%s %s\n", mark, c.name, text)
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.WriteHeader(code)
	_, _ = w.Write([]byte(b.String()))
}

// stuckAfter is for how long the agent's loop may be busy: it turns at least once a
// healInterval, and then may have all of the node's pods to mend.
const stuckAfter = 5 * time.Minute

// alive says whether the agent's loop still turns and its lock can be had.
func (a *agent) alive(ctx context.Context) error {
	if last := a.turned.Load(); last != 0 {
		if since := time.Since(time.Unix(0, last)); since > stuckAfter {
			return fmt.Errorf("the agent's loop has been at one thing for %s", since.Round(time.Second))
		}
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	return a.call(ctx, func() error { return nil })
}

// checks are those of /readyz. Problems with single objects make the node no
// less ready: they are named, and all else goes on.
func (a *agent) checks(backend, backendReason string, from source, installer *cniinstall.Installer) []check {
	checks := []check{a.sourceCheck(from)}
	redirection := check{name: "redirection", detail: "backend " + backend}
	if backendReason != "" {
		redirection.detail += ", since " + backendReason
	}
	counts, problems := a.report()
	checks = append(checks, redirection)
	if installer != nil {
		checks = append(checks, installationCheck(installer.Status()))
	}
	checks = append(checks, check{
		name:   "pods",
		detail: fmt.Sprintf("%d redirected, %d not to be redirected, %d with a problem", counts.redirected, counts.untouched, counts.failed),
	})
	for _, object := range slices.Sorted(maps.Keys(problems)) {
		checks = append(checks, check{name: object, problem: true, detail: inOneLine(problems[object])})
	}
	for _, pod := range a.sidecars.Status() {
		for _, r := range pod.Rejected {
			checks = append(checks, check{
				problem: true,
				name:    fmt.Sprintf("sidecar %s/%s", pod.Pod.Namespace, pod.Pod.Name),
				detail:  rejection(r),
			})
		}
	}
	for _, p := range from.problems() {
		checks = append(checks, check{name: "source document", problem: true, detail: p.String()})
	}
	return checks
}

// sourceCheck is about what the agent has to go by. A source that was read once
// is good enough to work with, but that it cannot be followed is said.
func (a *agent) sourceCheck(from source) check {
	c := check{name: "source", detail: "read completely"}
	var reasons []error
	if from.health != nil {
		health := from.health()
		for _, h := range health {
			if h.Err != nil {
				reasons = append(reasons, h.Err)
			}
		}
		c.detail += fmt.Sprintf(", last heard of %s ago", sourceAge(health, time.Now()).Round(time.Second))
	}
	slices.SortFunc(reasons, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	reasons = slices.CompactFunc(reasons, func(a, b error) bool { return a.Error() == b.Error() })
	why := errors.Join(reasons...)
	switch {
	case a.ready() && why != nil:
		c.detail += ", but cannot be followed now: " + inOneLine(why.Error())
	case !a.ready() && why == nil:
		c = check{name: "source", err: errors.New("not read completely yet")}
	case !a.ready():
		c = check{name: "source", err: fmt.Errorf("not read completely yet: %w", why)}
	}
	return c
}

// installationCheck is about the CNI plugin: without it pods start that are not
// redirected.
func installationCheck(s cniinstall.Status) check {
	c := check{name: "cni"}
	switch {
	case s.Err != nil:
		c.err = s.Err
	case !s.Installed():
		c.err = errors.New("the plugin is not installed yet")
	default:
		c.detail = fmt.Sprintf("in %s, put back %d times", s.Conf, s.Repairs)
		if s.Fighting {
			c.detail += "; another program keeps removing it"
		}
	}
	return c
}
