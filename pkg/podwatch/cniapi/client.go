package cniapi

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"time"
)

const (
	// StatusBudget is how long Status waits for an agent that is being started
	// anew. A runtime asks for it each time that the kubelet looks, every 5 s, and
	// one error takes the node out of service; silence does so after 30 s.
	StatusBudget = 15 * time.Second
	// retryInterval is how often an agent that is not there is looked for.
	retryInterval = 50 * time.Millisecond
)

// ClientOptions say whom to ask, and how patiently. The zero value is the agent
// of this node.
type ClientOptions struct {
	// Socket of the agent; empty means DefaultSocket.
	Socket string
	// Budget bounds each method but Status; 0 means ClientBudget.
	Budget time.Duration
	// StatusBudget bounds Status; 0 means StatusBudget.
	StatusBudget time.Duration
}

// A Client asks the agent of this node. It implements Handler. Every method
// returns within its budget, with an error wrapping ErrUnavailable if nobody
// answered in that time.
//
// It speaks HTTP/1.0 by hand: net/http alone would double the time in which the
// plugin starts.
type Client struct{ o ClientOptions }

var _ Handler = (*Client)(nil)

// NewClient returns a client. It connects anew for each request and holds
// nothing open between them.
func NewClient(o ClientOptions) *Client {
	return &Client{ClientOptions{
		Socket:       cmp.Or(o.Socket, DefaultSocket),
		Budget:       cmp.Or(o.Budget, ClientBudget),
		StatusBudget: cmp.Or(o.StatusBudget, StatusBudget),
	}}
}

// Add implements Handler. While nobody answers it asks again: an agent that is
// being replaced is back sooner than the kubelet would try again. An agent that
// says that it is at work is waited for up to WorkBudget.
func (c *Client) Add(ctx context.Context, a Attachment) error {
	ctx, cancel := within(ctx, max(WorkBudget, c.o.Budget))
	defer cancel()
	p := newPatience(c.o.Budget)
	err := p.retry(ctx, func(err error) bool { return errors.Is(err, ErrUnavailable) },
		func() error { return c.do(ctx, p, "POST", VerbAdd, a) })
	if errors.Is(err, ErrUnavailable) {
		return fmt.Errorf("%w; pod sandbox creation is retried by the kubelet", err)
	}
	return err
}

// Del implements Handler.
func (c *Client) Del(ctx context.Context, a Attachment) error {
	return c.once(ctx, VerbDel, a)
}

// Check implements Handler.
func (c *Client) Check(ctx context.Context, a Attachment) error {
	return c.once(ctx, VerbCheck, a)
}

// GC implements Handler. A nil list is an empty one: nothing of network is valid.
func (c *Client) GC(ctx context.Context, network string, valid []AttachmentID) error {
	if valid == nil {
		valid = []AttachmentID{}
	}
	return c.once(ctx, VerbGC, GCRequest{Network: network, Valid: valid})
}

// Status implements Handler. It returns an error only if the agent was not ready
// at any time of its budget.
func (c *Client) Status(ctx context.Context) error {
	ctx, cancel := within(ctx, c.o.StatusBudget)
	defer cancel()
	p := newPatience(c.o.StatusBudget)
	return p.retry(ctx, func(error) bool { return true },
		func() error { return c.do(ctx, p, "GET", VerbStatus, nil) })
}

// once asks without asking again.
func (c *Client) once(ctx context.Context, verb string, body any) error {
	ctx, cancel := within(ctx, c.o.Budget)
	defer cancel()
	return c.do(ctx, newPatience(c.o.Budget), "POST", verb, body)
}

// within bounds a request and says so when it is over.
func within(ctx context.Context, budget time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, budget, fmt.Errorf("no answer within %v", budget))
}

// A patience is for how long the agent may be silent.
type patience struct {
	limit time.Duration
	end   time.Time
}

func newPatience(limit time.Duration) *patience {
	return &patience{limit: limit, end: time.Now().Add(limit)}
}

// heard notes a sign of the agent.
func (p *patience) heard() { p.end = time.Now().Add(p.limit) }

// retry asks until there is no error, or one that again does not accept, or too
// little patience is left for another attempt; then it returns the last error.
func (p *patience) retry(ctx context.Context, again func(error) bool, ask func() error) error {
	for {
		err := ask()
		if err == nil || !again(err) {
			return err
		}
		// An attempt that is cut short would hide the reason.
		end := p.end
		if last, limited := ctx.Deadline(); limited && last.Before(end) {
			end = last
		}
		if time.Until(end) < 2*retryInterval {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(retryInterval):
		}
	}
}

