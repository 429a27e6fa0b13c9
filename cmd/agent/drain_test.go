package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/pkg/redirect/netns"
	"github.com/sluicemesh/sluice/pkg/xds"
	"github.com/sluicemesh/sluice/pkg/xds/server"
	"github.com/sluicemesh/sluice/pkg/xds/translate"
	"github.com/sluicemesh/sluice/tests/envoytest"
	"github.com/sluicemesh/sluice/tests/need"
	"github.com/sluicemesh/sluice/tests/netnstest"
)

// Ports of the pod in the drain test.
const (
	drainHTTP  = 8080
	drainHTTP2 = 8081
	drainTCP   = 8082
)

// newSidecar is a pod with a sidecar that has what the agent would give it.
// Connections from elsewhere to the pod's ports reach Envoy first.
func newSidecar(t *testing.T) (*netnstest.Node, *netnstest.Pod) {
	t.Helper()
	need.Root(t)
	node := netnstest.NewNode(t)
	pod := node.Pod(t, "pod")
	args := []string{"-w", "-t", "nat", "-A", "PREROUTING", "-p", "tcp", "--dport", "8080:8082", "-j", "REDIRECT", "--to-ports", "15006"}
	if out, err := pod.Command(t, 0, need.Tool(t, "iptables"), args...).CombinedOutput(); err != nil {
		t.Fatalf("iptables: %v\n%s", err, out)
	}
	tr, err := translate.New(translate.Options{})
	if err != nil {
		t.Fatal(err)
	}
	base, err := tr.Base(xds.OutboundPassthrough)
	if err != nil {
		t.Fatal(err)
	}
	own, err := tr.Pod(xds.Pod{Namespace: "shop", Name: "pod", Addrs: pod.Addrs(), Inbound: []xds.InboundPort{
		{Port: drainHTTP, Protocol: xds.ProtocolHTTP}, {Port: drainHTTP2, Protocol: xds.ProtocolHTTP2}, {Port: drainTCP, Protocol: xds.ProtocolTCP},
	}})
	if err != nil {
		t.Fatal(err)
	}
	s, err := server.New(server.Options{Log: slog.New(slog.DiscardHandler), InNetns: netns.Do, Empty: translate.Empty})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	s.SetShared("base/", base, time.Now())
	s.SetPod(server.Pod{UID: "uid", Namespace: "shop", Name: "pod", Base: "base/"}, own, time.Now())
	s.SetReady()
	if err := s.Open("uid", pod.Netns, redirect.DefaultProxyUID); err != nil {
		t.Fatal(err)
	}
	envoy := envoytest.Start(t, envoytest.Options{Netns: pod.Netns, Config: xds.Bootstrap(), Concurrency: 2})
	waited, cancelWait := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancelWait()
	if err := envoy.WaitReady(waited); err != nil {
		t.Fatal(err)
	}
	return node, pod
}

