package netnstest

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
)

// An Answer is the line that a server sends to every connection: who it is and
// what it sees.
type Answer struct {
	// Name is the server's.
	Name string `json:"name"`
	// Peer and Local are the addresses of the accepted socket, unmapped.
	Peer  netip.AddrPort `json:"peer"`
	Local netip.AddrPort `json:"local"`
}

// A Server answers every TCP connection with an Answer and then echoes.
type Server struct {
	// Addr is where it listens.
	Addr netip.AddrPort

	name  string
	l     net.Listener
	conns sync.WaitGroup
	mu    sync.Mutex
	open  map[net.Conn]struct{}
}

// Serve starts a server inside the namespace; it ends with the test.
func (ns Namespace) Serve(tb testing.TB, addr netip.AddrPort, name string) *Server {
	tb.Helper()
	l, err := ns.Listen(context.Background(), "tcp", addr.String())
	if err != nil {
		tb.Fatalf("serve %s in %s: %v", name, ns.Name, err)
	}
	return ServeOn(tb, l, name)
}

// ServeOn starts a server that accepts from l, which it closes when it ends: with
// the test.
func ServeOn(tb testing.TB, l net.Listener, name string) *Server {
	tb.Helper()
	s := &Server{Addr: AddrPort(l.Addr()), name: name, l: l, open: make(map[net.Conn]struct{})}
	s.conns.Add(1)
	go s.accept()
	tb.Cleanup(s.Close)
	return s
}

// Close ends the server and its connections, and returns when they are closed.
func (s *Server) Close() {
	_ = s.l.Close()
	s.mu.Lock()
	for c := range s.open {
		_ = c.Close()
	}
	s.mu.Unlock()
	s.conns.Wait()
}

func (s *Server) accept() {
	defer s.conns.Done()
	for {
		c, err := s.l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // a client that left before it was accepted
		}
		s.mu.Lock()
		s.open[c] = struct{}{}
		s.mu.Unlock()
		s.conns.Add(1)
		go func() {
			defer s.conns.Done()
			s.answer(c)
			s.mu.Lock()
			delete(s.open, c)
			s.mu.Unlock()
		}()
	}
}

func (s *Server) answer(c net.Conn) {
	defer func() { _ = c.Close() }()
	a := Answer{Name: s.name, Peer: AddrPort(c.RemoteAddr()), Local: AddrPort(c.LocalAddr())}
	if json.NewEncoder(c).Encode(a) == nil {
		// Not with splice(2), which takes urgent data for the end.
		_, _ = io.Copy(c, struct{ io.Reader }{c})
	}
}

// Ask connects from inside the namespace, returns the server's answer and
// closes the connection.
func (ns Namespace) Ask(ctx context.Context, addr netip.AddrPort) (Answer, error) {
	c, err := ns.Dial(ctx, "tcp", addr.String())
	if err != nil {
		return Answer{}, err
	}
	defer func() { _ = c.Close() }()
	return ReadAnswer(ctx, c)
}

// ReadAnswer reads the line that a Server sends first, and nothing behind it.
func ReadAnswer(ctx context.Context, c net.Conn) (Answer, error) {
	var a Answer
	line, err := ReadLine(ctx, c)
	if err != nil {
		return a, fmt.Errorf("read answer: %w", err)
	}
	if err := json.Unmarshal(line, &a); err != nil {
		return a, fmt.Errorf("parse answer %q: %w", line, err)
	}
	return a, nil
}

// Echo sends text as a line to a Server whose answer has been read, and checks
// that it comes back.
func Echo(ctx context.Context, c net.Conn, text string) error {
	if _, err := fmt.Fprintln(c, text); err != nil {
		return fmt.Errorf("send line: %w", err)
	}
	line, err := ReadLine(ctx, c)
	if err != nil {
		return fmt.Errorf("read echo: %w", err)
	}
	if string(line) != text+"\n" {
		return fmt.Errorf("read echo: got %q, want %q", line, text)
	}
	return nil
}

// ReadLine reads one line with its end, byte by byte, so that what follows
// stays in the socket. It closes c when ctx ends first.
func ReadLine(ctx context.Context, c net.Conn) ([]byte, error) {
	stop := context.AfterFunc(ctx, func() { _ = c.Close() })
	defer stop()
	return bufio.NewReaderSize(byteReader{c}, 16).ReadBytes('\n')
}

// byteReader reads one byte at a time.
type byteReader struct{ r io.Reader }

func (b byteReader) Read(p []byte) (int, error) { return b.r.Read(p[:1]) }

// AddrPort returns a TCP address as netip has it, unmapped and without zone.
func AddrPort(a net.Addr) netip.AddrPort {
	ap, err := netip.ParseAddrPort(a.String())
	if err != nil {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port())
}
