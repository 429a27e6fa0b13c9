package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/sluicemesh/sluice/pkg/redirect"
)

// A drainer tells sidecars that their pod is about to end. From then on Envoy
// answers each request with "Connection: close" (HTTP/1.1) or GOAWAY (HTTP/2)
// and fails its readiness, so that nobody keeps a connection to it, while it
// goes on to serve what is there and what still comes: streams, and requests of
// clients that do not know yet. Without that a client that keeps its connection
// notices when the sidecar ends, maybe in the middle of a request.
//
// It has no state and may be used by several goroutines.
type drainer struct {
	limit time.Duration // for one pod, all tries
	retry time.Duration // between two tries
	dial  func(context.Context, proxyTarget) (net.Conn, error)
}

func newDrainer() *drainer {
	return &drainer{limit: 3 * time.Second, retry: 100 * time.Millisecond, dial: dialAdmin}
}

// Drain tells the sidecar of a pod, once that is being deleted; twice does no
// harm. It takes no longer than 3 s and tries again until then: Envoy may be
// about to start. An error wraps redirect.ErrGone if the pod's network namespace
// is gone. There is nothing to undo: no pod comes back from being deleted.
func (d *drainer) Drain(ctx context.Context, t proxyTarget) error {
	ctx, cancel := context.WithTimeout(ctx, d.limit)
	defer cancel()
	var last error
	for {
		err := d.try(ctx, t)
		if err == nil || errors.Is(err, redirect.ErrGone) {
			return err
		}
		if last == nil || ctx.Err() == nil { // that time is up says less than why
			last = err
		}
		select {
		case <-ctx.Done():
			return last
		case <-time.After(d.retry):
		}
	}
}

func (d *drainer) try(ctx context.Context, t proxyTarget) error {
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return d.dial(ctx, t) },
	}}
	const what = "tell sidecar to drain"
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://envoy/healthcheck/fail", nil)
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	resp, err := client.Do(req)
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		body, _ := io.ReadAll(io.LimitReader(resp.Body, 200)) // the status says it as well
		return fmt.Errorf("%s: status %d: %q", what, resp.StatusCode, body)
	}
	return nil
}
