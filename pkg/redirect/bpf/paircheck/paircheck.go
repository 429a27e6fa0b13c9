package paircheck

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"time"
)

// Ports of loopback that the checks listen on: one whose connections are
// accelerated, one whose are not.
const (
	pairPort  = 15001
	plainPort = 15003
)

// buffer is the size of all send buffers while checks run: small enough that a
// reader that has stopped is soon noticed.
const buffer = 200 << 10

// A Result is what came of a check: Err is empty if it passed.
type Result struct {
	Check string        `json:"check"`
	On    string        `json:"on"` // "ipv4 client", "ipv6 server", ...: who writes
	Err   string        `json:"err,omitempty"`
	Took  time.Duration `json:"took"`
}

// Options of Run.
type Options struct {
	Seed uint64
	// Budget is what acceleration may hold more than TCP.
	Budget int
	// Limit bounds what one check waits for.
	Limit time.Duration
	// Plain runs the checks on connections that are not accelerated.
	Plain bool
	IPv6  bool
	// Size is how much the largest checks send, in bytes; it must be more than
	// the buffers of a connection hold.
	Size int
	// Proxy selects the checks of what proxies rely on.
	Proxy bool
	// First ends the run at the first check that fails.
	First bool
	// Measure compares the speed of both instead of checking.
	Measure bool
}

// Run runs the checks in the network namespace of this process, whose loopback
// must be up.
func Run(o Options) ([]Result, error) {
	s := newState(o)
	ips := []net.IP{net.IPv4(127, 0, 0, 1)}
	if o.IPv6 {
		ips = append(ips, net.IPv6loopback)
	}
	var all []Result
	for _, ip := range ips {
		r, err := s.onAddr(ip, o)
		all = append(all, r...)
		if err != nil || o.First && len(r) > 0 && r[len(r)-1].Err != "" {
			return all, err
		}
	}
	return all, nil
}

// newState makes the data that is sent.
func newState(o Options) *state {
	s := &state{rand: rand.New(rand.NewPCG(o.Seed, 0)), data: make([]byte, o.Size)}
	// A different word every time: a lost or doubled piece shows.
	for i := 0; i+8 <= len(s.data); i += 8 {
		v := s.rand.Uint64()
		for j := range 8 {
			s.data[i+j] = byte(v >> (8 * j))
		}
	}
	// TCP's own buffers may hold somewhat more than was measured.
	s.slack = o.Budget + buffer
	return s
}

// onAddr runs the checks on connections to one address, in both directions.
func (s *state) onAddr(ip net.IP, o Options) (all []Result, err error) {
	port := pairPort
	if o.Plain {
		port = plainPort
	} else if s.room, err = plainRoom(s, ip, o); err != nil {
		return nil, fmt.Errorf("measure a plain connection: %w", err)
	}
	d, err := newDialer(ip, port, o.Limit, buffer)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.close()) }()
	family := "ipv4"
	if ip.To4() == nil {
		family = "ipv6"
	}
	for _, c := range checks() {
		if o.Proxy && !c.proxy {
			continue
		}
		for _, writer := range []string{"client", "server"} {
			start := time.Now()
			err := s.onConnection(d, c, writer)
			r := Result{Check: c.name, On: family + " " + writer, Took: time.Since(start)}
			if err != nil {
				r.Err = err.Error()
			}
			all = append(all, r)
			if err != nil && o.First {
				return all, nil
			}
		}
	}
	return all, nil
}

// onConnection runs one check on a connection of its own.
func (s *state) onConnection(d *dialer, c check, writer string) (err error) {
	w, r, err := d.dial()
	if err != nil {
		return err
	}
	if writer == "server" {
		w, r = r, w
	}
	defer func() { err = errors.Join(err, w.close(), r.close()) }()
	return c.run(s, w, r)
}

// plainRounds is how often a plain connection is measured: how much TCP takes
// differs from one to the next.
const plainRounds = 6

// plainRoom returns how much is taken at most of a writer whose reader has
// stopped, without acceleration.
func plainRoom(s *state, ip net.IP, o Options) (room int, err error) {
	d, err := newDialer(ip, plainPort, o.Limit, buffer)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, d.close()) }()
	for i := range plainRounds {
		w, r, err := d.dial()
		if err != nil {
			return 0, err
		}
		if i%2 == 1 {
			w, r = r, w
		}
		taken, err := w.stuff(s.data)
		if err := errors.Join(err, w.close(), r.close()); err != nil {
			return 0, err
		}
		room = max(room, taken)
	}
	return room, nil
}
