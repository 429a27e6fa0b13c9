package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"strings"
	"sync"
	"time"
)

// Kinds of load.
const (
	kindKeepAlive = "keepalive" // one request after the other on one connection
	kindFresh     = "fresh"     // a connection for each request
	kindStream    = "stream"    // one TCP connection to echo, for ever
)

// A LoadReport is what load counted since it started.
type LoadReport struct {
	// Started is when this process started; all counters began at zero then.
	Started time.Time `json:"started"`
	// Loads are the counters by name of the load.
	Loads map[string]Counts `json:"loads"`
}

// Counts are what became of one load.
type Counts struct {
	Kind   string `json:"kind"`
	Target string `json:"target"`
	// Done is how many requests were answered, or messages came back as sent.
	Done int `json:"done"`
	// Failed is how many were not.
	Failed int `json:"failed"`
	// Connections is how many connections were made. With nothing broken,
	// keepalive and stream make one for each worker.
	Connections int `json:"connections"`
	// Peers counts, by the address that the server saw: answers, of stream
	// connections.
	Peers map[string]int `json:"peers"`
	// Errors are the distinct errors and how often they came.
	Errors map[string]int `json:"errors,omitempty"`
	// LastError is when the last error came; zero if none has.
	LastError time.Time `json:"last_error"`
	// Slowest is the longest that a request or message took since the last
	// report with ?reset.
	Slowest time.Duration `json:"slowest"`
}

// A load is one of --load, while it runs.
type load struct {
	name, kind, target string

	mu     sync.Mutex
	counts Counts
}

// loadFlag collects --load NAME=KIND:TARGET.
type loadFlag []*load

func (f *loadFlag) String() string { return fmt.Sprint(len(*f), " loads") }

func (f *loadFlag) Set(s string) error {
	name, rest, named := strings.Cut(s, "=")
	kind, target, targeted := strings.Cut(rest, ":")
	if !named || !targeted || name == "" || target == "" {
		return errors.New("want NAME=KIND:TARGET")
	}
	switch kind {
	case kindKeepAlive, kindFresh, kindStream:
	default:
		return fmt.Errorf("kind %q: want %s, %s or %s", kind, kindKeepAlive, kindFresh, kindStream)
	}
	*f = append(*f, &load{name: name, kind: kind, target: target, counts: Counts{
		Kind: kind, Target: target, Peers: map[string]int{}, Errors: map[string]int{},
	}})
	return nil
}

// runLoad puts load on targets until SIGTERM and serves: /report, what became of
// it; /call, a run of client with its flags as query; /, an Answer; /healthz.
func (s server) runLoad(ctx context.Context, fs *flag.FlagSet, args []string) error {
	var loads loadFlag
	listen := fs.String("listen", ":9080", "`address` to serve reports on")
	workers := fs.Int("workers", 1, "connections of each load")
	pause := fs.Duration("pause", 50*time.Millisecond, "time between two requests or messages of each worker")
	fs.Var(&loads, "load", "a load, `NAME=KIND:TARGET`; KIND is keepalive or fresh with a URL, or stream with host:port of echo; may be given several times")
	if err := fs.Parse(args); err != nil {
		return err
	}
	started := time.Now()
	var wg sync.WaitGroup
	for _, l := range loads {
		for range *workers {
			wg.Go(func() { l.run(ctx, *pause) })
		}
	}
	s.listen = *listen
	err := s.serveMux(ctx, func(mux *http.ServeMux) {
		mux.HandleFunc("GET /report", func(w http.ResponseWriter, r *http.Request) {
			out := LoadReport{Started: started, Loads: map[string]Counts{}}
			for _, l := range loads {
				out.Loads[l.name] = l.report(r.URL.Query().Has("reset"))
			}
			w.Header().Set("Content-Type", "application/json")
			_ = json.NewEncoder(w).Encode(out)
		})
		mux.HandleFunc("GET /call", call)
		mux.HandleFunc("GET /{$}", s.answer(noCalls))
	})
	wg.Wait()
	return err
}

