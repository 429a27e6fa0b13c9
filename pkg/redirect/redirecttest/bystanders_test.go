package redirecttest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/sluicemesh/sluice/tests/netnstest"
)

// entries counts those of a pinned map; ok is false if there is none.
func entries(tb testing.TB, path string) (n int, ok bool) {
	tb.Helper()
	m, err := ebpf.LoadPinnedMap(path, nil)
	if errors.Is(err, os.ErrNotExist) {
		return 0, false
	}
	if err != nil {
		tb.Fatal(err)
	}
	defer func() { _ = m.Close() }()
	key := make([]byte, m.KeySize())
	var at any
	for {
		err := m.NextKey(at, key)
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return n, true
		}
		if err != nil {
			tb.Fatal(err)
		}
		at, n = bytes.Clone(key), n+1
	}
}

// talkEvery is how often each of them talks.
const talkEvery = 20 * time.Millisecond

// Bystanders are two pods that have nothing to do with Sluice. They and the node
// talk to each other all the time.
type bystanders struct {
	pods     []*netnstest.Pod
	stop     context.CancelFunc
	work     sync.WaitGroup
	mu       sync.Mutex
	failures []string
	rounds   int
	before   uint64
}

func watchBystanders(t *testing.T, node *netnstest.Node) *bystanders {
	t.Helper()
	b := &bystanders{pods: []*netnstest.Pod{node.Pod(t, "bystander"), node.Pod(t, "bystander")}}
	server := b.pods[1]
	server.Serve(t, netip.AddrPortFrom(netip.IPv6Unspecified(), appPort), "bystander")
	echo, err := listenUDP(server)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	b.stop = cancel
	t.Cleanup(func() { cancel(); _ = echo.Close(); b.work.Wait() })
	// Names and neighbours are found before anything is counted.
	for _, a := range server.Addrs() {
		if err := b.round(t.Context(), b.pods[0].Namespace, a); err != nil {
			t.Fatal(err)
		}
	}
	b.before = b.retransmitted(t)
	for _, from := range []netnstest.Namespace{b.pods[0].Namespace, node.Namespace} {
		b.work.Go(func() {
			tick := time.NewTicker(talkEvery)
			defer tick.Stop()
			for i := 0; ctx.Err() == nil; i++ {
				<-tick.C
				err := b.round(ctx, from, server.Addrs()[i%2])
				b.mu.Lock()
				b.rounds++
				if err != nil && ctx.Err() == nil {
					b.failures = append(b.failures, fmt.Sprintf("from %s: %v", from.Name, err))
				}
				b.mu.Unlock()
			}
		})
	}
	return b
}

// listenUDP answers each datagram with itself.
func listenUDP(pod *netnstest.Pod) (c *net.UDPConn, err error) {
	err = pod.Do(func() error {
		c, err = net.ListenUDP("udp", &net.UDPAddr{Port: int(appPort)})
		return err
	})
	if err != nil {
		return nil, err
	}
	go func() {
		b := make([]byte, 64)
		for {
			n, from, err := c.ReadFromUDPAddrPort(b)
			if err != nil {
				return // closed
			}
			_, _ = c.WriteToUDPAddrPort(b[:n], from)
		}
	}()
	return c, nil
}

// round sends a datagram and opens a connection, and has both answered.
func (b *bystanders) round(ctx context.Context, from netnstest.Namespace, to netip.Addr) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	addr := netip.AddrPortFrom(to, appPort)
	u, err := from.Dial(ctx, "udp", addr.String())
	if err != nil {
		return fmt.Errorf("udp: %w", err)
	}
	defer func() { _ = u.Close() }()
	context.AfterFunc(ctx, func() { _ = u.SetDeadline(time.Now()) })
	if _, err := u.Write([]byte("still there")); err != nil {
		return fmt.Errorf("udp: %w", err)
	}
	if _, err := u.Read(make([]byte, 64)); err != nil {
		return fmt.Errorf("a datagram to %s was lost: %w", addr, err)
	}
	a, err := from.Ask(ctx, addr)
	if err != nil {
		return err
	}
	if a.Name != "bystander" {
		return fmt.Errorf("connection to %s reached %q", addr, a.Name)
	}
	return nil
}

// retransmitted is how many SYNs the bystanders have sent twice. Other segments
// are also sent twice when the machine is so busy that an answer takes long.
func (b *bystanders) retransmitted(t *testing.T) (sum uint64) {
	t.Helper()
	for _, p := range b.pods {
		err := p.Do(func() error {
			netstat, err := os.ReadFile("/proc/thread-self/net/netstat")
			if err != nil {
				return err
			}
			names, values, _ := strings.Cut(string(netstat), "\n")
			i := slices.Index(strings.Fields(names), "TCPSynRetrans")
			f := strings.Fields(values)
			if i < 0 || i >= len(f) {
				return errors.New("no TCPSynRetrans")
			}
			n, err := strconv.ParseUint(f[i], 10, 64)
			sum += n
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return sum
}

// finish ends their talk and says what was lost of it.
func (b *bystanders) finish(t *testing.T) {
	t.Helper()
	b.stop()
	b.work.Wait()
	again := b.retransmitted(t) - b.before
	if len(b.failures) > 0 || again > 0 || b.rounds == 0 {
		t.Errorf("bystanders: %d of %d rounds failed, %d SYNs sent twice: %q", len(b.failures), b.rounds, again, b.failures)
	}
	t.Logf("bystanders: %d rounds, nothing lost", b.rounds)
}
