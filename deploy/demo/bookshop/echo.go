package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
)

// serveEcho tells each connection on a line who it came from and then sends back
// what it gets, until ctx ends. Connections that are open then are closed.
func (s server) serveEcho(ctx context.Context) error {
	l, err := s.open(ctx)
	if err != nil {
		return err
	}
	var (
		wg    sync.WaitGroup
		mu    sync.Mutex
		conns = map[net.Conn]bool{}
	)
	stop := context.AfterFunc(ctx, func() {
		_ = l.Close()
		mu.Lock()
		defer mu.Unlock()
		for c := range conns {
			_ = c.Close()
		}
	})
	defer stop()
	for {
		c, err := l.Accept()
		if err != nil {
			wg.Wait()
			if ctx.Err() != nil && errors.Is(err, net.ErrClosed) {
				return nil
			}
			return fmt.Errorf("accept on %s: %w", s.listen, err)
		}
		mu.Lock()
		conns[c] = true
		mu.Unlock()
		if ctx.Err() != nil {
			_ = c.Close()
		}
		wg.Go(func() {
			fmt.Fprintln(c, c.RemoteAddr())
			_, _ = io.Copy(c, c)
			_ = c.Close()
			mu.Lock()
			delete(conns, c)
			mu.Unlock()
		})
	}
}
