package soak

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sluicemesh/sluice/tests/sluicetest"
)

// grace is how long after the end of a fault its effects may last: a SYN that
// was dropped is sent again after one second, and then after two.
const grace = 4 * time.Second

// A load is what all clients do, and what became of it.
type load struct {
	ctx  context.Context
	stop context.CancelFunc
	work sync.WaitGroup
	done atomic.Int64
	idle []func() // end what is kept open

	mu     sync.Mutex
	kinds  []*tally
	faults []*fault
}

// A tally counts one kind of traffic.
type tally struct {
	name   string
	causes []string
	// guarded by load.mu
	ok       int
	failures []failure
}

type failure struct {
	began, ended time.Time
	err          error
}

// A fault is a time in which requests may fail; to is zero while it lasts.
type fault struct {
	name     string
	from, to time.Time
}

func newLoad(t *testing.T) *load {
	ctx, cancel := context.WithCancel(t.Context())
	l := &load{ctx: ctx, stop: cancel}
	t.Cleanup(l.finish)
	return l
}

// start repeats one thing until the end. It may fail while one of causes lasts.
func (l *load) start(name string, causes []string, once func(context.Context) error) {
	k := &tally{name: name, causes: causes}
	l.mu.Lock()
	l.kinds = append(l.kinds, k)
	l.mu.Unlock()
	l.work.Go(func() {
		for l.ctx.Err() == nil {
			began := time.Now()
			err := once(l.ctx)
			if err != nil && l.ctx.Err() != nil {
				return // the end of the test cut it short
			}
			l.done.Add(1)
			l.mu.Lock()
			if err == nil {
				k.ok++
			} else {
				k.failures = append(k.failures, failure{began, time.Now(), err})
			}
			l.mu.Unlock()
			// The machine has other work to do as well.
			select {
			case <-l.ctx.Done():
			case <-time.After(2 * time.Millisecond):
			}
		}
	})
}

// cause says that a fault begins; what it returns, that it is over.
func (l *load) cause(name string) (over func()) {
	f := &fault{name: name, from: time.Now()}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.faults = append(l.faults, f)
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		f.to = time.Now()
	}
}

// more waits until a number of further things was done.
func (l *load) more(t *testing.T, count int64) {
	t.Helper()
	want := l.done.Load() + count
	sluicetest.Eventually(t, func() bool { return l.done.Load() >= want }, func() string { return "the load makes no progress" })
}

// finish ends the load, if it has not ended.
func (l *load) finish() {
	l.stop()
	l.work.Wait()
	for _, end := range l.idle {
		end()
	}
}

// unexplained returns the failures of a kind that have no cause.
func (l *load) unexplained(k *tally) []failure {
	var left []failure
	for _, f := range k.failures {
		if !l.explained(k, f) {
			left = append(left, f)
		}
	}
	return left
}

func (l *load) explained(k *tally, f failure) bool {
	for _, fault := range l.faults {
		for _, cause := range k.causes {
			if fault.name == cause && !f.ended.Before(fault.from) && (fault.to.IsZero() || !f.began.After(fault.to.Add(grace))) {
				return true
			}
		}
	}
	return false
}

// serve runs a pod's application until stop: HTTP on 8080, an echo on 8082.
func serve(t *testing.T, p *sluicetest.Pod) (stop func()) {
	t.Helper()
	server := &http.Server{ReadHeaderTimeout: sluicetest.Deadline, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, p.Name)
	})}
	web, echo := p.ListenTCP(t, 8080), p.ListenTCP(t, 8082)
	go func() { _ = server.Serve(web) }()
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		for {
			c, err := echo.Accept()
			if err != nil {
				return // closed
			}
			end := context.AfterFunc(ctx, func() { _ = c.Close() })
			go func() {
				defer func() { end(); _ = c.Close() }()
				_, _ = io.Copy(c, c)
			}()
		}
	}()
	return func() { cancel(); _ = server.Close(); _ = echo.Close() }
}

// request makes one request, on a connection of its own or a kept one.
func (l *load) request(from *sluicetest.Pod, url string, keep bool) func(context.Context) error {
	client := from.HTTPClient(keep)
	l.idle = append(l.idle, client.CloseIdleConnections)
	return func(ctx context.Context) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return err
		}
		resp, err := client.Do(req)
		if err != nil {
			return err
		}
		defer func() { _ = resp.Body.Close() }()
		body, err := io.ReadAll(resp.Body)
		if err == nil && (resp.StatusCode != http.StatusOK || len(body) == 0) {
			err = fmt.Errorf("status %d: %q", resp.StatusCode, body)
		}
		return err
	}
}

// stream sends random bytes, closes its half and wants the same bytes back.
func stream(from *sluicetest.Pod, addr string, size int) func(context.Context) error {
	return func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, sluicetest.Deadline)
		defer cancel()
		c, err := from.Dial(ctx, "tcp", netip.MustParseAddrPort(addr).String())
		if err != nil {
			return err
		}
		defer func() { _ = c.Close() }()
		defer context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Now()) })()
		sent := make([]byte, size)
		if _, err := rand.Read(sent); err != nil {
			return err
		}
		wrote := make(chan error, 1)
		go func() {
			_, err := c.Write(sent)
			wrote <- errors.Join(err, c.(*net.TCPConn).CloseWrite())
		}()
		got, err := io.ReadAll(c)
		if err = errors.Join(err, <-wrote); err != nil {
			return err
		}
		if !bytes.Equal(got, sent) {
			return fmt.Errorf("sent %d bytes, other %d came back", len(sent), len(got))
		}
		return nil
	}
}

// longConversation talks over one connection as long as there is load. Once it
// breaks, everything after that fails.
func (s *soak) longConversation(addr string) func(context.Context) error {
	var c net.Conn
	return func(ctx context.Context) error {
		if c == nil {
			var err error
			if c, err = s.client.Dial(ctx, "tcp", addr); err != nil {
				return err
			}
			context.AfterFunc(ctx, func() { _ = c.Close() })
		}
		if err := c.SetDeadline(time.Now().Add(sluicetest.Deadline)); err != nil {
			return err
		}
		line := []byte("still there\n")
		if _, err := c.Write(line); err != nil {
			return err
		}
		_, err := io.ReadFull(c, line)
		return err
	}
}
