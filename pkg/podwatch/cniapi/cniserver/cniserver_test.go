package cniserver

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/sluicemesh/sluice/pkg/podwatch/cniapi"
)

// A fake is a Handler that records and answers with err.
type fake struct {
	mu    sync.Mutex
	calls []string
	last  cniapi.Attachment
	// network and valid are those of the last GC.
	network string
	valid   []cniapi.AttachmentID
	err     error
	do      func(context.Context) error
}

func (f *fake) note(ctx context.Context, verb string, a cniapi.Attachment) error {
	f.mu.Lock()
	f.calls, f.last = append(f.calls, verb), a
	do, err := f.do, f.err
	f.mu.Unlock()
	if do != nil {
		return do(ctx)
	}
	return err
}

func (f *fake) Add(ctx context.Context, a cniapi.Attachment) error { return f.note(ctx, "add", a) }

func (f *fake) Del(ctx context.Context, a cniapi.Attachment) error { return f.note(ctx, "del", a) }

func (f *fake) Check(ctx context.Context, a cniapi.Attachment) error { return f.note(ctx, "check", a) }

func (f *fake) Status(ctx context.Context) error { return f.note(ctx, "status", cniapi.Attachment{}) }

func (f *fake) GC(ctx context.Context, network string, valid []cniapi.AttachmentID) error {
	f.network, f.valid = network, valid
	return f.note(ctx, "gc", cniapi.Attachment{})
}

func example() cniapi.Attachment {
	return cniapi.Attachment{
		AttachmentID: cniapi.AttachmentID{ContainerID: "c1", IfName: "eth0"},
		Network:      "pods",
		Netns:        "/run/netns/x",
		PodNamespace: "shop",
		PodName:      "reviews-1",
		PodUID:       "0b6f",
		Interfaces: []cniapi.Interface{{Name: "eth0", Addrs: []netip.Addr{
			netip.MustParseAddr("10.1.0.5"), netip.MustParseAddr("fd00::5"),
		}}},
	}
}

// start runs a server that answers this process, whoever runs it.
func start(t *testing.T, o Options, uid int, budget time.Duration) *Server {
	t.Helper()
	s, err := newServer(o, uint32(uid), budget)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return s
}

func socket(t *testing.T) string { return filepath.Join(t.TempDir(), "run", "cni.sock") }

var cmpAddr = cmpopts.EquateComparable(netip.Addr{})

