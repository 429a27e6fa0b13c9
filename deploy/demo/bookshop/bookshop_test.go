package main

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"
)

// startServer runs a server until the test ends and returns its address, which
// it prints once it serves.
func startServer(t *testing.T, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	r, w := io.Pipe()
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := run(ctx, append(args, "--listen=127.0.0.1:0"), w, io.Discard); err != nil {
			t.Errorf("%v: %v", args, err)
		}
		_ = w.Close()
	})
	t.Cleanup(func() { cancel(); wg.Wait() })
	b := make([]byte, 200)
	n, err := r.Read(b)
	if err != nil {
		t.Fatalf("%v: %v", args, err)
	}
	_, addr, ok := strings.Cut(strings.TrimSpace(string(b[:n])), " serves on ")
	if !ok {
		t.Fatalf("%v printed %q", args, b[:n])
	}
	return addr
}

func client(t *testing.T, args ...string) (Report, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	var out bytes.Buffer
	err := run(ctx, append([]string{"client"}, args...), &out, io.Discard)
	var r Report
	if jsonErr := json.Unmarshal(out.Bytes(), &r); jsonErr != nil {
		t.Fatalf("client printed %q (%v): %v", out.String(), err, jsonErr)
	}
	return r, err
}

func TestShop(t *testing.T) {
	details := startServer(t, "details")
	ratings := startServer(t, "ratings")
	reviews := startServer(t, "reviews", "--version=v3", "--ratings="+ratings)
	page := startServer(t, "productpage", "--details=http://"+details, "--reviews=http://"+reviews)

	for _, extra := range []string{"--new-connections=false", "--new-connections"} {
		r, err := client(t, "--url=http://"+page, "--n=20", "--c=3", "--id=abc", extra)
		if err != nil || r.Requests != 20 || r.Failed != 0 {
			t.Fatalf("client: %+v, %v", r, err)
		}
		for _, who := range []string{"productpage v1", "details v1", "reviews v3", "ratings v1"} {
			if r.By[who] != 20 {
				t.Errorf("%s: %d answers of %s, want 20", extra, r.By[who], who)
			}
		}
		// The way can be told from the answer: what one end dialed is where
		// the other was, and the other way round.
		call := r.Last.Calls[1]
		if call.Remote != reviews || call.Answer.Peer != call.Local {
			t.Errorf("call of reviews: %+v", call)
		}
		call = call.Answer.Calls[0]
		if call.Remote != ratings || call.Answer.Peer != call.Local || call.Answer.Stars != 5 {
			t.Errorf("call of ratings: %+v", call)
		}
	}
}

func TestFailuresAreCounted(t *testing.T) {
	// Nothing listens on port 1.
	page := startServer(t, "productpage", "--details=http://127.0.0.1:1", "--reviews=http://127.0.0.1:1")
	r, err := client(t, "--url=http://"+page, "--n=5")
	if err == nil || r.Requests != 5 || r.Failed != 5 {
		t.Fatalf("client: %+v, %v", r, err)
	}
	for text, n := range r.Errors {
		if n != 5 || !strings.Contains(text, "502") {
			t.Errorf("%d times %q, want 5 times 502", n, text)
		}
	}
}

// report asks a running load for its counts until ok is content with them.
func report(t *testing.T, addr string, ok func(LoadReport) bool) LoadReport {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; {
		resp, err := http.Get("http://" + addr + "/report")
		if err != nil {
			t.Fatal(err)
		}
		var r LoadReport
		err = json.NewDecoder(resp.Body).Decode(&r)
		_ = resp.Body.Close()
		if err != nil {
			t.Fatal(err)
		}
		if ok(r) {
			return r
		}
		if time.Now().After(deadline) {
			t.Fatalf("no end of waiting: %+v", r)
		}
	}
}

func TestLoad(t *testing.T) {
	page := startServer(t, "details")
	echo := startServer(t, "echo")
	addr := startServer(t, "load", "--workers=2", "--pause=1ms",
		"--load=kept=keepalive:http://"+page, "--load=new=fresh:http://"+page, "--load=long=stream:"+echo)
	r := report(t, addr, func(r LoadReport) bool {
		return r.Loads["kept"].Done > 20 && r.Loads["new"].Done > 20 && r.Loads["long"].Done > 20
	})
	for name, want := range map[string]int{"kept": 2, "long": 2, "new": r.Loads["new"].Done} {
		c := r.Loads[name]
		// A request of each worker may be under way.
		if c.Failed != 0 || c.Connections < want || c.Connections > want+2 || c.Slowest == 0 || len(c.Peers) != 1 || c.Peers["127.0.0.1"] == 0 {
			t.Errorf("%s: %+v, want %d connections", name, c, want)
		}
	}

	resp, err := http.Get("http://" + addr + "/call?n=3&url=http://" + page)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	var call Report
	if err := json.NewDecoder(resp.Body).Decode(&call); err != nil || call.Requests != 3 || call.Failed != 0 {
		t.Errorf("/call: %+v, %v", call, err)
	}
}

func TestLoadCountsFailures(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	// A server that breaks each stream in the second message.
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, "peer\n")
			_, _ = io.CopyN(c, c, messageSize)
			_ = c.Close()
		}
	})
	t.Cleanup(func() { _ = l.Close(); wg.Wait() })
	addr := startServer(t, "load", "--pause=1ms", "--load=refused=fresh:http://127.0.0.1:1", "--load=cut=stream:"+l.Addr().String())
	r := report(t, addr, func(r LoadReport) bool {
		return r.Loads["refused"].Failed > 5 && r.Loads["cut"].Failed > 5
	})
	if c := r.Loads["refused"]; c.Done != 0 || len(c.Errors) != 1 {
		t.Errorf("refused: %+v", c)
	}
	c := r.Loads["cut"]
	if c.Connections < c.Failed || c.Done < c.Failed || c.LastError.Before(r.Started) {
		t.Errorf("cut: %+v", c)
	}
}

func TestLoadFlag(t *testing.T) {
	for _, bad := range []string{"", "x", "x=fresh", "x=fresh:", "=fresh:http://y", "x=other:http://y"} {
		if err := new(loadFlag).Set(bad); err == nil {
			t.Errorf("--load=%s was taken", bad)
		}
	}
}
