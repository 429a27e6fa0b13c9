package load

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// timeout bounds each call to the kernel.
const timeout = 30 * time.Second

// A caller makes connections. It uses blocking sockets: package net's poller
// would be a good part of what is measured.
type caller struct {
	held []int
	// times of what is measured one by one
	times []time.Duration
}

func (c *caller) call(req Request) (Result, error) {
	if len(req.Addrs) == 0 || req.N < 1 {
		return Result{}, errors.New("nothing to do")
	}
	c.times = c.times[:0]
	var res Result
	var err error
	start := time.Now()
	switch req.Op {
	case "connect":
		err = c.each(req, &res, func(fd int) error { return round(fd, make([]byte, req.Size)) })
	case "hello":
		err = c.each(req, &res, hello)
	case "round":
		err = c.rounds(req)
	case "stream":
		err = stream(req)
	case "http":
		err = requests(req)
	case "hold":
		err = c.hold(req)
	case "release":
		err = c.release()
	default:
		err = errors.New("there is no such operation")
	}
	res.Elapsed = time.Since(start)
	if len(c.times) > 0 {
		slices.Sort(c.times)
		res.P50, res.P99 = c.times[len(c.times)/2], c.times[len(c.times)*99/100]
	}
	return res, err
}

// dial connects a socket.
func dial(to netip.AddrPort) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("make socket: %w", err)
	}
	tv := unix.NsecToTimeval(timeout.Nanoseconds())
	err = errors.Join(
		unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv))
	if err == nil {
		err = unix.Connect(fd, &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()})
	}
	if err != nil {
		_ = unix.Close(fd)
		return -1, fmt.Errorf("connect to %s: %w", to, err)
	}
	return fd, nil
}

// each makes N connections, one after the other, and takes the time of each
// from the socket to the end of talk.
func (c *caller) each(req Request, res *Result, talk func(fd int) error) error {
	for i := range req.N {
		start := time.Now()
		fd, err := dial(req.Addrs[i%len(req.Addrs)])
		if err != nil {
			return fmt.Errorf("connection %d: %w", i, err)
		}
		err = talk(fd)
		took := time.Since(start)
		info, infoErr := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		if err := errors.Join(err, infoErr, unix.Close(fd)); err != nil {
			return fmt.Errorf("connection %d: %w", i, err)
		}
		c.times = append(c.times, took)
		res.Resent += int(info.Total_retrans)
		if took >= time.Second/2 {
			res.Slow++
		}
	}
	return nil
}

// round sends a message and reads as much back.
func round(fd int, message []byte) error {
	if err := write(fd, message); err != nil {
		return err
	}
	return read(fd, message)
}

func (c *caller) rounds(req Request) error {
	fd, err := dial(req.Addrs[0])
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	message := make([]byte, req.Size)
	if err := round(fd, message); err != nil { // the connection is complete
		return err
	}
	for range req.N {
		start := time.Now()
		if err := round(fd, message); err != nil {
			return err
		}
		c.times = append(c.times, time.Since(start))
	}
	return nil
}

// hello reads the greeting of a server that then closes.
func hello(fd int) error {
	b := make([]byte, 16)
	if err := read(fd, b[:len("hello\n")]); err != nil {
		return err
	}
	if n, err := unix.Read(fd, b); n != 0 || err != nil {
		return fmt.Errorf("read to the end: %d bytes, %w", n, err)
	}
	return nil
}

// stream sends N writes and wants the server to have counted all bytes.
func stream(req Request) error {
	fd, err := dial(req.Addrs[0])
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	b := make([]byte, req.Size)
	for range req.N {
		if err := write(fd, b); err != nil {
			return err
		}
	}
	if err := unix.Shutdown(fd, unix.SHUT_WR); err != nil {
		return fmt.Errorf("close half: %w", err)
	}
	sum := make([]byte, 8)
	if err := read(fd, sum); err != nil {
		return err
	}
	if got, want := binary.BigEndian.Uint64(sum), uint64(req.N)*uint64(req.Size); got != want {
		return fmt.Errorf("%d bytes arrived, want %d", got, want)
	}
	return nil
}

// hold opens N connections with one round trip each, and keeps them.
func (c *caller) hold(req Request) error {
	for range req.N {
		fd, err := dial(req.Addrs[0])
		if err != nil {
			return fmt.Errorf("with %d open: %w", len(c.held), err)
		}
		c.held = append(c.held, fd)
		if err := round(fd, make([]byte, 64)); err != nil {
			return fmt.Errorf("with %d open: %w", len(c.held), err)
		}
	}
	return nil
}

// release resets what is held, so that no port stays taken.
func (c *caller) release() error {
	var errs []error
	for _, fd := range c.held {
		errs = append(errs, unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}), unix.Close(fd))
	}
	c.held = c.held[:0]
	return errors.Join(errs...)
}

func write(fd int, b []byte) error {
	for len(b) > 0 {
		n, err := unix.Write(fd, b)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("write: %w", err)
		}
		b = b[n:]
	}
	return nil
}

func read(fd int, b []byte) error {
	for len(b) > 0 {
		n, err := unix.Read(fd, b)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("read: %w", err)
		}
		if n == 0 {
			return io.ErrUnexpectedEOF
		}
		b = b[n:]
	}
	return nil
}

// requests makes N HTTP requests on parallel connections.
func requests(req Request) error {
	each := max(1, req.N/req.Parallel)
	done := make(chan error, req.Parallel)
	for range req.Parallel {
		go func() { done <- request(req, each) }()
	}
	var errs []error
	for range req.Parallel {
		errs = append(errs, <-done)
	}
	return errors.Join(errs...)
}

func request(req Request, n int) error {
	text := "GET / HTTP/1.1\r\nHost: bench\r\n\r\n"
	if req.Close {
		text = strings.Replace(text, "\r\n\r\n", "\r\nConnection: close\r\n\r\n", 1)
	}
	d := net.Dialer{Timeout: timeout}
	d.SetMultipathTCP(false)
	for n > 0 {
		c, err := d.Dial("tcp", req.Addrs[0].String())
		if err != nil {
			return err
		}
		if err := c.SetDeadline(time.Now().Add(2 * timeout)); err != nil {
			return errors.Join(err, c.Close())
		}
		for r := bufio.NewReader(c); n > 0; {
			if err := get(c, r, text); err != nil {
				return errors.Join(err, c.Close())
			}
			if n--; req.Close {
				break
			}
		}
		if err := c.Close(); err != nil {
			return err
		}
	}
	return nil
}

func get(c net.Conn, r *bufio.Reader, request string) error {
	if _, err := io.WriteString(c, request); err != nil {
		return err
	}
	resp, err := http.ReadResponse(r, nil)
	if err != nil {
		return err
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK || string(body) != "hello\n" {
		return fmt.Errorf("answer %s %q, %w", resp.Status, body, err)
	}
	return nil
}