func TestVerbs(t *testing.T) {
	f := &fake{}
	seen := make(chan string, 7)
	path := socket(t)
	start(t, Options{Socket: path, Handler: f, Observe: func(verb string, code int, d time.Duration) {
		seen <- fmt.Sprintf("%s %d", verb, code)
		if d <= 0 {
			t.Errorf("%s took %v", verb, d)
		}
	}}, os.Getuid(), cniapi.ServerBudget)
	c := cniapi.NewClient(cniapi.ClientOptions{Socket: path})
	ctx := t.Context()

	for _, do := range []func() error{
		func() error { return c.Add(ctx, example()) },
		func() error { return c.Check(ctx, example()) },
		func() error { return c.Del(ctx, example()) },
		func() error { return c.GC(ctx, "pods", []cniapi.AttachmentID{{ContainerID: "c1", IfName: "eth0"}}) },
		func() error { return c.Status(ctx) },
	} {
		if err := do(); err != nil {
			t.Error(err)
		}
	}
	want := []string{"add", "check", "del", "gc", "status"}
	if diff := cmp.Diff(want, f.calls); diff != "" {
		t.Errorf("calls (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]cniapi.AttachmentID{{ContainerID: "c1", IfName: "eth0"}}, f.valid); f.network != "pods" || diff != "" {
		t.Errorf("GC of network %q, valid (-want +got):\n%s", f.network, diff)
	}
	if err := c.Add(ctx, example()); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(example(), f.last, cmpAddr); diff != "" {
		t.Errorf("attachment (-want +got):\n%s", diff)
	}
	if err := c.GC(ctx, "pods", nil); err != nil || f.valid == nil || len(f.valid) != 0 {
		t.Errorf("GC of nothing: %v, handler saw %#v", err, f.valid)
	}
	// Observe runs after the answer is written: wait for each.
	for _, want := range []string{"add 200", "check 200", "del 200", "gc 200", "status 200", "add 200", "gc 200"} {
		select {
		case got := <-seen:
			if got != want {
				t.Errorf("observed %q, want %q", got, want)
			}
		case <-time.After(5 * time.Second):
			t.Fatalf("%q was not observed", want)
		}
	}
}

func TestHandlerErrorReachesTheClientUnchanged(t *testing.T) {
	f := &fake{err: errors.New(`annotation sluice.dev/backend: "ebfp": want auto, ebpf or iptables`)}
	path := socket(t)
	start(t, Options{Socket: path, Handler: f}, os.Getuid(), cniapi.ServerBudget)
	err := cniapi.NewClient(cniapi.ClientOptions{Socket: path}).Add(t.Context(), example())
	if err == nil || err.Error() != f.err.Error() {
		t.Errorf("got %v, want %v", err, f.err)
	}
	if errors.Is(err, cniapi.ErrUnavailable) {
		t.Error("an answer counts as no answer")
	}
}

func TestPanicBecomesAnError(t *testing.T) {
	f := &fake{do: func(context.Context) error { panic("out of cheese") }}
	path := socket(t)
	start(t, Options{Socket: path, Handler: f}, os.Getuid(), cniapi.ServerBudget)
	c := cniapi.NewClient(cniapi.ClientOptions{Socket: path})
	for range 2 { // and the server lives on
		if err := c.Add(t.Context(), example()); err == nil || !strings.Contains(err.Error(), "panic in the agent: out of cheese") {
			t.Errorf("got %v", err)
		}
	}
}

func TestOtherUsersAreRefused(t *testing.T) {
	f := &fake{}
	path := socket(t)
	start(t, Options{Socket: path, Handler: f}, os.Getuid()+1, cniapi.ServerBudget)
	err := cniapi.NewClient(cniapi.ClientOptions{Socket: path}).Add(t.Context(), example())
	want := fmt.Sprintf("only root may ask the agent: process %d has UID %d", os.Getpid(), os.Getuid())
	if err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
	if len(f.calls) != 0 {
		t.Errorf("handler was called: %v", f.calls)
	}
}

func TestSocketIsForRootAlone(t *testing.T) {
	path := socket(t)
	start(t, Options{Socket: path, Handler: &fake{}}, os.Getuid(), cniapi.ServerBudget)
	fi, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if fi.Mode() != os.ModeSocket|0o600 {
		t.Errorf("socket has mode %v", fi.Mode())
	}
	fi, err = os.Stat(filepath.Dir(path))
	if err != nil {
		t.Fatal(err)
	}
	if fi.Mode().Perm()&0o022 != 0 {
		t.Errorf("directory has mode %v", fi.Mode())
	}
}

func TestNewServerErrors(t *testing.T) {
	open := filepath.Join(t.TempDir(), "open")
	if err := os.Mkdir(open, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(open, 0o777); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name string
		o    Options
		want string
	}{
		{"no handler", Options{Socket: socket(t)}, "no handler"},
		{"open directory", Options{Socket: filepath.Join(open, "s"), Handler: &fake{}}, "may be written to by everybody"},
		{"long path", Options{Socket: filepath.Join(t.TempDir(), strings.Repeat("x", 120)), Handler: &fake{}}, "invalid argument"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := New(tc.o)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
		})
	}
}

func TestNewServerTakesOver(t *testing.T) {
	path := socket(t)
	older, newer := &fake{}, &fake{}
	start(t, Options{Socket: path, Handler: older}, os.Getuid(), cniapi.ServerBudget)
	c := cniapi.NewClient(cniapi.ClientOptions{Socket: path})
	if err := c.Status(t.Context()); err != nil {
		t.Fatal(err)
	}
	start(t, Options{Socket: path, Handler: newer}, os.Getuid(), cniapi.ServerBudget)
	if err := c.Status(t.Context()); err != nil {
		t.Fatal(err)
	}
	if len(older.calls) != 1 || len(newer.calls) != 1 {
		t.Errorf("older answered %v, newer %v", older.calls, newer.calls)
	}
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) != 1 {
		t.Errorf("left beside the socket: %v", entries)
	}
}

