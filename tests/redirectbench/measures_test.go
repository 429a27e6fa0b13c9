package redirectbench

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/sluicemesh/sluice/tests/redirectbench/load"
)

// A figure is what a measurement found.
type figure struct {
	kind kind
	name string
	// unit is that of value; more says that more is better.
	unit  string
	more  bool
	value float64
}

// A kind is what goals are set for.
type kind string

const (
	kindConnect kind = "connect"
	kindTail    kind = "connect, tail"
	kindRound   kind = "round trip"
	kindStream  kind = "stream"
	kindBig     kind = "stream of 64 KiB writes"
	kindHTTP    kind = "http"
	kindCPU     kind = "cpu"
)

// A measure makes figures of what the client does n times.
type measure struct {
	n   int
	run func(t *testing.T, n *node, w way, count int) []figure
	// placed measures stay where they are, at the begin or at the end.
	placed bool
}

// all are the measures; brief are those that show whether something grows with
// the number of pods or of connections.
var (
	all = []measure{
		{n: 2000, run: connect},
		{n: 4000, run: rounds(64, "64 B")},
		{n: 3000, run: rounds(1<<10, "1 KiB")},
		{n: 2000, run: rounds(16<<10, "16 KiB")},
		{n: 800, run: rounds(64<<10, "64 KiB")},
		{n: 100_000, run: stream(1<<10, "1 KiB", kindStream)},
		{n: 16_000, run: stream(16<<10, "16 KiB", kindStream)},
		{n: 4000, run: stream(64<<10, "64 KiB", kindBig)},
		{n: 250, run: stream(1<<20, "1 MiB", kindStream)},
		{n: 5000, run: requests(false)},
		{n: 1500, run: requests(true)},
	}
	brief = []measure{
		{n: 2000, run: connect},
		{n: 4000, run: rounds(64, "64 B")},
		{n: 4000, run: stream(64<<10, "64 KiB", kindBig)},
		{n: 5000, run: requests(false)},
	}
)

func us(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e3 }

func connect(t *testing.T, n *node, w way, count int) []figure {
	t.Helper()
	before := n.cpu(t)
	res := n.call(t, load.Request{Op: "connect", Addrs: n.addrs(w, load.Echo), N: count, Size: 64})
	cpu := n.cpu(t) - before
	return []figure{
		{kindConnect, "connect and 1 round trip, p50", "us", false, us(res.P50)},
		{kindTail, "connect and 1 round trip, p99", "us", false, us(res.P99)},
		{kindCPU, "CPU time of a connection", "us", false, us(cpu) / float64(count)},
	}
}

func rounds(size int, name string) func(*testing.T, *node, way, int) []figure {
	return func(t *testing.T, n *node, w way, count int) []figure {
		t.Helper()
		before := n.cpu(t)
		res := n.call(t, load.Request{Op: "round", Addrs: n.addrs(w, load.Echo), N: count, Size: size})
		cpu := n.cpu(t) - before
		figures := []figure{{kindRound, "round trip of " + name, "us", false, us(res.P50)}}
		if size == 64 {
			figures = append(figures, figure{kindCPU, "CPU time of a round trip of " + name, "us", false, us(cpu) / float64(count)})
		}
		return figures
	}
}

func stream(size int, name string, k kind) func(*testing.T, *node, way, int) []figure {
	return func(t *testing.T, n *node, w way, count int) []figure {
		t.Helper()
		before := n.cpu(t)
		res := n.call(t, load.Request{Op: "stream", Addrs: n.addrs(w, load.Sink), N: count, Size: size})
		cpu := n.cpu(t) - before
		bytes := float64(count) * float64(size)
		return []figure{
			{k, "writes of " + name, "MB/s", true, bytes / 1e6 / res.Elapsed.Seconds()},
			{kindCPU, "CPU time of 1 GB in writes of " + name, "ms", false, cpu.Seconds() * 1e3 / (bytes / 1e9)},
		}
	}
}

func requests(closing bool) func(*testing.T, *node, way, int) []figure {
	return func(t *testing.T, n *node, w way, count int) []figure {
		t.Helper()
		const parallel = 16
		count = max(count, parallel)
		count -= count % parallel
		before := n.cpu(t)
		res := n.call(t, load.Request{Op: "http", Addrs: n.addrs(w, load.HTTP), N: count, Parallel: parallel, Close: closing})
		cpu := n.cpu(t) - before
		name := map[bool]string{false: "keep-alive", true: "a connection each"}[closing]
		return []figure{
			{kindHTTP, fmt.Sprintf("HTTP requests, %s, %d at a time", name, parallel), "1/s", true, float64(count) / res.Elapsed.Seconds()},
			{kindCPU, "CPU time of a request, " + name, "us", false, us(cpu) / float64(count)},
		}
	}
}

// addrs are where the client dials for services.
func (n *node) addrs(w way, services ...int) []netip.AddrPort {
	var addrs []netip.AddrPort
	for _, s := range services {
		addrs = append(addrs, n.to(w, s))
	}
	return addrs
}
