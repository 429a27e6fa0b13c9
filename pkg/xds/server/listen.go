package server

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// maxConns is the number of connections that one pod may have: an Envoy has
// one, and two during a hot restart.
const maxConns = 8

// refusedEvery is how often Options.Refused is told of one pod. Any process of
// the pod can be refused as often as it likes, and who is told has work to do.
const refusedEvery = time.Second

// A socket is the listening socket of one pod and what was accepted from it.
type socket struct {
	s     *Server
	uid   string
	netns string // path and inode
	lis   *net.UnixListener

	mu       sync.Mutex
	proxyUID uint32
	conns    map[*conn]struct{}
	warned   bool
	told     time.Time // when Options.Refused was last called
	closed   bool
}

// A conn tells the stream which pod is asking, by its remote address.
type conn struct {
	*net.UnixConn
	sock *socket
}

// RemoteAddr implements net.Conn.
func (c *conn) RemoteAddr() net.Addr { return podAddr{c} }

// Close implements net.Conn.
func (c *conn) Close() error {
	c.sock.mu.Lock()
	delete(c.sock.conns, c)
	c.sock.mu.Unlock()
	return c.UnixConn.Close()
}

type podAddr struct{ conn *conn }

func (podAddr) Network() string  { return "unix" }
func (a podAddr) String() string { return "pod:" + a.conn.sock.uid }

// Open listens inside the network namespace at netnsPath (empty: the
// caller's) and serves the pod there, but only to processes of user proxyUID,
// as the kernel reports them, that Options.IsProxy knows; root is refused as well. It does nothing if the
// pod is served there already, takes over another proxyUID for new
// connections, and moves to another namespace if the path now leads there.
func (s *Server) Open(uid, netnsPath string, proxyUID uint32) error {
	s.socketsMu.Lock()
	defer s.socketsMu.Unlock()
	id, err := netnsID(netnsPath)
	if err != nil {
		return fmt.Errorf("open xDS socket of pod %s: %w", uid, err)
	}
	if old := s.sockets[uid]; old != nil {
		if old.netns == id {
			old.mu.Lock()
			old.proxyUID = proxyUID
			old.mu.Unlock()
			return old.recheck()
		}
		if err := s.closeSocket(uid); err != nil {
			return err
		}
	}
	if s.stopped {
		return fmt.Errorf("open xDS socket of pod %s: server stopped", uid)
	}
	sock := &socket{s: s, uid: uid, netns: id, proxyUID: proxyUID, conns: map[*conn]struct{}{}}
	listen := func() error {
		var err error
		sock.lis, err = net.ListenUnix("unix", &net.UnixAddr{Name: s.opts.Socket, Net: "unix"})
		return err
	}
	if netnsPath == "" {
		err = listen()
	} else {
		err = s.opts.InNetns(netnsPath, listen)
	}
	if err != nil {
		if sock.lis != nil {
			_ = sock.lis.Close() // the error that counts is err
		}
		return fmt.Errorf("listen on %s in netns %s for pod %s: %w", s.opts.Socket, netnsPath, uid, err)
	}
	s.sockets[uid] = sock
	s.serving.Go(func() {
		if err := s.grpc.Serve(sock); err != nil && !errors.Is(err, net.ErrClosed) {
			s.opts.Log.Error("serve xDS socket", "pod_uid", uid, "err", err)
		}
	})
	return nil
}

// netnsID tells namespaces apart even if one has taken the path of another.
func netnsID(path string) (string, error) {
	if path == "" {
		return "", nil
	}
	fi, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return path, nil
	}
	return fmt.Sprintf("%s %d:%d", path, st.Dev, st.Ino), nil
}

// ClosePod closes the pod's socket and its connections; it does nothing if
// there are none.
func (s *Server) ClosePod(uid string) error {
	s.socketsMu.Lock()
	defer s.socketsMu.Unlock()
	return s.closeSocket(uid)
}

func (s *Server) closeSocket(uid string) error {
	sock := s.sockets[uid]
	if sock == nil {
		return nil
	}
	delete(s.sockets, uid)
	err := sock.lis.Close()
	sock.mu.Lock()
	sock.closed = true
	conns := sock.conns
	sock.conns = nil
	sock.mu.Unlock()
	for c := range conns {
		err = errors.Join(err, c.UnixConn.Close())
	}
	if errors.Is(err, net.ErrClosed) {
		err = nil // the server has stopped, or the client was faster
	}
	if err != nil {
		return fmt.Errorf("close xDS socket of pod %s: %w", uid, err)
	}
	return nil
}

// Accept implements net.Listener; connections that are not the proxy's end here.
func (k *socket) Accept() (net.Conn, error) {
	for {
		uc, err := k.lis.AcceptUnix()
		if err != nil {
			return nil, err
		}
		if c := k.admit(uc); c != nil {
			return c, nil
		}
		_ = uc.Close() // refused
	}
}

// Close implements net.Listener.
func (k *socket) Close() error { return k.lis.Close() }

// Addr implements net.Listener.
func (k *socket) Addr() net.Addr { return k.lis.Addr() }

// recheck ends the connections that would not be admitted any more because more
// is known of who the proxy is.
func (k *socket) recheck() error {
	k.mu.Lock()
	conns := slices.Collect(maps.Keys(k.conns))
	k.mu.Unlock()
	var errs []error
	for _, c := range conns {
		if !k.isProxy(c.UnixConn) {
			errs = append(errs, c.Close())
		}
	}
	if err := errors.Join(errs...); err != nil && !errors.Is(err, net.ErrClosed) {
		return fmt.Errorf("close connection to xDS socket of pod %s: %w", k.uid, err)
	}
	return nil
}

func (k *socket) isProxy(uc *net.UnixConn) bool {
	return k.s.opts.IsProxy == nil || k.s.opts.IsProxy(k.uid, uc)
}

func (k *socket) admit(uc *net.UnixConn) *conn {
	cred, err := peer(uc)
	proxy := err == nil && k.isProxy(uc)
	k.mu.Lock()
	defer k.mu.Unlock()
	var reason string
	switch {
	case err != nil || cred.Uid != k.proxyUID:
		reason = "uid"
	case !proxy:
		reason = "container"
	case len(k.conns) >= maxConns:
		reason = "limit"
	case k.closed:
		return nil
	default:
		c := &conn{uc, k}
		k.conns[c] = struct{}{}
		return c
	}
	k.s.metrics.refused.WithLabelValues(reason).Inc()
	if reason != "limit" && k.s.opts.Refused != nil && time.Since(k.told) >= refusedEvery {
		k.told = time.Now()
		k.s.opts.Refused(k.uid)
	}
	if !k.warned {
		k.warned = true
		args := []any{"pod_uid", k.uid, "reason", reason, "proxy_uid", k.proxyUID}
		if err != nil {
			args = append(args, "err", err)
		} else {
			args = append(args, "peer_uid", cred.Uid, "peer_pid", cred.Pid)
		}
		k.s.opts.Log.Warn("refused a connection to a pod's xDS socket; more of them are only counted", args...)
	}
	return nil
}

func peer(uc *net.UnixConn) (*unix.Ucred, error) {
	raw, err := uc.SyscallConn()
	if err != nil {
		return nil, err
	}
	var cred *unix.Ucred
	var inner error
	err = raw.Control(func(fd uintptr) {
		cred, inner = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	return cred, errors.Join(err, inner)
}