// A request that arrives before Run is answered once Run runs.
func TestRequestsWaitForRun(t *testing.T) {
	f := &fake{}
	sock := socket(t)
	s, err := newServer(Options{Socket: sock, Handler: f}, uint32(os.Getuid()), cniapi.ServerBudget)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ran := make(chan error, 1)
	d := net.Dialer{}
	conn, err := d.DialContext(t.Context(), "unix", sock) // queued: nobody accepts yet
	if err != nil {
		t.Fatal(err)
	}
	go func() { ran <- s.Run(ctx) }()
	if _, err := fmt.Fprintf(conn, "GET %s HTTP/1.0\r\n\r\n", cniapi.Path(cniapi.VerbStatus)); err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if _, err := b.ReadFrom(conn); err != nil || !strings.HasPrefix(b.String(), "HTTP/1.0 200") {
		t.Errorf("got %q, %v", b.String(), err)
	}
	_ = conn.Close()
	cancel()
	if err := <-ran; err != nil {
		t.Error(err)
	}
}

func TestUnavailable(t *testing.T) {
	stale := socket(t)
	s, err := newServer(Options{Socket: stale, Handler: &fake{}}, uint32(os.Getuid()), cniapi.ServerBudget)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.ln.Close(); err != nil {
		t.Fatal(err)
	}
	silent := socket(t)
	if _, err := newServer(Options{Socket: silent, Handler: &fake{}}, uint32(os.Getuid()), cniapi.ServerBudget); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct{ name, socket, want string }{
		{"no socket", filepath.Join(t.TempDir(), "none"), "no such file or directory"},
		{"nobody listens", stale, "connection refused"},
		{"no answer", silent, "no answer within 100ms"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := cniapi.NewClient(cniapi.ClientOptions{Socket: tc.socket, Budget: 100 * time.Millisecond, StatusBudget: 100 * time.Millisecond})
			err := c.Add(t.Context(), example())
			if !errors.Is(err, cniapi.ErrUnavailable) {
				t.Fatalf("got %v", err)
			}
			prefix := "sluice agent is not available on this node (socket " + tc.socket + "): "
			suffix := tc.want + "; pod sandbox creation is retried by the kubelet"
			if !strings.HasPrefix(err.Error(), prefix) || !strings.HasSuffix(err.Error(), suffix) {
				t.Errorf("got  %v\nwant %s...%s", err, prefix, suffix)
			}
			if err := c.Status(t.Context()); !errors.Is(err, cniapi.ErrUnavailable) || strings.Contains(err.Error(), "kubelet") {
				t.Errorf("Status: %v", err)
			}
		})
	}
}

func TestBudgets(t *testing.T) {
	if !(cniapi.ServerBudget < cniapi.ClientBudget && cniapi.ClientBudget < cniapi.Budget) {
		t.Errorf("server %v, client %v, all %v: each must be shorter than the next", cniapi.ServerBudget, cniapi.ClientBudget, cniapi.Budget)
	}
	if !(cniapi.ServerWorkBudget < cniapi.WorkBudget && cniapi.AliveInterval < cniapi.ServerBudget) {
		t.Errorf("work: server %v, client %v, a sign every %v", cniapi.ServerWorkBudget, cniapi.WorkBudget, cniapi.AliveInterval)
	}
	f := &fake{do: func(ctx context.Context) error {
		<-ctx.Done()
		return fmt.Errorf("wait for the proxy: %w", ctx.Err())
	}}
	path := socket(t)
	start(t, Options{Socket: path, Handler: f}, os.Getuid(), 50*time.Millisecond)
	// The agent's own words arrive, not only that there was no answer.
	err := cniapi.NewClient(cniapi.ClientOptions{Socket: path, Budget: 10 * time.Second}).Check(t.Context(), example())
	if err == nil || err.Error() != "wait for the proxy: context deadline exceeded" {
		t.Errorf("got %v", err)
	}
}