// TestDrain shows what a client of a pod sees before and after Drain.
func TestDrain(t *testing.T) {
	node, pod := newSidecar(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	at := func(port int) string { return netip.AddrPortFrom(pod.Addr4, uint16(port)).String() }

	// The application: it tells what it is asked for, and streams for as long as
	// the client does.
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/stream" {
			_, _ = io.WriteString(w, r.URL.Path)
			return
		}
		_ = http.NewResponseController(w).EnableFullDuplex()
		w.WriteHeader(http.StatusOK)
		for lines := bufio.NewScanner(r.Body); ; {
			_ = http.NewResponseController(w).Flush()
			if !lines.Scan() {
				return
			}
			_, _ = fmt.Fprintln(w, lines.Text())
		}
	})
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	for _, port := range []int{drainHTTP, drainHTTP2} {
		l, err := pod.Listen(ctx, "tcp4", at(port))
		if err != nil {
			t.Fatal(err)
		}
		app := &http.Server{Handler: handler, Protocols: protocols, ReadHeaderTimeout: time.Minute}
		go func() { _ = app.Serve(l) }()
		t.Cleanup(func() { _ = app.Close() })
	}
	pod.Serve(t, netip.MustParseAddrPort(at(drainTCP)), "app")

	h1 := &http.Transport{DialContext: node.Dial, MaxConnsPerHost: 1}
	defer h1.CloseIdleConnections()
	var dialled atomic.Int32
	prior := &http.Protocols{}
	prior.SetUnencryptedHTTP2(true)
	h2 := &http.Transport{Protocols: prior, DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		dialled.Add(1)
		return node.Dial(ctx, network, addr)
	}}
	defer h2.CloseIdleConnections()
	get := func(client http.RoundTripper, port int, path string) *http.Response {
		t.Helper()
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+at(port)+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := client.RoundTrip(req)
		if err != nil {
			t.Fatalf("GET %s of port %d: %v", path, port, err)
		}
		body, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if err != nil || resp.StatusCode != http.StatusOK || string(body) != path {
			t.Fatalf("GET %s of port %d: %d %q, %v", path, port, resp.StatusCode, body, err)
		}
		return resp
	}
	ready := func() int {
		t.Helper()
		conn, err := node.Dial(ctx, "tcp4", at(int(redirect.HealthPort)))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.Close() }()
		_, _ = io.WriteString(conn, "GET /healthz/ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		return resp.StatusCode
	}

	for range 2 {
		if resp := get(h1, drainHTTP, "/before"); resp.Close {
			t.Error("HTTP/1.1 is closed before the drain")
		}
		get(h2, drainHTTP2, "/before")
	}
	if dialled.Load() != 1 {
		t.Errorf("HTTP/2 took %d connections before the drain, want 1", dialled.Load())
	}
	if code := ready(); code != http.StatusOK {
		t.Errorf("readiness before the drain: %d", code)
	}
	stream, said := openStream(ctx, t, h2, "http://"+at(drainHTTP2)+"/stream")
	tcp, err := node.Dial(ctx, "tcp4", at(drainTCP))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tcp.Close() }()
	echo := bufio.NewReader(tcp)
	if _, err := echo.ReadString('\n'); err != nil { // the server names itself first
		t.Fatal(err)
	}

	target := proxyTarget{Namespace: "shop", Pod: "pod", Netns: pod.Netns, NetnsInode: pod.Inode(t)}
	for range 2 { // the second time does nothing
		start := time.Now()
		if err := newDrainer().Drain(ctx, target); err != nil {
			t.Fatal(err)
		}
		t.Logf("drain took %s", time.Since(start))
	}

	if resp := get(h1, drainHTTP, "/after"); !resp.Close {
		t.Error("HTTP/1.1: the connection is kept after the drain")
	}
	get(h1, drainHTTP, "/late") // on a new connection: nobody is turned away
	// The first answer brings GOAWAY along, or a little after it; what comes then
	// takes a new connection.
	before := dialled.Load()
	for end := time.Now().Add(20 * time.Second); dialled.Load() == before; {
		if time.Now().After(end) {
			t.Fatal("HTTP/2: the connection is kept after the drain")
		}
		get(h2, drainHTTP2, "/after")
	}
	if code := ready(); code != http.StatusServiceUnavailable {
		t.Errorf("readiness after the drain: %d, want 503", code)
	}
	for i := range 3 {
		line := fmt.Sprintf("line %d", i)
		_, _ = io.WriteString(stream, line+"\n")
		if !said.Scan() || said.Text() != line {
			t.Fatalf("HTTP/2 stream after the drain: %q, %v; want %q", said.Text(), said.Err(), line)
		}
		_, _ = io.WriteString(tcp, line+"\n")
		if got, err := echo.ReadString('\n'); err != nil || strings.TrimSpace(got) != line {
			t.Fatalf("TCP after the drain: %q, %v; want %q", got, err, line)
		}
	}
}

// openStream begins a request that is answered line by line.
func openStream(ctx context.Context, t *testing.T, client http.RoundTripper, url string) (io.Writer, *bufio.Scanner) {
	t.Helper()
	body, stream := io.Pipe()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, body)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = stream.Close()
		_ = resp.Body.Close()
	})
	return stream, bufio.NewScanner(resp.Body)
}

// TestDrainIsBounded asks sidecars that do not answer as they should.
func TestDrainIsBounded(t *testing.T) {
	for name, test := range map[string]struct {
		handler http.HandlerFunc // nil: nobody listens
		refuse  int              // connections that fail first
		want    string           // of the error; empty: none
	}{
		"fine":             {handler: func(http.ResponseWriter, *http.Request) {}},
		"starts meanwhile": {handler: func(http.ResponseWriter, *http.Request) {}, refuse: 3},
		"hangs":            {handler: func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, want: "context deadline exceeded"},
		"says no":          {handler: func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "no", http.StatusTeapot) }, want: `tell sidecar to drain: status 418: "no\n"`},
		"is not there":     {want: "connection refused"},
	} {
		t.Run(name, func(t *testing.T) {
			var asked string
			l, err := net.Listen("tcp4", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = l.Close() }()
			if test.handler == nil {
				_ = l.Close()
			} else {
				s := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					asked = r.Method + " " + r.URL.Path
					test.handler(w, r)
				})}
				go func() { _ = s.Serve(l) }()
				defer func() { _ = s.Close() }()
			}
			d := newDrainer()
			d.limit, d.retry = 300*time.Millisecond, time.Millisecond
			left := test.refuse
			d.dial = func(ctx context.Context, _ proxyTarget) (net.Conn, error) {
				if left > 0 {
					left--
					return nil, errors.New("not yet")
				}
				return (&net.Dialer{}).DialContext(ctx, "tcp4", l.Addr().String())
			}
			start := time.Now()
			err = d.Drain(t.Context(), proxyTarget{})
			if took := time.Since(start); took > 10*time.Second {
				t.Errorf("took %s", took)
			}
			if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
				t.Errorf("error %v, want %q", err, test.want)
			}
			if test.want == "" && asked != "POST /healthcheck/fail" {
				t.Errorf("asked for %q", asked)
			}
		})
	}
	if err := newDrainer().Drain(t.Context(), proxyTarget{Netns: "/run/netns/there-is-none"}); !errors.Is(err, redirect.ErrGone) {
		t.Errorf("namespace that is gone: %v, want ErrGone", err)
	}
}