// call runs client; a failed request is in its report and no error here.
func call(w http.ResponseWriter, r *http.Request) {
	var args []string
	for name, values := range r.URL.Query() {
		for _, v := range values {
			args = append(args, "--"+name+"="+v)
		}
	}
	fs := flag.NewFlagSet("call", flag.ContinueOnError)
	var text, out bytes.Buffer
	fs.SetOutput(&text)
	err := runClient(r.Context(), fs, args, &out)
	if out.Len() == 0 {
		http.Error(w, fmt.Sprintf("%v\n%s", err, text.String()), http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(out.Bytes())
}

func (l *load) report(reset bool) Counts {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := l.counts
	out.Peers, out.Errors = map[string]int{}, map[string]int{}
	for k, v := range l.counts.Peers {
		out.Peers[k] = v
	}
	for k, v := range l.counts.Errors {
		out.Errors[k] = v
	}
	if reset {
		l.counts.Slowest = 0
	}
	return out
}

// run is one worker.
func (l *load) run(ctx context.Context, pause time.Duration) {
	once, end := l.streamer()
	if l.kind != kindStream {
		transport := &http.Transport{MaxConnsPerHost: 1, DisableKeepAlives: l.kind == kindFresh}
		client := &http.Client{Timeout: patience, Transport: transport}
		once = func(context.Context) error { return l.get(client) }
		end = transport.CloseIdleConnections
	}
	defer end()
	for ctx.Err() == nil {
		began := time.Now()
		err := once(ctx)
		l.note(time.Since(began), err)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
	}
}

// patience is how long a request or message may take.
const patience = 15 * time.Second

func (l *load) note(took time.Duration, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.counts.Slowest = max(l.counts.Slowest, took)
	if err == nil {
		l.counts.Done++
		return
	}
	l.counts.Failed++
	l.counts.LastError = time.Now()
	// Ports differ each time; what is left tells errors apart.
	if text := withoutPorts(err.Error()); len(l.counts.Errors) < 50 || l.counts.Errors[text] > 0 {
		l.counts.Errors[text]++
	}
}

// get makes one request. What was begun is finished: the end of the load is no error.
func (l *load) get(client *http.Client) error {
	trace := &httptrace.ClientTrace{GotConn: func(info httptrace.GotConnInfo) {
		if !info.Reused {
			l.mu.Lock()
			l.counts.Connections++
			l.mu.Unlock()
		}
	}}
	in := (&http.Request{Header: http.Header{}}).WithContext(httptrace.WithClientTrace(context.Background(), trace))
	c, err := get(in, client, l.target)
	if err != nil {
		return err
	}
	l.saw(c.Answer.Peer)
	return nil
}

// saw notes whom the server saw.
func (l *load) saw(peer string) {
	host, _, err := net.SplitHostPort(peer)
	if err != nil {
		host = peer
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.counts.Peers[host]++
}

// streamer returns a function that sends one message and waits for it, on a
// connection that it makes when there is none, and one that closes it.
func (l *load) streamer() (once func(context.Context) error, end func()) {
	var (
		conn net.Conn
		in   *bufio.Reader
		seq  uint64
	)
	end = func() {
		if conn != nil {
			_ = conn.Close()
			conn = nil
		}
	}
	return func(ctx context.Context) error {
		if conn == nil {
			c, err := (&net.Dialer{Timeout: patience}).DialContext(ctx, "tcp", l.target)
			if err != nil {
				if ctx.Err() != nil {
					return nil
				}
				return fmt.Errorf("dial %s: %w", l.target, err)
			}
			conn, in = c, bufio.NewReader(c)
			l.mu.Lock()
			l.counts.Connections++
			l.mu.Unlock()
			_ = conn.SetDeadline(time.Now().Add(patience))
			peer, err := in.ReadString('\n')
			if err != nil {
				end()
				return fmt.Errorf("read greeting of %s: %w", l.target, err)
			}
			l.saw(strings.TrimSpace(peer))
		}
		seq++
		if err := exchange(conn, in, seq); err != nil {
			end()
			return fmt.Errorf("message to %s: %w", l.target, err)
		}
		return nil
	}, end
}

// messageSize is of one message of a stream.
const messageSize = 1024

func exchange(conn net.Conn, in io.Reader, seq uint64) error {
	var out, back [messageSize]byte
	binary.BigEndian.PutUint64(out[:], seq)
	binary.BigEndian.PutUint64(out[messageSize-8:], ^seq)
	_ = conn.SetDeadline(time.Now().Add(patience))
	if _, err := conn.Write(out[:]); err != nil {
		return err
	}
	if _, err := io.ReadFull(in, back[:]); err != nil {
		return err
	}
	if out != back {
		return fmt.Errorf("sent number %d, got number %d back", seq, binary.BigEndian.Uint64(back[:]))
	}
	return nil
}

// withoutPorts replaces the numbers of ports in an error's text, which differ
// from one connection to the next.
func withoutPorts(text string) string {
	fields := strings.Fields(text)
	for i, f := range fields {
		if from, to, ok := strings.Cut(f, "->"); ok {
			if host, _, err := net.SplitHostPort(from); err == nil {
				fields[i] = host + "->" + to
			}
		}
	}
	return strings.Join(fields, " ")
}
