package server

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpc "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/sluicemesh/sluice/pkg/xds"
)

const patience = 5 * time.Second

// res makes a resource whose body is its text.
func res(t int, name, text string) xds.Resource {
	body, err := anypb.New(wrapperspb.String(text))
	if err != nil {
		panic(err)
	}
	return xds.Resource{TypeURL: typeURLs[t], Name: name, Version: text, Body: body}
}

// empty answers for endpoints and routes as the translator does.
func empty(typeURL, name string) (xds.Resource, bool) {
	t, _ := typeOf(typeURL)
	if t == clusters || t == listeners {
		return xds.Resource{}, false
	}
	return res(t, name, "empty"), true
}

// logs collects what is logged.
type logs struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logs) count(text string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return bytes.Count(l.b.Bytes(), []byte(text))
}

// A rig is a running server.
type rig struct {
	*Server
	t    testing.TB
	logs *logs
	stop func()
}

var sockets atomic.Int64

// start runs a server with pods a, b and c, which is ready if nothing else is said.
func start(t testing.TB, opts Options) *rig {
	t.Helper()
	r := &rig{t: t, logs: &logs{}}
	opts.Log = slog.New(slog.NewTextHandler(r.logs, nil))
	opts.Empty = empty
	if opts.Socket == "" {
		// One per pod: all pods of these tests share a namespace.
		opts.Socket = fmt.Sprintf("@sluice-test/%d/%d", os.Getpid(), sockets.Add(1))
	}
	s, err := New(opts)
	if err != nil {
		t.Fatal(err)
	}
	r.Server = s
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	r.stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(patience):
			t.Error("Run does not end")
		}
	})
	t.Cleanup(r.stop)
	return r
}

func (r *rig) ready() *rig {
	r.SetReady()
	return r
}

// socketOf opens the pod's socket, under a name of its own.
func (r *rig) socketOf(pod string) string {
	r.t.Helper()
	name := r.opts.Socket + "/" + pod
	r.socketsMu.Lock()
	old := r.opts.Socket
	r.opts.Socket = name
	r.socketsMu.Unlock()
	err := r.Open(pod, "", uint32(os.Geteuid()))
	r.opts.Socket = old
	if err != nil {
		r.t.Fatal(err)
	}
	return name
}

// set makes the pod known.
func (r *rig) set(pod string, own ...xds.Resource) {
	r.SetPod(Pod{UID: pod, Namespace: "ns", Name: pod}, own, time.Time{})
}

func (r *rig) share(owner string, all ...xds.Resource) { r.SetShared(owner, all, time.Now()) }

// until waits for a condition that another goroutine makes true.
func (r *rig) until(what string, ok func() bool) {
	r.t.Helper()
	for end := time.Now().Add(patience); !ok(); {
		if time.Now().After(end) {
			r.t.Fatalf("not within %s: %s", patience, what)
		}
		time.Sleep(time.Millisecond) // between two looks, not instead of one
	}
}

func (r *rig) dial(pod string) *grpc.ClientConn {
	r.t.Helper()
	name := r.socketOf(pod)
	cc, err := grpc.NewClient("passthrough:///pod", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(1<<30)),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", name)
		}))
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { _ = cc.Close() })
	return cc
}

// A client speaks the incremental protocol by hand.
type client struct {
	t      testing.TB
	g      grpc.BidiStreamingClient[discovery.DeltaDiscoveryRequest, discovery.DeltaDiscoveryResponse]
	in     chan *discovery.DeltaDiscoveryResponse
	err    error // once in is closed
	probes int
	end    func()
}

// delta connects as pod, which is made known if it is not.
func (r *rig) delta(pod string) *client {
	r.t.Helper()
	cc := r.dial(pod)
	ctx, cancel := context.WithCancel(context.Background())
	r.t.Cleanup(cancel)
	g, err := discovery.NewAggregatedDiscoveryServiceClient(cc).DeltaAggregatedResources(ctx)
	if err != nil {
		r.t.Fatal(err)
	}
	c := &client{t: r.t, g: g, in: make(chan *discovery.DeltaDiscoveryResponse, 1000), end: func() { cancel(); _ = cc.Close() }}
	go func() {
		defer close(c.in)
		for {
			resp, err := g.Recv()
			if err != nil {
				c.err = err
				return
			}
			c.in <- resp
		}
	}()
	return c
}

func (c *client) send(req *discovery.DeltaDiscoveryRequest) {
	c.t.Helper()
	if err := c.g.Send(req); err != nil {
		c.t.Fatal(err)
	}
}

func (c *client) subscribe(t int, names ...string) {
	c.t.Helper()
	c.send(&discovery.DeltaDiscoveryRequest{TypeUrl: typeURLs[t], ResourceNamesSubscribe: names})
}

func (c *client) unsubscribe(t int, names ...string) {
	c.t.Helper()
	c.send(&discovery.DeltaDiscoveryRequest{TypeUrl: typeURLs[t], ResourceNamesUnsubscribe: names})
}

