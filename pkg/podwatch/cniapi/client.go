package cniapi

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"time"
)

// A Client asks the agent of this node. It implements Handler. Every method
// returns within Budget, with an error wrapping ErrUnavailable if nobody
// answered in that time.
type Client struct {
	socket string
	budget time.Duration
	http   *http.Client
}

var _ Handler = (*Client)(nil)

// NewClient returns a client of the agent on socket; empty means DefaultSocket.
// It connects anew for each request and holds nothing open between them.
func NewClient(socket string) *Client { return newClient(socket, clientBudget) }

func newClient(socket string, budget time.Duration) *Client {
	if socket == "" {
		socket = DefaultSocket
	}
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}
	return &Client{
		socket: socket,
		budget: budget,
		http:   &http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}},
	}
}

// Add implements Handler.
func (c *Client) Add(ctx context.Context, a Attachment) error {
	err := c.do(ctx, http.MethodPost, verbAdd, a)
	if errors.Is(err, ErrUnavailable) {
		return fmt.Errorf("%w; pod sandbox creation is retried by the kubelet", err)
	}
	return err
}

// Del implements Handler.
func (c *Client) Del(ctx context.Context, a Attachment) error {
	return c.do(ctx, http.MethodPost, verbDel, a)
}

// Check implements Handler.
func (c *Client) Check(ctx context.Context, a Attachment) error {
	return c.do(ctx, http.MethodPost, verbCheck, a)
}

// GC implements Handler. A nil list is an empty one: nothing of network is valid.
func (c *Client) GC(ctx context.Context, network string, valid []AttachmentID) error {
	if valid == nil {
		valid = []AttachmentID{}
	}
	return c.do(ctx, http.MethodPost, verbGC, gcRequest{Network: network, Valid: valid})
}

// Status implements Handler.
func (c *Client) Status(ctx context.Context) error {
	return c.do(ctx, http.MethodGet, verbStatus, nil)
}

func (c *Client) do(ctx context.Context, method, verb string, body any) error {
	ctx, cancel := context.WithTimeoutCause(ctx, c.budget, fmt.Errorf("no answer within %v", c.budget))
	defer cancel()
	var r io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return fmt.Errorf("encode request: %w", err)
		}
		r = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://agent"+path(verb), r)
	if err != nil {
		return fmt.Errorf("make request: %w", err)
	}
	res, err := c.http.Do(req)
	if err != nil {
		return c.unavailable(ctx, err)
	}
	defer func() { _ = res.Body.Close() }()
	var a answer
	if err := json.NewDecoder(io.LimitReader(res.Body, maxRequest)).Decode(&a); err != nil {
		return c.unavailable(ctx, fmt.Errorf("read answer (%s): %w", res.Status, err))
	}
	if res.StatusCode == http.StatusOK && a.Error == "" {
		return nil
	}
	if a.Error == "" {
		a.Error = "agent answered " + res.Status
	}
	return errors.New(a.Error)
}

// unavailable says why there was no answer, without the URL that means nothing
// on a unix socket.
func (c *Client) unavailable(ctx context.Context, err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err
	}
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return fmt.Errorf("%w on this node (socket %s): %w", ErrUnavailable, c.socket, err)
}
