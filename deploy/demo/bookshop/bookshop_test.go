package main

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
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