func TestRequestsThatAreRefused(t *testing.T) {
	f := &fake{}
	sock := socket(t)
	start(t, Options{Socket: sock, Handler: f}, os.Getuid(), cniapi.ServerBudget)
	var d net.Dialer
	c := &http.Client{Transport: &http.Transport{
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return d.DialContext(ctx, "unix", sock) },
		DisableKeepAlives: true,
	}}
	const whole = `{"containerID":"c","ifName":"eth0","network":"pods","netns":"/n","podNamespace":"a","podName":"b"}`
	for _, tc := range []struct {
		name, method, path, body string
		code                     int
		want                     string
	}{
		{"whole", "POST", cniapi.Path(cniapi.VerbAdd), whole, 200, `{}`},
		{"no JSON", "POST", cniapi.Path(cniapi.VerbAdd), `hello`, 400, "invalid character"},
		{"empty", "POST", cniapi.Path(cniapi.VerbAdd), ``, 400, "EOF"},
		{"two values", "POST", cniapi.Path(cniapi.VerbAdd), whole + whole, 400, "more than one JSON value"},
		{"unknown field", "POST", cniapi.Path(cniapi.VerbAdd), strings.Replace(whole, "{", `{"mood":1,`, 1), 400, "mood"},
		{"wrong type", "POST", cniapi.Path(cniapi.VerbAdd), strings.Replace(whole, `"c"`, `1`, 1), 400, "containerID"},
		{"no container", "POST", cniapi.Path(cniapi.VerbAdd), strings.Replace(whole, `"c"`, `""`, 1), 400, "containerID is missing"},
		{"no network", "POST", cniapi.Path(cniapi.VerbAdd), strings.Replace(whole, `"pods"`, `""`, 1), 400, "network is missing"},
		{"no netns", "POST", cniapi.Path(cniapi.VerbAdd), strings.Replace(whole, `"/n"`, `""`, 1), 400, "netns is missing"},
		{"del without netns", "POST", cniapi.Path(cniapi.VerbDel), strings.Replace(whole, `"/n"`, `""`, 1), 200, `{}`},
		{"bad address", "POST", cniapi.Path(cniapi.VerbAdd), strings.Replace(whole, "{", `{"interfaces":[{"name":"e","addrs":["10.1"]}],`, 1), 400, "10.1"},
		{"empty address", "POST", cniapi.Path(cniapi.VerbAdd), strings.Replace(whole, "{", `{"interfaces":[{"name":"e","addrs":[""]}],`, 1), 400, "want an IP address"},
		{"zone", "POST", cniapi.Path(cniapi.VerbAdd), strings.Replace(whole, "{", `{"interfaces":[{"name":"e","addrs":["fe80::1%e"]}],`, 1), 400, "without zone"},
		{"nameless interface", "POST", cniapi.Path(cniapi.VerbAdd), strings.Replace(whole, "{", `{"interfaces":[{"addrs":[]}],`, 1), 400, "no name"},
		{"gc without list", "POST", cniapi.Path(cniapi.VerbGC), `{"network":"pods"}`, 400, "valid is missing"},
		{"gc without network", "POST", cniapi.Path(cniapi.VerbGC), `{"valid":[]}`, 400, "network is missing"},
		{"gc null", "POST", cniapi.Path(cniapi.VerbGC), `{"network":"pods","valid":null}`, 400, "valid is missing"},
		{"gc half", "POST", cniapi.Path(cniapi.VerbGC), `{"network":"pods","valid":[{"containerID":"c"}]}`, 400, "ifName"},
		{"too large", "POST", cniapi.Path(cniapi.VerbAdd), `{"podName":"` + strings.Repeat("x", cniapi.MaxMessage) + `"}`, 413, "too large"},
		{"unknown path", "POST", "/v1/nothing", whole, 400, "no such request: POST /v1/nothing"},
		{"wrong method", "GET", cniapi.Path(cniapi.VerbAdd), "", 400, "no such request: GET /v1/add"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			req, err := http.NewRequestWithContext(t.Context(), tc.method, "http://agent"+tc.path, strings.NewReader(tc.body))
			if err != nil {
				t.Fatal(err)
			}
			res, err := c.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = res.Body.Close() }()
			var b bytes.Buffer
			if _, err := b.ReadFrom(res.Body); err != nil {
				t.Fatal(err)
			}
			if res.StatusCode != tc.code || !strings.Contains(b.String(), tc.want) {
				t.Errorf("got %d %s, want %d ... %s", res.StatusCode, b.String(), tc.code, tc.want)
			}
		})
	}
	if diff := cmp.Diff([]string{"add", "del"}, f.calls); diff != "" {
		t.Errorf("handler calls (-want +got):\n%s", diff)
	}
}

