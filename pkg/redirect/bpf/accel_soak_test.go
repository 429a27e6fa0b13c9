package bpf

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/tests/netnstest"
)

// TestSoak sends random streams over connections of both places until TOTAL
// bytes were read and compared (K, M, G for powers of 1024; 1G by default), with
// TEST_SEED. A part of that goes without acceleration, so that nothing is asked
// for that TCP does not do.
func TestSoak(t *testing.T) {
	total, seed := int64(1<<30), rand.Uint64()
	if v := os.Getenv("TOTAL"); v != "" {
		digits := strings.TrimRight(v, "KMGB")
		shift, ok := map[string]int{"": 0, "K": 10, "KB": 10, "M": 20, "MB": 20, "G": 30, "GB": 30}[v[len(digits):]]
		n, err := strconv.ParseInt(digits, 10, 32)
		if err != nil || !ok {
			t.Fatalf("TOTAL %q: want a number with K, M or G", v)
		}
		total = n << shift
	}
	if v := os.Getenv("TEST_SEED"); v != "" {
		var err error
		if seed, err = strconv.ParseUint(v, 10, 64); err != nil {
			t.Fatalf("TEST_SEED: %v", err)
		}
	}
	t.Logf("TEST_SEED=%d", seed)
	t.Run("plain", func(t *testing.T) {
		o := accelerated(t)
		o.Accelerate = redirect.AccelerateOff
		runSoak(t, o, redirect.PlaceLoopback, min(total, 64<<20), seed)
	})
	for _, place := range []redirect.Place{redirect.PlacePeer, redirect.PlaceLoopback} {
		t.Run(string(place), func(t *testing.T) {
			o := accelerated(t)
			results, err := decideAcceleration(t.Context(), o)
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range results {
				if r.Place == place && r.Right {
					runSoak(t, o, place, total, seed)
				} else if r.Place == place {
					t.Logf("not accelerated on this kernel: %s", r.Reason)
				}
			}
		})
	}
}

func runSoak(t *testing.T, o Options, place redirect.Place, total int64, seed uint64) {
	t.Helper()
	o.Cgroup = netnstest.EnterCgroup(t) // hours long: nobody else's sockets
	p := newProxies(t, o)
	s := &soak{data: make([]byte, 8<<20), seed: seed, total: total, app: place == redirect.PlaceLoopback}
	_, err := rand.NewChaCha8([32]byte{byte(seed)}).Read(s.data)
	if err != nil {
		t.Fatal(err)
	}
	if s.file, err = memfd(s.data); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.file.Close() }()
	for _, addr := range p.server.Addrs() {
		l, to := p.listen(t, place, addr)
		defer func() { _ = l.Close() }()
		s.dialers = append(s.dialers, &dialer{listener: l, dial: func() (net.Conn, error) {
			return p.client.Dial(t.Context(), "tcp", to.String())
		}})
	}
	start := time.Now()
	report := func() map[string]uint64 {
		took := time.Since(start)
		events, err := p.r.AccelerationEvents()
		if err != nil {
			t.Error(err)
		}
		t.Logf("%d MB in %v, %.0f MB/s; %d connections, %d of them reset; %v", s.read.Load()/1e6,
			took.Round(time.Millisecond), float64(s.read.Load())/1e6/took.Seconds(), s.done.Load(), s.resets.Load(), events)
		return events
	}
	ended := make(chan error, 1)
	go func() { ended <- s.run() }()
	for running := true; running; {
		select {
		case err = <-ended:
			running = false
		case <-time.After(time.Minute):
			report()
		}
	}
	events := report()
	if err != nil {
		t.Fatal(err)
	}
	if o.Accelerate == redirect.AccelerateOff {
		if events["joined"] > 0 {
			t.Errorf("accelerated all the same: %v", events)
		}
		return
	}
	// Connections are joined (but for one whose first ACK was lost), and go over
	// and back about once each.
	done := uint64(s.done.Load())
	if events["joined"] < done-done/100 || events["behind"] < done/2 || events["caught_up"] < done/2 {
		t.Errorf("too little was tried: %v", events)
	}
	p.wantEmpty(t)
}

