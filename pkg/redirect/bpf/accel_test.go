package bpf

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"

	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/tests/need"
	"github.com/sluicemesh/sluice/tests/netnstest"
)

// accelerated are options with which connections between proxies are
// accelerated, and skips or fails the test where they cannot be.
func accelerated(t *testing.T) Options {
	t.Helper()
	o := newOptions(t)
	// One file for all tests of the process: it is found out once.
	o.Accelerate, o.AccelerateCache = redirect.AccelerateOn, filepath.Join(os.TempDir(), "accelerate.json")
	o.Log = slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
	results, err := decideAcceleration(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range results {
		if r.Place != redirect.PlacePeer || r.Right {
			continue
		}
		if !strings.HasPrefix(r.Reason, "check ") && !strings.HasPrefix(r.Reason, "connections ") {
			need.Missing(t, "a kernel that can accelerate: "+r.Reason)
		}
		t.Fatalf("this kernel has all that is needed, but: %s", r.Reason)
	}
	return o
}

// TestDecision tries this kernel, and then remembers.
func TestDecision(t *testing.T) {
	o := accelerated(t)
	o.AccelerateCache = filepath.Join(t.TempDir(), "accelerate.json")
	first, err := decideAcceleration(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range first {
		t.Logf("%s: right %v, faster %v: %s", r.Place, r.Right, r.Faster, r.Reason)
		if r.Reason == "" {
			t.Errorf("%s has no reason", r.Place)
		}
	}
	// A command that fails is not asked when the answer is known.
	o.PairCheck = []string{"/bin/false"}
	again, err := decideAcceleration(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(first, again); diff != "" {
		t.Error(diff)
	}
	// Of another boot, kernel or build it is not known.
	if err := os.WriteFile(o.AccelerateCache, []byte(`{"Key":"other","Results":[{"Right":true}]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := decideAcceleration(t.Context(), o); err == nil {
		t.Error("another boot's decision was taken over")
	}
}

func entries(t *testing.T, m *ebpf.Map) int {
	t.Helper()
	n, err := count(t.Context(), m)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// proxies are two pods, each with a process that its redirection takes for its
// proxy: this one.
type proxies struct {
	r      *Redirector
	client *netnstest.Pod
	server *netnstest.Pod
	w      [2]redirect.Workload
}

func newProxies(t *testing.T, o Options) *proxies {
	t.Helper()
	node := netnstest.NewNode(t)
	o.HostNetns = node.Netns
	p := &proxies{r: open(t, o), client: node.Pod(t, "client"), server: node.Pod(t, "server")}
	p.w = [2]redirect.Workload{workload(t, p.client), workload(t, p.server)}
	for i := range p.w {
		p.w[i].Policy.ProxyUID = uint32(os.Geteuid())
		mustAdd(t, p.r, p.w[i])
	}
	return p
}

// dial connects the client's proxy to port 8080 of the other pod, where that
// pod's proxy accepts.
func (p *proxies) dial(t *testing.T, addr netip.Addr) (client, server net.Conn) {
	t.Helper()
	l, err := p.server.Listen(t.Context(), "tcp", netip.AddrPortFrom(anyAddr(addr), redirect.InboundPort).String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	client, err = p.client.Dial(t.Context(), "tcp", netip.AddrPortFrom(addr, 8080).String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	if server, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = server.Close() })
	return client, server
}

func anyAddr(a netip.Addr) netip.Addr {
	if a.Is4() {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

func (p *proxies) event(t *testing.T, name string) uint64 {
	t.Helper()
	events, err := p.r.AccelerationEvents()
	if err != nil {
		t.Fatal(err)
	}
	return events[name]
}

// talk sends n bytes there and back and compares them.
func talk(t *testing.T, client, server net.Conn, n int) {
	t.Helper()
	sent, got := make([]byte, n), make([]byte, n)
	for i := range sent {
		sent[i] = byte(rand.Uint32())
	}
	for _, way := range [][2]net.Conn{{client, server}, {server, client}} {
		for _, c := range way {
			if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
				t.Fatal(err)
			}
		}
		wrote := make(chan error, 1)
		go func() {
			_, err := way[0].Write(sent)
			wrote <- err
		}()
		_, err := io.ReadFull(way[1], got)
		if err := errors.Join(err, <-wrote); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(sent, got) {
			i := 0
			for sent[i] == got[i] {
				i++
			}
			t.Fatalf("data differs from byte %d on; what came there was sent at %d", i, bytes.Index(sent, got[i:min(i+64, n)]))
		}
	}
}

// TestPeers has the proxies of two pods talk, and looks who is joined.
func TestPeers(t *testing.T) {
	p := newProxies(t, accelerated(t))
	for _, addr := range p.server.Addrs() {
		t.Run(addr.String(), func(t *testing.T) {
			before := p.event(t, "joined")
			client, server := p.dial(t, addr)
			talk(t, client, server, 1000)
			talk(t, client, server, 5_000_000)
			if n := p.event(t, "joined") - before; n != 1 {
				t.Errorf("%d pairs were joined", n)
			}
			// Both ends hear of each other's end.
			if err := client.Close(); err != nil {
				t.Fatal(err)
			}
			if _, err := server.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
				t.Errorf("after the client's close the server reads %v", err)
			}
		})
	}
	addr := p.server.Addrs()[0]
	alone := func(t *testing.T) {
		t.Helper()
		before := p.event(t, "joined")
		client, server := p.dial(t, addr)
		talk(t, client, server, 1000)
		if n := p.event(t, "joined") - before; n != 0 {
			t.Errorf("%d pairs were joined", n)
		}
		if n := entries(t, p.r.store.AccelWait); n != 0 {
			t.Errorf("%d ends wait for another", n)
		}
	}
	for i, name := range []string{"client", "server"} {
		t.Run("off for the "+name, func(t *testing.T) {
			off := p.w[i]
			off.Policy.Accelerate = redirect.AccelerateOff
			mustAdd(t, p.r, off)
			alone(t)
			mustAdd(t, p.r, p.w[i])
		})
	}
	t.Run("an application dials", func(t *testing.T) {
		app := p.w[0]
		app.Policy.ProxyUID = anyUID // so this process is an application
		app.Policy.Outbound.ExcludePorts = redirect.Ports{List: []uint16{8080}}
		mustAdd(t, p.r, app)
		alone(t)
		mustAdd(t, p.r, p.w[0])
	})
	if n := entries(t, p.r.store.AccelPairs); n != 0 {
		t.Errorf("%d pairs are left", n)
	}
}

// TestAccelerationRestarts has connections live on while the agent is replaced,
// acceleration is switched off, and everything is removed.
func TestAccelerationRestarts(t *testing.T) {
	o := accelerated(t)
	p := newProxies(t, o)
	addr := p.server.Addrs()[0]
	client, server := p.dial(t, addr)
	talk(t, client, server, 1000)
	sent := []byte("on its way when it ends")
	if _, err := client.Write(sent); err != nil {
		t.Fatal(err)
	}
	next := func(how redirect.Accelerate) *Redirector {
		t.Helper()
		o := o
		o.HostNetns, o.Accelerate = p.client.Netns, how // whose it is does not matter here
		r, err := New(o)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = r.Close() })
		return r
	}
	same := next(redirect.AccelerateOn)
	talkOn := func() {
		t.Helper()
		got := make([]byte, len(sent))
		if err := server.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(server, got); err != nil || !bytes.Equal(got, sent) {
			t.Fatalf("%q, %v", got, err)
		}
		talk(t, client, server, 3_000_000)
		if _, err := client.Write(sent); err != nil {
			t.Fatal(err)
		}
	}
	talkOn()
	if n := entries(t, same.store.AccelPairs); n != 1 {
		t.Errorf("%d pairs after a restart", n)
	}
	off := next(redirect.AccelerateOff)
	talkOn()
	if n := entries(t, off.store.AccelPairs) + entries(t, off.store.AccelPods); n != 0 {
		t.Errorf("%d entries after acceleration was switched off", n)
	}
	if left, err := os.ReadDir(off.accelDir()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("pins after acceleration was switched off: %v, %v", left, err)
	}
	on := next(redirect.AccelerateOn)
	mustAdd(t, on, p.w[0])
	mustAdd(t, on, p.w[1])
	talkOn()
	before := p.event(t, "joined")
	second, other := p.dial(t, addr)
	talk(t, second, other, 1000)
	if p.event(t, "joined") != before+1 {
		t.Error("acceleration does not come back")
	}
	if err := Uninstall(context.Background(), o); err != nil {
		t.Fatal(err)
	}
	talkOn()
	talk(t, second, other, 1000)
}

// TestAccelerationOfEarlierBuild takes over the maps of a build that had none of
// acceleration's.
func TestAccelerationOfEarlierBuild(t *testing.T) {
	o := accelerated(t)
	off := o
	off.Accelerate = redirect.AccelerateOff
	r := open(t, off)
	pins, err := filepath.Glob(filepath.Join(r.mapDir(), "accel_*"))
	if err != nil || len(pins) == 0 {
		t.Fatalf("%v, %v", pins, err)
	}
	for _, pin := range pins {
		if err := os.Remove(pin); err != nil {
			t.Fatal(err)
		}
	}
	newProxies(t, o)
}
