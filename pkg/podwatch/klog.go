package podwatch

import (
	"context"
	"log/slog"

	"github.com/go-logr/logr"
	"k8s.io/klog/v2"
)

// RedirectKlog sends what Kubernetes' client library logs on its own account to
// log: errors as warnings, the rest at level debug. The library has one logger
// for the whole process, so this is for main, before it makes a source; without
// it there are lines of another format on stderr.
func RedirectKlog(log *slog.Logger) {
	klog.SetSlogLogger(slog.New(quieter{log.Handler(), slog.LevelWarn}))
}

// withKlog is a context whose users in the client library log to log at level
// debug: for those whose errors are noted elsewhere.
func withKlog(ctx context.Context, log *slog.Logger) context.Context {
	return klog.NewContext(ctx, logr.FromSlogHandler(quieter{log.Handler(), slog.LevelDebug}))
}

// A quieter logs errors at level errors, and all else as debug messages.
type quieter struct {
	slog.Handler
	errors slog.Level
}

func (q quieter) level(l slog.Level) slog.Level {
	if l >= slog.LevelError {
		return q.errors
	}
	return slog.LevelDebug
}

// Enabled implements slog.Handler. The library's levels beyond debug, with the
// bodies of all requests, are never of interest.
func (q quieter) Enabled(ctx context.Context, l slog.Level) bool {
	return l >= slog.LevelDebug && q.Handler.Enabled(ctx, q.level(l))
}

func (q quieter) Handle(ctx context.Context, r slog.Record) error {
	r.Level = q.level(r.Level)
	return q.Handler.Handle(ctx, r)
}

func (q quieter) WithAttrs(attrs []slog.Attr) slog.Handler {
	return quieter{q.Handler.WithAttrs(attrs), q.errors}
}

func (q quieter) WithGroup(name string) slog.Handler {
	return quieter{q.Handler.WithGroup(name), q.errors}
}