// listen listens where the client's connections of a place arrive, and returns
// what they dial. For loopback this process is the application and its proxy.
func (p *proxies) listen(t *testing.T, place redirect.Place, addr netip.Addr) (net.Listener, netip.AddrPort) {
	t.Helper()
	pod, port := p.server, redirect.InboundPort
	if place == redirect.PlaceLoopback {
		app := p.w[0]
		app.Policy.ProxyUID = anyUID
		mustAdd(t, p.r, app)
		pod, port = p.client, redirect.OutboundPort
	}
	network := "tcp6" // which leaves IPv4 to the other listener
	if addr.Is4() {
		network = "tcp4"
	}
	l, err := pod.Listen(t.Context(), network, netip.AddrPortFrom(anyAddr(addr), port).String())
	if err != nil {
		t.Fatal(err)
	}
	return l, netip.AddrPortFrom(addr, 8080)
}

// wantEmpty wants nothing to be left of pairs: all connections are closed.
func (p *proxies) wantEmpty(t *testing.T) {
	t.Helper()
	deadline := time.Now().Add(5 * time.Second)
	for {
		pairs, waiting := entries(t, p.r.store.AccelPairs), entries(t, p.r.store.AccelWait)
		if pairs+waiting == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d pairs are left, %d ends wait for another", pairs, waiting)
		}
		time.Sleep(time.Millisecond)
	}
}

// memfd makes a file in memory.
func memfd(data []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate("sluice-soak", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make file: %w", err)
	}
	f := os.NewFile(uintptr(fd), fmt.Sprintf("/proc/self/fd/%d", fd))
	if _, err := f.WriteAt(data, 0); err != nil {
		return nil, errors.Join(fmt.Errorf("fill file: %w", err), f.Close())
	}
	return f, nil
}

// A dialer makes connections of which both ends are in this process.
type dialer struct {
	sync.Mutex // one at a time: who accepts must get his own
	listener   net.Listener
	dial       func() (net.Conn, error)
}

// connDeadline bounds all that one connection does.
const connDeadline = 5 * time.Minute

func (d *dialer) connect() (client, server *net.TCPConn, err error) {
	d.Lock()
	defer d.Unlock()
	c, err := d.dial()
	if err != nil {
		return nil, nil, err
	}
	a, err := d.listener.Accept()
	if err != nil {
		return nil, nil, errors.Join(err, c.Close())
	}
	end := time.Now().Add(connDeadline)
	return c.(*net.TCPConn), a.(*net.TCPConn), errors.Join(c.SetDeadline(end), a.SetDeadline(end))
}

// A soak is many connections. What one of them does follows from its number and
// the seed.
type soak struct {
	data    []byte // of which each direction sends a part, round and round
	file    *os.File
	seed    uint64
	total   int64
	app     bool // the ends are read by applications, which may do anything
	dialers []*dialer

	number, read, done, resets atomic.Int64
}

// soakers are connections at the same time: more than there are cores to run
// them, so that both ends stop where nobody expects it.
const soakers = 8

func (s *soak) run() error {
	var failed atomic.Pointer[error]
	var all sync.WaitGroup
	for range soakers {
		all.Go(func() {
			for s.read.Load() < s.total && failed.Load() == nil {
				i := s.number.Add(1)
				if err := s.live(i); err != nil {
					err = fmt.Errorf("connection %d: %w", i, err)
					failed.Store(&err)
					return
				}
				s.done.Add(1)
			}
		})
	}
	all.Wait()
	if err := failed.Load(); err != nil {
		return *err
	}
	return nil
}

// live is what happens on one connection: both directions, each of which ends
// by itself. In some lives one end resets the connection.
func (s *soak) live(number int64) error {
	random := rand.New(rand.NewPCG(s.seed, uint64(number)))
	client, server, err := s.dialers[int(number)%len(s.dialers)].connect()
	if err != nil {
		return err
	}
	there, back := s.direction(random, client, server), s.direction(random, server, client)
	if random.IntN(8) == 0 {
		// One way alone, for what goes back would end in the reset as well.
		s.resets.Add(1)
		there.resetAt, there.writerResets = 1+random.Int64N(there.size), random.IntN(2) == 0
		err = there.run()
	} else {
		wrote := make(chan error, 1)
		go func() { wrote <- there.run() }()
		err = errors.Join(back.run(), <-wrote)
	}
	closeErr := errors.Join(client.Close(), server.Close())
	if there.resetAt > 0 {
		closeErr = nil // one of them had closed
	}
	return errors.Join(err, closeErr)
}

