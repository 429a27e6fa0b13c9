package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"time"
)

// An Answer is what a server says of itself and of the calls that it made.
type Answer struct {
	Service string `json:"service"`
	Version string `json:"version"`
	Host    string `json:"host"`
	// Peer is who had connected, as accept(2) saw it.
	Peer string `json:"peer"`
	// Stars is a rating, from ratings alone.
	Stars int    `json:"stars,omitempty"`
	Calls []Call `json:"calls,omitempty"`
}

// A Call is a call of another server as the caller saw it.
type Call struct {
	URL string `json:"url"`
	// Local and Remote are the connection's own address and what getpeername(2) said.
	Local  string `json:"local"`
	Remote string `json:"remote"`
	Answer Answer `json:"answer"`
}

type server struct {
	name, version, host, listen string
	stdout                      io.Writer
}

// calls makes the calls that answering r takes.
type calls func(r *http.Request) ([]Call, error)

func noCalls(*http.Request) ([]Call, error) { return nil, nil }

func productpage(urls ...string) calls {
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		MaxIdleConnsPerHost: 64, IdleConnTimeout: 30 * time.Second,
	}}
	return func(r *http.Request) ([]Call, error) {
		var out []Call
		for _, url := range urls {
			c, err := get(r, client, url)
			if err != nil {
				return nil, err
			}
			out = append(out, c)
		}
		return out, nil
	}
}

// get asks url, on behalf of in.
func get(in *http.Request, client *http.Client, url string) (Call, error) {
	c := Call{URL: url}
	ctx := httptrace.WithClientTrace(in.Context(), &httptrace.ClientTrace{
		GotConn: func(info httptrace.GotConnInfo) {
			c.Local, c.Remote = info.Conn.LocalAddr().String(), info.Conn.RemoteAddr().String()
		},
	})
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return c, fmt.Errorf("make request for %s: %w", url, err)
	}
	// What belongs to the user's request goes on with it.
	for _, h := range []string{"Cookie", "X-Request-Id"} {
		for _, v := range in.Header.Values(h) {
			req.Header.Add(h, v)
		}
	}
	resp, err := client.Do(req)
	if err != nil {
		return c, err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return c, fmt.Errorf("read answer of %s: %w", url, err)
	}
	if resp.StatusCode != http.StatusOK {
		return c, fmt.Errorf("get %s: %s: %.200s", url, resp.Status, body)
	}
	if err := json.Unmarshal(body, &c.Answer); err != nil {
		return c, fmt.Errorf("parse answer of %s: %w", url, err)
	}
	return c, nil
}

// serveHTTP answers with what f calls, until ctx ends.
func (s server) serveHTTP(ctx context.Context, f calls) error {
	return s.serveMux(ctx, func(mux *http.ServeMux) { mux.HandleFunc("GET /", s.answer(f)) })
}

func (s server) answer(f calls) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		out, err := f(r)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(Answer{Service: s.name, Version: s.version, Host: s.host, Peer: r.RemoteAddr, Calls: out})
	}
}

// serveMux serves /healthz and what add adds until ctx ends and then finishes
// open requests.
func (s server) serveMux(ctx context.Context, add func(*http.ServeMux)) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	add(mux)
	l, err := s.open(ctx)
	if err != nil {
		return err
	}
	hs := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	done := make(chan error, 1)
	go func() { done <- hs.Serve(l) }()
	select {
	case err := <-done:
		return fmt.Errorf("serve on %s: %w", s.listen, err)
	case <-ctx.Done():
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	err = hs.Shutdown(stop)
	if serveErr := <-done; !errors.Is(serveErr, http.ErrServerClosed) {
		err = errors.Join(err, serveErr)
	}
	return err
}

func (s server) open(ctx context.Context) (net.Listener, error) {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", s.listen)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", s.listen, err)
	}
	fmt.Fprintf(s.stdout, "%s %s serves on %s\n", s.name, s.version, l.Addr())
	return l, nil
}