func TestAddressesAreUnmapped(t *testing.T) {
	f := &fake{}
	sock := socket(t)
	start(t, Options{Socket: sock, Handler: f}, os.Getuid(), cniapi.ServerBudget)
	a := example()
	a.Interfaces[0].Addrs = []netip.Addr{netip.MustParseAddr("::ffff:10.1.0.5")}
	if err := cniapi.NewClient(cniapi.ClientOptions{Socket: sock}).Add(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	if got := f.last.Interfaces[0].Addrs[0]; got != netip.MustParseAddr("10.1.0.5") {
		t.Errorf("handler saw %v", got)
	}
}

// A request under way is finished when the server ends.
func TestRunFinishesRequestsUnderWay(t *testing.T) {
	entered, leave := make(chan struct{}), make(chan struct{})
	f := &fake{do: func(context.Context) error {
		close(entered)
		<-leave
		return nil
	}}
	sock := socket(t)
	s, err := newServer(Options{Socket: sock, Handler: f}, uint32(os.Getuid()), cniapi.ServerBudget)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ran, added := make(chan error, 1), make(chan error, 1)
	go func() { ran <- s.Run(ctx) }()
	go func() { added <- cniapi.NewClient(cniapi.ClientOptions{Socket: sock}).Add(t.Context(), example()) }()
	<-entered
	cancel()
	close(leave)
	if err := <-added; err != nil {
		t.Errorf("Add: %v", err)
	}
	if err := <-ran; err != nil {
		t.Errorf("Run: %v", err)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"containerID":"c","ifName":"eth0","network":"pods","netns":"/n","podNamespace":"a","podName":"b","interfaces":[{"name":"eth0","addrs":["10.1.0.5","::ffff:10.1.0.6","fd00::5"]}]}`), true)
	f.Add([]byte(`{"network":"pods","valid":[{"containerID":"c","ifName":"eth0"}]}`), false)
	f.Add([]byte(`{"interfaces":[{"name":"e","addrs":["fe80::1%e"]}]}`), true)
	f.Add([]byte(`[{}]`), true)
	f.Add([]byte(`{} {}`), false)
	f.Fuzz(func(t *testing.T, data []byte, attachment bool) {
		if !attachment {
			req, err := decodeGC(bytes.NewReader(data))
			if err == nil && (req.Network == "" || req.Valid == nil) {
				t.Errorf("no network or list and no error: %s", data)
			}
			return
		}
		a, err := decodeAttachment(bytes.NewReader(data), cniapi.VerbAdd)
		if err != nil {
			return
		}
		if a.ContainerID == "" || a.IfName == "" || a.Network == "" || a.Netns == "" || a.PodName == "" || a.PodNamespace == "" {
			t.Errorf("accepted with a part missing: %s", data)
		}
		for _, i := range a.Interfaces {
			for _, addr := range i.Addrs {
				if !addr.IsValid() || addr.Is4In6() || addr.Zone() != "" {
					t.Errorf("accepted address %v", addr)
				}
			}
		}
	})
}

// TestSaysAlive: whoever asks for it hears of work that takes long, and nobody else;
// the budget that ends other requests does not end that work.
func TestSaysAlive(t *testing.T) {
	const budget = 300 * time.Millisecond
	for name, tc := range map[string]struct{ header, want string }{
		"asked for": {cniapi.AliveHeader + ": 1s\r\n", "HTTP/1.0 102 Processing"},
		"not":       {"", "HTTP/1.0 504 Gateway Timeout"},
	} {
		t.Run(name, func(t *testing.T) {
			f := &fake{do: func(ctx context.Context) error {
				select {
				case <-ctx.Done():
					return ctx.Err()
				case <-time.After(3 * budget):
					return nil
				}
			}}
			s, err := newServer(Options{Socket: socket(t), Handler: f}, uint32(os.Getuid()), budget)
			if err != nil {
				t.Fatal(err)
			}
			s.alive = budget / 3
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() { done <- s.Run(ctx) }()
			defer func() {
				cancel()
				if err := <-done; err != nil {
					t.Errorf("Run: %v", err)
				}
			}()
			conn, err := net.Dial("unix", s.o.Socket)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = conn.Close() }()
			body, err := json.Marshal(example())
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprintf(conn, "POST %s HTTP/1.0\r\nHost: agent\r\n%sContent-Length: %d\r\n\r\n%s", cniapi.Path(cniapi.VerbAdd), tc.header, len(body), body)
			answer, err := io.ReadAll(conn)
			if err != nil {
				t.Fatal(err)
			}
			if !strings.HasPrefix(string(answer), tc.want) {
				t.Errorf("answer begins with %.60q, want %q", answer, tc.want)
			}
			if tc.header != "" && !strings.Contains(string(answer), "\r\n\r\nHTTP/1.0 200 OK\r\n") {
				t.Errorf("answer ends without success: %q", answer)
			}
		})
	}
}
