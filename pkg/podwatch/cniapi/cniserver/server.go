package cniserver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime/debug"
	"syscall"
	"time"

	"github.com/sluicemesh/sluice/pkg/podwatch/cniapi"
)

// Options configure a Server.
type Options struct {
	// Socket is the path to listen on; empty means cniapi.DefaultSocket. Its directory
	// is made (0755) if it is missing; one that everybody may write to is
	// refused.
	Socket string
	// Handler answers the requests. Required.
	Handler cniapi.Handler
	// Log is told of requests that fail; nil discards.
	Log *slog.Logger
	// Observe, if not nil, is called after every request with its verb ("add",
	// "del", "check", "gc", "status", or "other" for a path that is none), the
	// HTTP status that it was answered with and how long that took. It may be
	// called concurrently.
	Observe func(verb string, code int, d time.Duration)
}

// A Server answers the CNI plugin on a unix socket.
type Server struct {
	o  Options
	ln net.Listener
	// uid is whom the server answers.
	uid uint32
	// budget bounds one request, but for one that is told every so often that it is
	// worked on.
	budget, alive time.Duration
}

// New listens on the socket in place of whoever did before. Requests wait
// from then on, until Run answers them.
func New(o Options) (*Server, error) { return newServer(o, 0, cniapi.ServerBudget) }

func newServer(o Options, uid uint32, budget time.Duration) (*Server, error) {
	if o.Handler == nil {
		return nil, errors.New("listen for the CNI plugin: no handler")
	}
	if o.Socket == "" {
		o.Socket = cniapi.DefaultSocket
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Observe == nil {
		o.Observe = func(string, int, time.Duration) {}
	}
	ln, err := listen(o.Socket)
	if err != nil {
		return nil, fmt.Errorf("listen for the CNI plugin on %s: %w", o.Socket, err)
	}
	return &Server{o: o, ln: ln, uid: uid, budget: budget, alive: cniapi.AliveInterval}, nil
}

// listen binds a temporary name and renames it: at no time is there a socket
// with other permissions than 0600 or none where there was one before.
func listen(socket string) (net.Listener, error) {
	dir := filepath.Dir(socket)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	fi, err := os.Stat(dir)
	if err != nil {
		return nil, err
	}
	if fi.Mode().Perm()&0o002 != 0 {
		return nil, fmt.Errorf("directory %s may be written to by everybody (mode %04o): anyone could take the agent's place", dir, fi.Mode().Perm())
	}
	tmp := fmt.Sprintf("%s.%d", socket, os.Getpid())
	if err := os.Remove(tmp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: tmp, Net: "unix"})
	if err != nil {
		return nil, err
	}
	ln.SetUnlinkOnClose(false)
	if err := os.Chmod(tmp, 0o600); err != nil {
		return nil, errors.Join(err, ln.Close(), os.Remove(tmp))
	}
	// From here on the plugin talks to this server.
	if err := os.Rename(tmp, socket); err != nil {
		return nil, errors.Join(err, ln.Close(), os.Remove(tmp))
	}
	return ln, nil
}

// Run answers requests until ctx ends, then lets those under way finish. It
// returns nil in that case. Run may be called once.
func (s *Server) Run(ctx context.Context) error {
	srv := &http.Server{
		Handler:           s.handler(),
		ConnContext:       withPeer,
		ReadHeaderTimeout: s.budget,
		ReadTimeout:       s.budget,
		WriteTimeout:      2 * s.budget,
		IdleTimeout:       s.budget,
		ErrorLog:          slog.NewLogLogger(s.o.Log.Handler(), slog.LevelDebug),
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(s.ln) }()
	select {
	case err := <-served:
		return fmt.Errorf("serve the CNI plugin on %s: %w", s.o.Socket, err)
	case <-ctx.Done():
	}
	// Requests under way end by themselves within their own budget.
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*s.budget)
	defer cancel()
	err := srv.Shutdown(stop)
	if err != nil {
		err = errors.Join(err, srv.Close())
	}
	if serr := <-served; !errors.Is(serr, http.ErrServerClosed) {
		err = errors.Join(err, serr)
	}
	if err != nil {
		return fmt.Errorf("end the CNI server on %s: %w", s.o.Socket, err)
	}
	return nil
}

