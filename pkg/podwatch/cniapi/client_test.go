package cniapi

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// answers runs a server that answers connection after connection with those
// texts, the last one for ever, and returns its socket and the first request.
func answers(t *testing.T, texts ...string) (socket string, first <-chan *http.Request) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "s")
	ln, err := (&net.ListenConfig{}).Listen(t.Context(), "unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	requests := make(chan *http.Request, 1)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for n := 0; ; n++ {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			req, err := http.ReadRequest(bufio.NewReader(conn))
			if err != nil {
				t.Errorf("read request: %v", err)
			} else if n == 0 {
				requests <- req
			}
			_, _ = fmt.Fprint(conn, texts[min(n, len(texts)-1)])
			_ = conn.Close()
		}
	}()
	t.Cleanup(func() {
		_ = ln.Close()
		<-done
	})
	return socket, requests
}

const (
	success = "HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n{}"
	unready = "HTTP/1.0 500 Internal Server Error\r\n\r\n{\"error\":\"the source is not read yet\"}"
)

func TestRequest(t *testing.T) {
	socket, first := answers(t, success)
	if err := NewClient(ClientOptions{Socket: socket}).Del(t.Context(), Attachment{Network: "pods"}); err != nil {
		t.Fatal(err)
	}
	req := <-first
	if req.Method != http.MethodPost || req.URL.Path != "/v1/del" || req.ContentLength == 0 || req.Header.Get("Content-Type") != "application/json" {
		t.Errorf("got %+v", req)
	}
}

// Whatever is no whole answer counts as none.
func TestAnswers(t *testing.T) {
	for _, tc := range []struct{ name, text, want string }{
		{"success", success, ""},
		{"without a length", "HTTP/1.0 200 OK\r\nDate: x\r\n\r\n{}\n", ""},
		{"refusal", unready, "the source is not read yet"},
		{"refusal without words", "HTTP/1.0 500 Internal Server Error\r\n\r\n{}", "agent answered 500 Internal Server Error"},
		{"words with success", "HTTP/1.0 200 OK\r\n\r\n{\"error\":\"no\"}", "no"},
		{"nothing", "", "read answer: unexpected EOF"},
		{"no body", "HTTP/1.0 200 OK\r\n\r\n", "read answer (200 OK): unexpected end of JSON input"},
		{"half a body", "HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\n{}", "read answer: unexpected EOF"},
		{"half a header", "HTTP/1.0 200 OK\r\nContent-Len", `read answer: "HTTP/1.0 200 OK" is no HTTP`},
		{"no HTTP", "hello\r\n\r\n", `read answer: "hello" is no HTTP`},
		{"chunks", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", `read answer: "Transfer-Encoding: chunked" was not asked for`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			socket, _ := answers(t, tc.text)
			err := NewClient(ClientOptions{Socket: socket}).Check(t.Context(), Attachment{})
			if tc.want == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if err == nil || !strings.HasSuffix(err.Error(), tc.want) {
				t.Errorf("got %v, want %s", err, tc.want)
			}
			if none := strings.HasPrefix(tc.want, "read answer"); errors.Is(err, ErrUnavailable) != none {
				t.Errorf("%v: is unavailable: %v, want %v", err, !none, none)
			}
		})
	}
}

// An agent that is being replaced is waited for; one that refuses is not asked
// twice to add a pod, but is asked again for its status.
func TestRetries(t *testing.T) {
	socket, _ := answers(t, "", "", success) // killed with the request under way
	c := NewClient(ClientOptions{Socket: socket})
	if err := c.Add(t.Context(), Attachment{}); err != nil {
		t.Errorf("Add: %v", err)
	}
	socket, _ = answers(t, unready, success)
	c = NewClient(ClientOptions{Socket: socket})
	if err := c.Add(t.Context(), Attachment{}); err == nil || errors.Is(err, ErrUnavailable) {
		t.Errorf("Add that is refused: %v", err)
	}
	socket, _ = answers(t, "", unready, success)
	if err := NewClient(ClientOptions{Socket: socket}).Status(t.Context()); err != nil {
		t.Errorf("Status: %v", err)
	}
	// There was no socket, then there is one.
	late := filepath.Join(t.TempDir(), "s")
	result := make(chan error, 1)
	go func() { result <- NewClient(ClientOptions{Socket: late}).Add(t.Context(), Attachment{}) }()
	ln, err := (&net.ListenConfig{}).Listen(t.Context(), "unix", late)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	conn, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := http.ReadRequest(bufio.NewReader(conn)); err != nil {
		t.Error(err)
	}
	_, _ = fmt.Fprint(conn, success)
	_ = conn.Close()
	if err := <-result; err != nil {
		t.Errorf("Add before there is a socket: %v", err)
	}
}

