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
)

// A check is one line of /readyz.
type check struct {
	name    string
	err     error  // why the agent is not ready, nil if it is as far as this goes
	detail  string // said in any case
	problem bool   // detail is what is wrong with one object, which makes the node no less ready
}

// serveHTTP serves /healthz, /readyz and /metrics on addr until ctx ends.
func serveHTTP(ctx context.Context, log *slog.Logger, addr string, alive func(context.Context) error, ready func() []check, metrics prometheus.Gatherer) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, r *http.Request) {
		writeChecks(w, []check{{name: "loop", err: alive(r.Context())}})
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) { writeChecks(w, ready()) })
	mux.Handle("GET /metrics", promhttp.HandlerFor(metrics, promhttp.HandlerOpts{
		ErrorLog:      slog.NewLogLogger(log.Handler(), slog.LevelError),
		ErrorHandling: promhttp.ContinueOnError, // one collector that fails hides no other
	}))
	listener, err := net.Listen("tcp", addr)
	if err != nil {
		return fmt.Errorf("listen for /healthz, /readyz and /metrics, see --http-addr: %w", err)
	}
	s := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelWarn)}
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

// writeChecks answers in the form that kube-apiserver's /readyz?verbose has:
// one line a check, [+] or [-], with the reason, and [!] for problems that leave
// the node ready.
func writeChecks(w http.ResponseWriter, checks []check) {
	var b strings.Builder
	code := http.StatusOK
	for _, c := range checks {
		mark, text := "+", "ok"
		if c.err != nil {
			mark, text, code = "-", strings.ReplaceAll(c.err.Error(), "\n", "; "), http.StatusServiceUnavailable
		}
		if c.detail != "" {
			text += " (" + c.detail + ")"
		}
		if c.problem {
			mark, text = "!", c.detail
		}
		fmt.Fprintf(&b, "[%s]%s %s\n", mark, c.name, text)
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.WriteHeader(code)
	_, _ = w.Write([]byte(b.String()))
}

// alive says whether the agent's loop still turns.
func (a *agent) alive(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	return a.call(ctx, func() error { return nil })
}

// checks are those of /readyz. Problems with single objects make the node no
// less ready: they are named, and all else goes on.
func (a *agent) checks(backend, backendReason string, sourceProblems []string) []check {
	source := check{name: "source", detail: "read completely"}
	if !a.ready() {
		source = check{name: "source", err: errors.New("not read completely yet")}
	}
	redirection := check{name: "redirection", detail: "backend " + backend}
	if backendReason != "" {
		redirection.detail += ", since " + backendReason
	}
	counts, problems := a.report()
	checks := []check{source, redirection, {
		name:   "pods",
		detail: fmt.Sprintf("%d redirected, %d not to be redirected, %d with a problem", counts.redirected, counts.untouched, counts.failed),
	}}
	for _, object := range slices.Sorted(maps.Keys(problems)) {
		checks = append(checks, check{name: object, problem: true, detail: strings.ReplaceAll(problems[object], "\n", "; ")})
	}
	for _, pod := range a.sidecars.Status() {
		for _, r := range pod.Rejected {
			checks = append(checks, check{
				problem: true,
				name:    fmt.Sprintf("sidecar %s/%s", pod.Pod.Namespace, pod.Pod.Name),
				detail:  fmt.Sprintf("rejects %s %s: %s", r.TypeURL[strings.LastIndexByte(r.TypeURL, '.')+1:], r.Name, strings.ReplaceAll(r.Error, "\n", "; ")),
			})
		}
	}
	for _, p := range sourceProblems {
		checks = append(checks, check{name: "source document", problem: true, detail: p})
	}
	return checks
}