func (s *Server) handler() http.Handler {
	mux := http.NewServeMux()
	attachment := func(verb string, do func(context.Context, cniapi.Attachment) error) {
		mux.Handle("POST "+cniapi.Path(verb), s.serve(verb, func(r *http.Request) error {
			a, err := decodeAttachment(r.Body, verb)
			if err != nil {
				return badRequest{err}
			}
			return do(r.Context(), a)
		}))
	}
	h := s.o.Handler
	attachment(cniapi.VerbAdd, h.Add)
	attachment(cniapi.VerbDel, h.Del)
	attachment(cniapi.VerbCheck, h.Check)
	mux.Handle("POST "+cniapi.Path(cniapi.VerbGC), s.serve(cniapi.VerbGC, func(r *http.Request) error {
		req, err := decodeGC(r.Body)
		if err != nil {
			return badRequest{err}
		}
		return h.GC(r.Context(), req.Network, req.Valid)
	}))
	mux.Handle("GET "+cniapi.Path(cniapi.VerbStatus), s.serve(cniapi.VerbStatus, func(r *http.Request) error {
		return h.Status(r.Context())
	}))
	mux.Handle("/", s.serve("other", func(r *http.Request) error {
		return badRequest{fmt.Errorf("no such request: %s %s", r.Method, r.URL.Path)}
	}))
	return mux
}

// A badRequest is the fault of the one who asked.
type badRequest struct{ error }

func (e badRequest) Unwrap() error { return e.error }

// serve makes an http.Handler of do: peer check, limits, panics, answer.
func (s *Server) serve(verb string, do func(*http.Request) error) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		start := time.Now()
		budget, end := s.budget, func() {}
		if r.Header.Get(cniapi.AliveHeader) != "" {
			budget, end = cniapi.ServerWorkBudget, s.saysAlive(w)
		}
		ctx, cancel := context.WithTimeout(r.Context(), budget)
		defer cancel()
		r = r.WithContext(ctx)
		r.Body = http.MaxBytesReader(w, r.Body, cniapi.MaxMessage)

		code, a := http.StatusOK, cniapi.Answer{}
		err := s.do(verb, r, do)
		end()
		if err != nil {
			code, a.Error = status(err), err.Error()
			level := slog.LevelWarn
			if verb == cniapi.VerbStatus {
				level = slog.LevelDebug // asked many times while the agent starts
			}
			s.o.Log.Log(ctx, level, "CNI request is refused", "verb", verb, "code", code, "err", err)
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		// The plugin may have gone; it has no further use for an answer then.
		_ = json.NewEncoder(w).Encode(a)
		s.o.Observe(verb, code, time.Since(start))
	})
}

// saysAlive writes interim responses until end is called: whoever asked waits for as
// long as there is work.
func (s *Server) saysAlive(w http.ResponseWriter) (end func()) {
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		tick := time.NewTicker(s.alive)
		defer tick.Stop()
		control := http.NewResponseController(w)
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
			}
			// A plugin that has gone shows when the answer is written.
			_ = control.SetWriteDeadline(time.Now().Add(2 * s.budget))
			w.WriteHeader(http.StatusProcessing)
		}
	}()
	return func() { close(stop); <-stopped }
}

func (s *Server) do(verb string, r *http.Request, do func(*http.Request) error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			s.o.Log.Error("CNI request panicked", "verb", verb, "panic", p, "stack", string(debug.Stack()))
			err = fmt.Errorf("panic in the agent: %v", p)
		}
	}()
	if err := s.admit(r.Context()); err != nil {
		return err
	}
	return do(r)
}

// errForbidden marks a peer that is not root.
var errForbidden = errors.New("only root may ask the agent")

// admit lets pass whom the server answers.
func (s *Server) admit(ctx context.Context) error {
	p, ok := ctx.Value(peerKey{}).(peer)
	if !ok {
		return fmt.Errorf("%w: connection without peer credentials", errForbidden)
	}
	if p.err != nil {
		return fmt.Errorf("%w: read peer credentials: %w", errForbidden, p.err)
	}
	if p.cred.Uid != s.uid {
		return fmt.Errorf("%w: process %d has UID %d", errForbidden, p.cred.Pid, p.cred.Uid)
	}
	return nil
}

func status(err error) int {
	var tooLarge *http.MaxBytesError
	var bad badRequest
	switch {
	case errors.Is(err, errForbidden):
		return http.StatusForbidden
	case errors.As(err, &tooLarge):
		return http.StatusRequestEntityTooLarge
	case errors.As(err, &bad):
		return http.StatusBadRequest
	case errors.Is(err, context.DeadlineExceeded):
		return http.StatusGatewayTimeout
	default:
		return http.StatusInternalServerError
	}
}

type peerKey struct{}

// A peer is who opened a connection.
type peer struct {
	cred *syscall.Ucred
	err  error
}

// withPeer notes the credentials that the peer had when it connected.
func withPeer(ctx context.Context, c net.Conn) context.Context {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return ctx
	}
	var p peer
	raw, err := u.SyscallConn()
	if err == nil {
		err = raw.Control(func(fd uintptr) {
			p.cred, p.err = syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED)
		})
	}
	if err != nil {
		p.err = err
	}
	return context.WithValue(ctx, peerKey{}, p)
}
