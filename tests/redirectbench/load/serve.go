package load

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
)

func listen(addr netip.AddrPort) (net.Listener, error) {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false) // as most servers do
	return lc.Listen(context.Background(), "tcp", addr.String())
}

func accept(l net.Listener, service int) error {
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer func() { _ = c.Close() }()
			answer(c.(*net.TCPConn), service)
		}()
	}
}

// answer serves one connection. The client notices what goes wrong.
func answer(c *net.TCPConn, service int) {
	switch service {
	case Echo:
		echo(c)
	case Sink:
		sink(c)
	case HTTP:
		serveHTTP(c)
	default:
		_, _ = io.WriteString(c, "hello\n")
	}
}

// echo begins with a small buffer: most of many connections are idle.
func echo(c *net.TCPConn) {
	b := make([]byte, 1<<10)
	for {
		n, err := c.Read(b)
		if err != nil {
			return
		}
		if _, err := c.Write(b[:n]); err != nil {
			return
		}
		if n == len(b) && n < 64<<10 {
			b = make([]byte, 64<<10)
		}
	}
}

func sink(c *net.TCPConn) {
	b := make([]byte, 256<<10)
	var sum uint64
	for {
		n, err := c.Read(b)
		sum += uint64(n)
		if errors.Is(err, io.EOF) {
			_, _ = c.Write(binary.BigEndian.AppendUint64(nil, sum))
			return
		}
		if err != nil {
			return
		}
	}
}

func serveHTTP(c *net.TCPConn) {
	r := bufio.NewReader(c)
	for {
		req, err := http.ReadRequest(r)
		if err != nil {
			return
		}
		if _, err := io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 6\r\n\r\nhello\n"); err != nil || req.Close {
			return
		}
	}
}