// do asks once.
func (c *Client) do(ctx context.Context, p *patience, method, verb string, body any) error {
	var b []byte
	if body != nil {
		var err error
		if b, err = json.Marshal(body); err != nil {
			return fmt.Errorf("encode request: %w", err)
		}
	}
	status, text, err := c.exchange(ctx, p, method, verb, b)
	if err != nil {
		return c.unavailable(ctx, err)
	}
	var a Answer
	if err := json.Unmarshal(text, &a); err != nil {
		return c.unavailable(ctx, fmt.Errorf("read answer (%s): %w", status, err))
	}
	if status == "200 OK" && a.Error == "" {
		return nil
	}
	if a.Error == "" {
		a.Error = "agent answered " + status
	}
	return errors.New(a.Error)
}

// exchange sends one request and returns the status line's end and the body of
// the response.
func (c *Client) exchange(ctx context.Context, p *patience, method, verb string, body []byte) (status string, text []byte, err error) {
	d := net.Dialer{Deadline: p.end}
	conn, err := d.DialContext(ctx, "unix", c.o.Socket)
	if err != nil {
		return "", nil, err
	}
	defer func() { _ = conn.Close() }()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()

	var req bytes.Buffer
	fmt.Fprintf(&req, "%s %s HTTP/1.0\r\nHost: agent\r\n", method, Path(verb))
	if verb == VerbAdd {
		fmt.Fprintf(&req, "%s: %s\r\n", AliveHeader, AliveInterval)
	}
	if body != nil {
		fmt.Fprintf(&req, "Content-Type: application/json\r\nContent-Length: %d\r\n", len(body))
	}
	req.WriteString("\r\n")
	req.Write(body)
	if _, err := conn.Write(req.Bytes()); err != nil {
		return "", nil, fmt.Errorf("send request: %w", err)
	}
	res, err := readAll(ctx, p, conn)
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return "", nil, fmt.Errorf("no answer within %v", p.limit)
	case err != nil:
		return "", nil, fmt.Errorf("read answer: %w", err)
	}
	return parseResponse(res)
}

// readAll reads until the server closes, which ends an answer in HTTP/1.0, for as
// long as patience or ctx last.
func readAll(ctx context.Context, p *patience, conn net.Conn) ([]byte, error) {
	var res []byte
	buf := make([]byte, 4096)
	for len(res) < MaxMessage {
		if err := conn.SetReadDeadline(p.end); err != nil {
			return nil, err
		}
		// Or the deadline that its end has set would be overwritten.
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		n, err := conn.Read(buf)
		res = append(res, buf[:n]...)
		if errors.Is(err, io.EOF) {
			return res, nil
		}
		if err != nil {
			return nil, err
		}
		p.heard()
	}
	return res, nil
}

// parseResponse takes a response apart and makes sure that it is whole. Interim
// responses before it have done their work.
func parseResponse(res []byte) (status string, body []byte, err error) {
	for bytes.HasPrefix(res, []byte("HTTP/1.0 102 ")) || bytes.HasPrefix(res, []byte("HTTP/1.1 102 ")) {
		_, res, _ = bytes.Cut(res, []byte("\r\n\r\n"))
	}
	if len(res) == 0 {
		return "", nil, fmt.Errorf("read answer: %w", io.ErrUnexpectedEOF)
	}
	head, body, ok := bytes.Cut(res, []byte("\r\n\r\n"))
	lines := strings.Split(string(head), "\r\n")
	proto, status, found := strings.Cut(lines[0], " ")
	if !ok || !found || !strings.HasPrefix(proto, "HTTP/1.") {
		return "", nil, fmt.Errorf("read answer: %.40q is no HTTP", lines[0])
	}
	for _, line := range lines[1:] {
		name, value, _ := strings.Cut(line, ":")
		switch strings.ToLower(name) {
		case "content-length":
			if n, err := strconv.Atoi(strings.TrimSpace(value)); err != nil || n != len(body) {
				return "", nil, fmt.Errorf("read answer: %w", io.ErrUnexpectedEOF)
			}
		case "transfer-encoding":
			return "", nil, fmt.Errorf("read answer: %q was not asked for", line)
		}
	}
	return status, body, nil
}

// unavailable says why there was no answer.
func (c *Client) unavailable(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	return fmt.Errorf("%w on this node (socket %s): %w", ErrUnavailable, c.o.Socket, err)
}