// Patience ends: in time, with the last reason, and DEL has none.
func TestPatienceEnds(t *testing.T) {
	socket, _ := answers(t, unready)
	o := ClientOptions{Socket: socket, Budget: 300 * time.Millisecond, StatusBudget: 300 * time.Millisecond}
	start := time.Now()
	err := NewClient(o).Status(t.Context())
	if took := time.Since(start); err == nil || err.Error() != "the source is not read yet" || took < 100*time.Millisecond || took > 5*time.Second {
		t.Errorf("Status: %v after %v", err, took)
	}
	o.Socket, o.Budget = filepath.Join(t.TempDir(), "none"), time.Hour
	if err := NewClient(o).Del(t.Context(), Attachment{}); !errors.Is(err, ErrUnavailable) {
		t.Errorf("Del: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := NewClient(o).Add(ctx, Attachment{}); !errors.Is(err, ErrUnavailable) {
		t.Errorf("Add that nobody waits for: %v", err)
	}
}

func FuzzResponse(f *testing.F) {
	f.Add([]byte(success))
	f.Add([]byte(unready))
	f.Add([]byte("HTTP/1.0 200\r\n\r\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		status, body, err := parseResponse(data)
		if err == nil && !strings.HasSuffix(string(data), string(body)) {
			t.Errorf("%q: status %q, body %q", data, status, body)
		}
	})
}

// An agent that says that it is at work is waited for, and not longer than usual
// once it falls silent.
func TestAddWaitsForWork(t *testing.T) {
	const patience, sign = 400 * time.Millisecond, "HTTP/1.0 102 Processing\r\n\r\n"
	for name, tc := range map[string]struct {
		signs int
		last  string
		want  string
	}{
		"works":       {8, success, ""},
		"refuses":     {8, unready, "the source is not read yet"},
		"dies":        {3, "", "unexpected EOF"},
		"is stuck":    {3, "hang", "no answer within 400ms"},
		"never signs": {0, "hang", "no answer within 400ms"},
	} {
		t.Run(name, func(t *testing.T) {
			socket := filepath.Join(t.TempDir(), "s")
			ln, err := (&net.ListenConfig{}).Listen(t.Context(), "unix", socket)
			if err != nil {
				t.Fatal(err)
			}
			done := make(chan struct{})
			go func() {
				defer close(done)
				conn, err := ln.Accept()
				if err != nil {
					return
				}
				_ = ln.Close() // nobody answers another attempt
				defer func() { _ = conn.Close() }()
				in := bufio.NewReader(conn)
				if req, err := http.ReadRequest(in); err != nil || req.Header.Get(AliveHeader) == "" {
					t.Errorf("request %+v: %v, want header %s", req, err, AliveHeader)
				}
				for range tc.signs {
					time.Sleep(patience / 4)
					_, _ = fmt.Fprint(conn, sign)
				}
				if tc.last == "hang" {
					_, _ = in.ReadByte() // until the client gives up
					return
				}
				_, _ = fmt.Fprint(conn, tc.last)
			}()
			err = NewClient(ClientOptions{Socket: socket, Budget: patience}).Add(t.Context(), Attachment{})
			<-done
			switch {
			case tc.want == "" && err != nil:
				t.Error(err)
			case tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want) && !strings.Contains(err.Error(), "connect:")):
				t.Errorf("got %v, want %s", err, tc.want)
			case errors.Is(err, ErrUnavailable) != (tc.want != "" && name != "refuses"):
				t.Errorf("%v: is unavailable: %v", err, errors.Is(err, ErrUnavailable))
			}
		})
	}
}
