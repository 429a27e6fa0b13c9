package paircheck

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// A Soaked says what a soak did.
type Soaked struct {
	Connections int64 `json:"connections"`
	Bytes       int64 `json:"bytes"`
}

// soakers are connections at the same time: more than there are cores to run
// them, so that both ends stop where nobody expects it.
const soakers = 4

// soak sends random streams both ways over many connections until o.Total bytes
// have been read and compared. What a connection does follows from its number
// and o.Seed.
func soak(o Options) (Soaked, error) {
	s := newState(o)
	var number, read, done atomic.Int64
	var failed atomic.Pointer[error]
	ips := []net.IP{net.IPv4(127, 0, 0, 1)}
	if o.IPv6 {
		ips = append(ips, net.IPv6loopback)
	}
	var dialers []*dialer
	for _, ip := range ips {
		d, err := newDialer(ip, pairPort, o.Limit, 0)
		if err != nil {
			return Soaked{}, err
		}
		defer func() { _ = d.close() }()
		dialers = append(dialers, d)
	}
	var mu [2]sync.Mutex // one dials at a time: who accepts must get his own
	var all sync.WaitGroup
	for range soakers {
		all.Go(func() {
			for read.Load() < o.Total && failed.Load() == nil {
				i := number.Add(1)
				family := int(i) % len(dialers)
				mu[family].Lock()
				client, server, err := dialers[family].dial()
				mu[family].Unlock()
				if err == nil {
					l := &life{data: s.data, rand: rand.New(rand.NewPCG(o.Seed, uint64(i))), read: &read}
					err = errors.Join(l.live(client, server), client.close(), server.close())
				}
				if err != nil {
					err = fmt.Errorf("connection %d (seed %d): %w", i, o.Seed, err)
					failed.Store(&err)
					return
				}
				done.Add(1)
			}
		})
	}
	all.Wait()
	result := Soaked{Connections: done.Load(), Bytes: read.Load()}
	if err := failed.Load(); err != nil {
		return result, *err
	}
	return result, nil
}

// A life is one connection of a soak.
type life struct {
	data []byte
	rand *rand.Rand
	read *atomic.Int64
}

// live runs both directions. In some lives one end resets the connection when it
// has read a part.
func (l *life) live(client, server *end) error {
	there, back := l.direction(), l.direction()
	if l.rand.IntN(8) == 0 {
		// One way alone, for what goes back would end in the reset as well.
		there.resetAt = 1 + l.rand.IntN(there.size)
		return l.oneWay(client, server, there)
	}
	return both(
		func() error { return l.oneWay(client, server, there) },
		func() error { return l.oneWay(server, client, back) })
}

// A direction is what happens one way.
type direction struct {
	seed    uint64
	size    int
	piece   int // the largest write
	buffer  int // the largest read
	lazy    int // one read of so many is preceded by a rest
	resetAt int // the reader resets after so many bytes; 0: never
}

func (l *life) direction() direction {
	// Mostly small, sometimes far over any budget.
	size := 1 + l.rand.IntN(1<<(4+l.rand.IntN(18)))
	return direction{
		seed: l.rand.Uint64(), size: min(size, len(l.data)),
		piece: 1 << (4 + l.rand.IntN(16)), buffer: 1 << (6 + l.rand.IntN(12)),
		lazy: 1 + l.rand.IntN(200),
	}
}

func (l *life) oneWay(w, r *end, d direction) error {
	return both(
		func() error {
			err := d.pour(w, l.data)
			if d.resetAt > 0 && (errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE)) {
				return nil
			}
			return err
		},
		func() error { return d.drain(r, l.data, l.read) })
}

// pour writes the direction's bytes in random pieces and ends the stream.
func (d direction) pour(w *end, data []byte) error {
	random := rand.New(rand.NewPCG(d.seed, 1))
	for at := 0; at < d.size; {
		n := min(1+random.IntN(d.piece), d.size-at)
		if err := w.write(data[at : at+n]); err != nil {
			return fmt.Errorf("after %d of %d bytes: %w", at, d.size, err)
		}
		at += n
	}
	if err := w.shutdown(); err != nil && !errors.Is(err, unix.ENOTCONN) {
		return err
	}
	return nil
}

// drain reads the direction's bytes, looks at some before it takes them, and
// rests now and then, so that the writer gets far ahead.
func (d direction) drain(r *end, data []byte, read *atomic.Int64) error {
	random := rand.New(rand.NewPCG(d.seed, 2))
	buf := make([]byte, d.buffer)
	for at := 0; ; {
		if d.resetAt > 0 && at >= d.resetAt {
			return r.reset()
		}
		if random.IntN(d.lazy+1) == 0 {
			_, _ = r.waitFor(0, time.Millisecond) // for nothing: only time passes
		}
		flags := 0
		if random.IntN(16) == 0 {
			flags = unix.MSG_PEEK
		}
		n, err := r.recv(buf[:1+random.IntN(d.buffer)], flags)
		if err != nil {
			return fmt.Errorf("after %d of %d bytes: %w", at, d.size, err)
		}
		if n == 0 {
			if at != d.size {
				return fmt.Errorf("stream ends after %d of %d bytes", at, d.size)
			}
			return nil
		}
		if at+n > d.size || !bytes.Equal(buf[:n], data[at:at+n]) {
			return fmt.Errorf("wrong data after %d of %d bytes", at, d.size)
		}
		if flags == 0 {
			at += n
			read.Add(int64(n))
		}
	}
}
