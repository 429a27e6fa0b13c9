package paircheck

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"time"
)

// A Gain compares one measure with and without acceleration.
type Gain struct {
	Measure     string `json:"measure"`
	Plain       Rounds `json:"plain"`
	Accelerated Rounds `json:"accelerated"`
}

// Rounds are what rounds of the same took. The shortest is the one that others
// on the node disturbed least; that half of them stand still shows in the median.
type Rounds struct {
	Shortest time.Duration `json:"shortest"`
	Median   time.Duration `json:"median"`
}

// Ratio is how much faster the accelerated round is; above 1 is a gain.
func (g Gain) Ratio() float64 { return float64(g.Plain.Shortest) / float64(g.Accelerated.Shortest) }

// Typical is Ratio of the medians.
func (g Gain) Typical() float64 { return float64(g.Plain.Median) / float64(g.Accelerated.Median) }

// A measure is one shape of traffic; round does it once, over connections of d,
// and says how long it took.
type measure struct {
	name  string
	round func(d *dialer) (time.Duration, error)
}

// measures are those that are compared.
var measures = []measure{
	{"connect", connects(100)},
	{"round_trip_64", over(func(w, r *end) error { return pingPong(w, r, 64, 500) })},
	{"round_trip_16k", over(func(w, r *end) error { return pingPong(w, r, 16<<10, 200) })},
	{"stream_16k", over(func(w, r *end) error { return bulk(w, r, 16<<10, 32<<20) })},
	{"stream_64k", over(func(w, r *end) error { return bulk(w, r, 64<<10, 32<<20) })},
}

// connects opens so many connections one after the other, and uses each once.
func connects(times int) func(*dialer) (time.Duration, error) {
	return func(d *dialer) (took time.Duration, err error) {
		start := time.Now()
		for range times {
			w, r, err := d.dial()
			if err != nil {
				return 0, err
			}
			err = pingPong(w, r, 64, 1)
			if err := errors.Join(err, w.close(), r.close()); err != nil {
				return 0, err
			}
		}
		return time.Since(start), nil
	}
}

// over does f on a connection that is open already.
func over(f func(w, r *end) error) func(*dialer) (time.Duration, error) {
	return func(d *dialer) (took time.Duration, err error) {
		w, r, err := d.dial()
		if err != nil {
			return 0, err
		}
		start := time.Now()
		err = f(w, r)
		took = time.Since(start)
		return took, errors.Join(err, w.close(), r.close())
	}
}

const rounds = 7

// compare times each measure in rounds that alternate between both.
func compare(o Options) (gains []Gain, err error) {
	ip := net.IPv4(127, 0, 0, 1)
	plain, err := newDialer(ip, plainPort, o.Limit, 0)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, plain.close()) }()
	pairs, err := newDialer(ip, pairPort, o.Limit, 0)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, pairs.close()) }()
	for _, m := range measures {
		var took [2][]time.Duration
		for range rounds {
			for i, d := range []*dialer{plain, pairs} {
				t, err := m.round(d)
				if err != nil {
					return gains, fmt.Errorf("%s: %w", m.name, err)
				}
				took[i] = append(took[i], t)
			}
		}
		gains = append(gains, Gain{Measure: m.name, Plain: summed(took[0]), Accelerated: summed(took[1])})
	}
	return gains, nil
}

func summed(d []time.Duration) Rounds {
	slices.Sort(d)
	return Rounds{Shortest: d[0], Median: d[len(d)/2]}
}

// pingPong sends n bytes there and back, several times.
func pingPong(w, r *end, n, times int) error {
	there, back := make([]byte, n), make([]byte, n)
	return both(
		func() error {
			for range times {
				if err := w.write(there); err != nil {
					return err
				}
				if err := w.read(there); err != nil {
					return err
				}
			}
			return nil
		},
		func() error {
			for range times {
				if err := r.read(back); err != nil {
					return err
				}
				if err := r.write(back); err != nil {
					return err
				}
			}
			return nil
		})
}

// bulk sends total bytes in pieces of n.
func bulk(w, r *end, n, total int) error {
	out, in := make([]byte, n), make([]byte, n)
	return both(
		func() error {
			for sent := 0; sent < total; sent += n {
				if err := w.write(out); err != nil {
					return err
				}
			}
			return w.shutdown()
		},
		func() error {
			got := 0
			for {
				n, err := r.recv(in, 0)
				if err != nil {
					return err
				}
				if n == 0 {
					break
				}
				got += n
			}
			if got != total {
				return fmt.Errorf("%d of %d bytes came", got, total)
			}
			return nil
		})
}
