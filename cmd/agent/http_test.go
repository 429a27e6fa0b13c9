package main

import (
	"bufio"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestChecksAreWritten(t *testing.T) {
	ok := check{name: "redirection", detail: "backend ebpf"}
	problem := check{name: "pod shop/web", detail: "bad annotation", problem: true}
	for name, test := range map[string]struct {
		checks []check
		code   int
		body   string
	}{
		"ready": {[]check{{name: "source"}, ok}, http.StatusOK, "[+]source ok\n[+]redirection ok (backend ebpf)\n"},
		"not ready": {
			[]check{{name: "source", err: errors.New("not read\nyet")}, ok},
			http.StatusServiceUnavailable,
			"[-]source not read; yet\n[+]redirection ok (backend ebpf)\n",
		},
		"ready with a problem": {[]check{ok, problem}, http.StatusOK, "[+]redirection ok (backend ebpf)\n[!]pod shop/web bad annotation\n"},
	} {
		t.Run(name, func(t *testing.T) {
			w := httptest.NewRecorder()
			writeChecks(w, test.checks)
			if diff := cmp.Diff(test.body, w.Body.String()); w.Code != test.code || diff != "" {
				t.Errorf("status %d, want %d; body -want +got:\n%s", w.Code, test.code, diff)
			}
		})
	}
}

// An agent whose loop is stuck, or whose lock cannot be had, is not alive.
func TestAlive(t *testing.T) {
	n := readyNode(t)
	if err := n.alive(t.Context()); err != nil {
		t.Errorf("a healthy agent: %v", err)
	}
	n.turned.Store(time.Now().Add(-2 * stuckAfter).UnixNano())
	wantError(t, n.alive(t.Context()), "loop")
	n.turned.Store(time.Now().UnixNano())
	mustCall(t, n, func() {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		defer cancel()
		wantError(t, n.alive(ctx), "wait for the agent")
	})
}

// TestConnectionsEnd: who sends nothing, half a request, or nothing more, is
// disconnected.
func TestConnectionsEnd(t *testing.T) {
	for name, sent := range map[string]string{
		"nothing":      "",
		"half a head":  "GET / HTTP/1.1\r\n",
		"half a body":  "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nx",
		"nothing more": "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newHTTPServer(slog.New(slog.DiscardHandler), http.NotFoundHandler())
			for _, d := range []*time.Duration{&s.ReadHeaderTimeout, &s.ReadTimeout, &s.WriteTimeout, &s.IdleTimeout} {
				*d /= 100 // one that is missing stays endless
			}
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			served := make(chan error, 1)
			go func() { served <- s.Serve(ln) }()
			defer func() { _, _ = s.Close(), <-served }()
			c, err := net.Dial("tcp", ln.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = c.Close() }()
			if _, err := io.WriteString(c, sent); err != nil {
				t.Fatal(err)
			}
			if err := c.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
				t.Fatal(err)
			}
			var timeout net.Error
			if _, err := io.Copy(io.Discard, bufio.NewReader(c)); errors.As(err, &timeout) && timeout.Timeout() {
				t.Error("the connection stays")
			}
		})
	}
}