// A direction is what happens one way.
type direction struct {
	s      *soak
	w, r   *net.TCPConn
	seed   uint64
	from   int64 // where in the data it begins
	size   int64
	piece  int64 // the largest write
	buffer int64 // the largest read
	pauses int64 // of each end, about
	file   bool  // sendfile
	splice bool  // into a pipe

	resetAt      int64 // after so many bytes; 0: never
	writerResets bool

	sent, taken atomic.Int64
}

func (s *soak) direction(random *rand.Rand, w, r *net.TCPConn) *direction {
	// Mostly small, sometimes far over any budget.
	d := &direction{s: s, w: w, r: r, seed: random.Uint64(), from: random.Int64N(int64(len(s.data)))}
	d.size = 1 + random.Int64N(1<<(6+random.IntN(18)))
	if random.IntN(64) == 0 {
		d.size *= 8
	}
	// So small pieces that there are thousands of them, not millions.
	d.piece = max(1<<(4+random.IntN(14)), d.size>>12)
	d.buffer = max(1<<(6+random.IntN(12)), d.size>>12)
	d.pauses = random.Int64N(8)
	d.file = random.IntN(8) == 0
	d.splice = s.app && random.IntN(8) == 0
	return d
}

// run has one end write and the other read at the same time.
func (d *direction) run() error {
	wrote := make(chan error, 1)
	go func() { wrote <- d.pour() }()
	err := d.drain()
	return errors.Join(err, <-wrote)
}

// at is the data from a byte of the stream on, no more than n bytes.
func (d *direction) at(pos, n int64) []byte {
	start := (d.from + pos) % int64(len(d.s.data))
	return d.s.data[start:min(start+n, int64(len(d.s.data)))]
}

// pour writes in random pieces and ends the stream.
func (d *direction) pour() error {
	random := rand.New(rand.NewPCG(d.seed, 1))
	var file *os.File
	if d.file {
		// Of its own, for each has its own place in the file.
		var err error
		if file, err = os.Open(d.s.file.Name()); err != nil {
			return err
		}
		defer func() { _ = file.Close() }()
	}
	rest := d.rests(random)
	for pos := int64(0); pos < d.size; {
		if d.writerResets && pos >= d.resetAt {
			return reset(d.w)
		}
		rest(pos, &d.taken, func(taken, _ int64) bool { return taken == pos })
		b := d.at(pos, min(1+random.Int64N(d.piece), d.size-pos))
		n, err := d.send(file, pos, b)
		pos += n
		d.sent.Store(pos)
		if err != nil {
			if d.resetAt > 0 && !d.writerResets && isReset(err) {
				return nil
			}
			return fmt.Errorf("write after %d of %d bytes: %w", pos, d.size, err)
		}
	}
	if d.writerResets {
		return reset(d.w)
	}
	if err := d.w.CloseWrite(); err != nil && (d.resetAt == 0 || !errors.Is(err, unix.ENOTCONN)) {
		return err
	}
	return nil
}

// send writes b, which is what the file has there as well.
func (d *direction) send(file *os.File, pos int64, b []byte) (int64, error) {
	if file == nil {
		n, err := d.w.Write(b)
		return int64(n), err
	}
	if _, err := file.Seek((d.from+pos)%int64(len(d.s.data)), io.SeekStart); err != nil {
		return 0, err
	}
	return io.CopyN(d.w, file, int64(len(b)))
}

