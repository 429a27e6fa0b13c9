package paircheck

import (
	"errors"
	"fmt"
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// An end is one end of a TCP connection: a bare non-blocking socket, so that
// checks see what the kernel does and nothing of the Go runtime.
type end struct {
	fd       int
	deadline time.Time // of everything that waits
}

// errSlow says that something did not happen in time.
var errSlow = errors.New("nothing happened before the deadline")

// wait waits until poll reports one of the events, or an error of the socket.
func (e *end) wait(events int16) (int16, error) {
	for {
		left := time.Until(e.deadline)
		if left <= 0 {
			return 0, errSlow
		}
		p := []unix.PollFd{{Fd: int32(e.fd), Events: events}}
		n, err := unix.Poll(p, int(left.Milliseconds())+1)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 0, fmt.Errorf("poll: %w", err)
		case n > 0:
			return p[0].Revents, nil
		}
	}
}

// write writes all of b.
func (e *end) write(b []byte) error {
	for len(b) > 0 {
		n, err := unix.SendmsgN(e.fd, b, nil, nil, unix.MSG_NOSIGNAL)
		switch {
		case errors.Is(err, unix.EAGAIN):
			if _, err := e.wait(unix.POLLOUT); err != nil {
				return fmt.Errorf("wait until writable: %w", err)
			}
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return fmt.Errorf("write: %w", err)
		default:
			b = b[n:]
		}
	}
	return nil
}

// stuff writes b until the kernel takes no more, and returns how much it took.
// What it takes late, because buffers still grow, counts too.
func (e *end) stuff(b []byte) (taken int, err error) {
	const settle = 20 // milliseconds without room: it is full
	for taken < len(b) {
		n, err := unix.SendmsgN(e.fd, b[taken:], nil, nil, unix.MSG_NOSIGNAL)
		switch {
		case errors.Is(err, unix.EAGAIN):
			p := []unix.PollFd{{Fd: int32(e.fd), Events: unix.POLLOUT}}
			if n, err := unix.Poll(p, settle); err == nil && n == 0 {
				return taken, nil
			}
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return taken, fmt.Errorf("write: %w", err)
		default:
			taken += n
		}
		if time.Now().After(e.deadline) {
			return taken, errSlow
		}
	}
	return taken, nil
}

// recv receives once, as soon as there is something; 0 is the end of the stream.
func (e *end) recv(b []byte, flags int) (int, error) {
	for {
		n, _, err := unix.Recvfrom(e.fd, b, flags)
		switch {
		case errors.Is(err, unix.EAGAIN):
			if _, err := e.wait(unix.POLLIN); err != nil {
				return 0, fmt.Errorf("wait until readable: %w", err)
			}
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 0, fmt.Errorf("receive: %w", err)
		default:
			return n, nil
		}
	}
}

// read fills b.
func (e *end) read(b []byte) error {
	for len(b) > 0 {
		n, err := e.recv(b, 0)
		if err != nil {
			return err
		}
		if n == 0 {
			return fmt.Errorf("stream ends %d bytes early", len(b))
		}
		b = b[n:]
	}
	return nil
}

// inq is FIONREAD.
func (e *end) inq() (int, error) {
	n, err := unix.IoctlGetInt(e.fd, unix.TIOCINQ)
	if err != nil {
		return 0, fmt.Errorf("ioctl FIONREAD: %w", err)
	}
	return n, nil
}

func (e *end) shutdown() error {
	if err := unix.Shutdown(e.fd, unix.SHUT_WR); err != nil {
		return fmt.Errorf("shutdown: %w", err)
	}
	return nil
}

// reset closes the connection with RST.
func (e *end) reset() error {
	if err := unix.SetsockoptLinger(e.fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
		return fmt.Errorf("set SO_LINGER: %w", err)
	}
	return e.close()
}

func (e *end) close() error {
	if e.fd < 0 {
		return nil
	}
	fd := e.fd
	e.fd = -1
	return unix.Close(fd)
}

// A dialer connects ends over loopback.
type dialer struct {
	listener int
	to       unix.Sockaddr
	family   int
	limit    time.Duration // for all that one pair of ends waits for
	buffer   int
}

// newDialer listens on a port of an address of loopback. With a buffer each
// end's send buffer has that size, whatever the node's sysctls are; with 0 the
// kernel chooses. The receive buffers stay as they are: ends with fixed ones are
// not joined.
func newDialer(ip net.IP, port int, limit time.Duration, buffer int) (*dialer, error) {
	d := &dialer{family: unix.AF_INET6, limit: limit, buffer: buffer}
	if v4 := ip.To4(); v4 != nil {
		d.family, d.to = unix.AF_INET, &unix.SockaddrInet4{Port: port, Addr: [4]byte(v4)}
	} else {
		d.to = &unix.SockaddrInet6{Port: port, Addr: [16]byte(ip)}
	}
	var err error
	if d.listener, err = unix.Socket(d.family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return nil, fmt.Errorf("open socket: %w", err)
	}
	err = errors.Join(d.size(d.listener), // accepted sockets inherit it
		unix.SetsockoptInt(d.listener, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1),
		unix.Bind(d.listener, d.to), unix.Listen(d.listener, 128))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("listen on port %d: %w", port, err), d.close())
	}
	return d, nil
}

func (d *dialer) close() error { return unix.Close(d.listener) }

// size sets the send buffer of a socket.
func (d *dialer) size(fd int) error {
	if d.buffer == 0 {
		return nil
	}
	return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, d.buffer)
}

// dial returns both ends of a new connection.
func (d *dialer) dial() (client, server *end, err error) {
	client = &end{deadline: time.Now().Add(d.limit)}
	if client.fd, err = unix.Socket(d.family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0); err != nil {
		return nil, nil, fmt.Errorf("open socket: %w", err)
	}
	if err := d.size(client.fd); err != nil {
		return nil, nil, errors.Join(fmt.Errorf("set size of buffer: %w", err), client.close())
	}
	if err := unix.Connect(client.fd, d.to); err != nil && !errors.Is(err, unix.EINPROGRESS) {
		return nil, nil, errors.Join(fmt.Errorf("connect: %w", err), client.close())
	}
	server = &end{deadline: client.deadline}
	// Accepting waits; that the client's end is writable follows from it.
	if server.fd, _, err = unix.Accept4(d.listener, unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK); err != nil {
		return nil, nil, errors.Join(fmt.Errorf("accept: %w", err), client.close())
	}
	if _, err := client.wait(unix.POLLOUT); err != nil {
		return nil, nil, errors.Join(fmt.Errorf("connect: %w", err), client.close(), server.close())
	}
	return client, server, nil
}