func (c *client) ack(resp *discovery.DeltaDiscoveryResponse) {
	c.t.Helper()
	c.send(&discovery.DeltaDiscoveryRequest{TypeUrl: resp.GetTypeUrl(), ResponseNonce: resp.GetNonce()})
}

func (c *client) nack(resp *discovery.DeltaDiscoveryResponse, text string) {
	c.t.Helper()
	c.send(&discovery.DeltaDiscoveryRequest{
		TypeUrl: resp.GetTypeUrl(), ResponseNonce: resp.GetNonce(),
		ErrorDetail: &rpc.Status{Code: 3, Message: text},
	})
}

// expect returns the next response, which must be want as describe puts it.
func (c *client) expect(want string) *discovery.DeltaDiscoveryResponse {
	c.t.Helper()
	select {
	case resp, ok := <-c.in:
		if !ok {
			c.t.Fatalf("stream ended (%v), want %s", c.err, want)
		}
		if got := describe(resp); got != want {
			c.t.Fatalf("got  %s\nwant %s", got, want)
		}
		return resp
	case <-time.After(patience):
		c.t.Fatalf("no response, want %s", want)
	}
	return nil
}

// expectAck is expect and ack.
func (c *client) expectAck(want string) {
	c.t.Helper()
	c.ack(c.expect(want))
}

// quiet asserts that the server has nothing to say: what it has it sends before
// it answers for a route that nobody has heard of.
func (c *client) quiet() {
	c.t.Helper()
	c.quietBefore(routes)
}

// quietBefore is quiet for the types up to t; of t nothing may be in flight.
func (c *client) quietBefore(t int) {
	c.t.Helper()
	c.probes++
	probe := fmt.Sprintf("probe-%d", c.probes)
	c.subscribe(t, probe)
	c.expectAck(typeNames[t] + " +" + probe + "=empty")
	c.unsubscribe(t, probe)
}

// describe writes a response as "type +name=text -name".
func describe(resp *discovery.DeltaDiscoveryResponse) string {
	t, _ := typeOf(resp.GetTypeUrl())
	s := typeNames[t]
	for _, r := range resp.GetResources() {
		s += " +" + r.GetName() + "=" + textOf(r.GetResource())
		if r.GetVersion() != textOf(r.GetResource()) {
			s += "(version " + r.GetVersion() + ")"
		}
	}
	for _, name := range resp.GetRemovedResources() {
		s += " -" + name
	}
	return s
}

func textOf(a *anypb.Any) string {
	var v wrapperspb.StringValue
	if err := a.UnmarshalTo(&v); err != nil {
		return err.Error()
	}
	return v.GetValue()
}

// A worldClient speaks the state-of-the-world protocol by hand.
type worldClient struct {
	t  testing.TB
	g  grpc.BidiStreamingClient[discovery.DiscoveryRequest, discovery.DiscoveryResponse]
	in chan *discovery.DiscoveryResponse
}

func (r *rig) world(pod string) *worldClient {
	r.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	r.t.Cleanup(cancel)
	g, err := discovery.NewAggregatedDiscoveryServiceClient(r.dial(pod)).StreamAggregatedResources(ctx)
	if err != nil {
		r.t.Fatal(err)
	}
	c := &worldClient{t: r.t, g: g, in: make(chan *discovery.DiscoveryResponse, 1000)}
	go func() {
		defer close(c.in)
		for {
			resp, err := g.Recv()
			if err != nil {
				return
			}
			c.in <- resp
		}
	}()
	return c
}

func (c *worldClient) request(req *discovery.DiscoveryRequest) {
	c.t.Helper()
	if err := c.g.Send(req); err != nil {
		c.t.Fatal(err)
	}
}

// expect returns the next response, "type name=text ...".
func (c *worldClient) expect(want string) *discovery.DiscoveryResponse {
	c.t.Helper()
	select {
	case resp, ok := <-c.in:
		if !ok {
			c.t.Fatalf("stream ended, want %s", want)
		}
		t, _ := typeOf(resp.GetTypeUrl())
		got := typeNames[t]
		for _, r := range resp.GetResources() {
			got += " " + textOf(r)
		}
		if got != want {
			c.t.Fatalf("got  %s\nwant %s", got, want)
		}
		return resp
	case <-time.After(patience):
		c.t.Fatalf("no response, want %s", want)
	}
	return nil
}

func (c *worldClient) ack(resp *discovery.DiscoveryResponse, names ...string) {
	c.t.Helper()
	c.request(&discovery.DiscoveryRequest{
		TypeUrl: resp.GetTypeUrl(), VersionInfo: resp.GetVersionInfo(),
		ResponseNonce: resp.GetNonce(), ResourceNames: names,
	})
}

func (c *worldClient) nack(resp *discovery.DiscoveryResponse, version, text string, names ...string) {
	c.t.Helper()
	c.request(&discovery.DiscoveryRequest{
		TypeUrl: resp.GetTypeUrl(), VersionInfo: version,
		ResponseNonce: resp.GetNonce(), ResourceNames: names, ErrorDetail: &rpc.Status{Code: 3, Message: text},
	})
}

// sorted returns the keys of a map.
func sorted[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