// drain reads the direction's bytes, looks at some before it takes them, and
// rests now and then, so that the writer gets far ahead.
func (d *direction) drain() error {
	random := rand.New(rand.NewPCG(d.seed, 2))
	buf := make([]byte, d.buffer)
	receive, done, err := d.receiver()
	if err != nil {
		return err
	}
	defer done()
	rest := d.rests(random)
	for pos := int64(0); ; {
		if d.resetAt > 0 && !d.writerResets && pos >= d.resetAt {
			return reset(d.r)
		}
		rest(pos, &d.sent, func(sent, before int64) bool { return sent == before && (sent > pos || sent == d.size) })
		flags := 0
		if random.IntN(16) == 0 {
			flags = unix.MSG_PEEK
		}
		n, err := receive(buf[:1+random.Int64N(d.buffer)], flags)
		if err != nil {
			if d.writerResets && isReset(err) {
				return nil
			}
			return fmt.Errorf("read after %d of %d bytes: %w", pos, d.size, err)
		}
		if n == 0 {
			if pos != d.size || d.writerResets {
				return fmt.Errorf("stream ends after %d of %d bytes", pos, d.size)
			}
			return nil
		}
		for got := buf[:n]; len(got) > 0; {
			want := d.at(pos+int64(n-len(got)), int64(len(got)))
			if pos+int64(n) > d.size || !bytes.Equal(got[:len(want)], want) {
				return fmt.Errorf("wrong data after %d of %d bytes", pos, d.size)
			}
			got = got[len(want):]
		}
		if flags == 0 {
			pos += int64(n)
			d.taken.Store(pos)
			d.s.read.Add(int64(n))
		}
	}
}

// receiver returns what receives once; 0 is the end of the stream.
func (d *direction) receiver() (receive func(b []byte, flags int) (int, error), done func(), err error) {
	raw, err := d.r.SyscallConn()
	if err != nil {
		return nil, nil, err
	}
	var in, out *os.File
	if d.splice {
		if in, out, err = os.Pipe(); err != nil {
			return nil, nil, err
		}
	}
	once := func(fd int, b []byte, flags int) (int, error) {
		if !d.splice || flags != 0 {
			n, _, err := unix.Recvfrom(fd, b, flags)
			return n, err
		}
		n, err := unix.Splice(fd, nil, int(out.Fd()), nil, len(b), unix.SPLICE_F_NONBLOCK)
		if err != nil || n == 0 {
			return 0, err
		}
		return io.ReadFull(in, b[:n])
	}
	receive = func(b []byte, flags int) (n int, err error) {
		waitErr := raw.Read(func(fd uintptr) bool {
			announced := 1
			if d.s.app {
				announced = d.announced(int(fd))
			}
			if n, err = once(int(fd), b, flags); n > 0 && announced == 0 {
				err = fmt.Errorf("FIONREAD said 0 of %d bytes", n)
			}
			return !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR)
		})
		return n, errors.Join(waitErr, err)
	}
	done = func() {
		if d.splice {
			_, _ = in.Close(), out.Close()
		}
	}
	return receive, done, nil
}

// announced is what FIONREAD says if there is something to read; -1: there is
// not.
func (d *direction) announced(fd int) int {
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	if n, err := unix.Poll(p, 0); err != nil || n == 0 {
		return -1
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCINQ)
	if err != nil {
		return -1 // closed, which the read will say
	}
	return n
}

// rests returns what makes one end rest at random bytes: for a random time, or
// until the other end has come as far as it gets. That is the load, no waiting
// for something to be ready.
func (d *direction) rests(random *rand.Rand) func(pos int64, other *atomic.Int64, enough func(now, before int64) bool) {
	every := 2*d.size/(d.pauses+1) + 1
	next := random.Int64N(every)
	return func(pos int64, other *atomic.Int64, enough func(now, before int64) bool) {
		if pos < next || d.pauses == 0 {
			return
		}
		next = pos + 1 + random.Int64N(every)
		if random.IntN(2) == 0 {
			time.Sleep(time.Duration(random.IntN(1000)) * time.Microsecond)
			return
		}
		before := other.Load()
		for range 50 {
			time.Sleep(500 * time.Microsecond)
			now := other.Load()
			if enough(now, before) {
				return
			}
			before = now
		}
	}
}

// reset closes with RST.
func reset(c *net.TCPConn) error {
	return errors.Join(c.SetLinger(0), c.Close())
}

func isReset(err error) bool { return errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE) }
