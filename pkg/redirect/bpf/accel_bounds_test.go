package bpf

import (
	"io"
	"net"
	"testing"
	"time"

	"github.com/sluicemesh/sluice/pkg/redirect/bpf/paircheck"
)

// TestSmallMessages has a writer send many messages of one byte that nobody
// reads: each costs the kernel far more than its byte.
func TestSmallMessages(t *testing.T) {
	p := newProxies(t, accelerated(t))
	client, server := p.dial(t, p.server.Addrs()[0])
	talk(t, client, server, 1000)
	before := p.event(t, "behind")
	const n = 1000
	for i := range n {
		if _, err := client.Write([]byte{byte(i)}); err != nil {
			t.Fatal(err)
		}
	}
	if p.event(t, "behind") == before {
		t.Errorf("%d messages of one byte went the short way", n)
	}
	got := make([]byte, n)
	if err := server.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(server, got); err != nil {
		t.Fatal(err)
	}
	for i := range got {
		if got[i] != byte(i) {
			t.Fatalf("byte %d is %d", i, got[i])
		}
	}
	before = p.event(t, "caught_up")
	talk(t, client, server, 1000)
	if p.event(t, "caught_up") == before {
		t.Error("it stays with TCP when its reader has taken everything")
	}
}

// TestFixedBuffer has an application fix the size of its receive buffer: what
// comes to it then goes by TCP, what it sends may go the short way.
func TestFixedBuffer(t *testing.T) {
	p := newProxies(t, accelerated(t))
	client, server := p.dial(t, p.server.Addrs()[0])
	if err := server.(*net.TCPConn).SetReadBuffer(64 << 10); err != nil {
		t.Fatal(err)
	}
	before := p.event(t, "stuck")
	talk(t, client, server, 1000) // after which it is known
	talk(t, client, server, 5_000_000)
	if n := p.event(t, "stuck") - before; n != 1 {
		t.Errorf("%d directions stay with TCP, want the one to the fixed buffer", n)
	}
}

// TestJudge decides over measurements.
func TestJudge(t *testing.T) {
	measured := func(ratios ...float64) (gains []paircheck.Gain) {
		for i := 0; i < len(ratios); i += 2 {
			gains = append(gains, paircheck.Gain{
				Plain:       paircheck.Rounds{Shortest: time.Duration(1000 * ratios[i]), Median: time.Duration(1000 * ratios[i+1])},
				Accelerated: paircheck.Rounds{Shortest: 1000, Median: 1000},
			})
		}
		return gains
	}
	for _, c := range []struct {
		name  string
		gains []paircheck.Gain
		want  bool
	}{
		{"all gain", measured(1.3, 1.3, 1.1, 1.1), true},
		{"one gains", measured(1.06, 1.06, 0.99, 0.99), true},
		{"none gains enough", measured(1.04, 1.04, 1.04, 1.04), false},
		{"one loses", measured(1.3, 1.3, 0.97, 1.1), false},
		{"a busy node", measured(1.3, 0.8, 1.3, 0.6), true},
		{"one stands still now and then", measured(1.3, 1.3, 1.3, 0.1), false},
	} {
		if got, reason := judge(c.gains); got != c.want {
			t.Errorf("%s: %v, %s", c.name, got, reason)
		}
	}
}
