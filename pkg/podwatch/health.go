package podwatch

import (
	"cmp"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
)

// A KindHealth says how well one kind is read from the API server.
type KindHealth struct {
	Kind Kind
	// Synced is set once all objects were read, and then for good.
	Synced bool
	// LastContact is when the server last said anything about the kind: the
	// answer to a list or watch, an event, or a bookmark, which come about once
	// a minute. Zero if it never did.
	LastContact time.Time
	// Watches counts how often following the kind began.
	Watches uint64
	// Err is why the kind cannot be read or followed just now, nil if it can.
	// The last state stays in the Store meanwhile.
	Err error
}

// A health watches over the kinds. Each error is logged once when it comes and
// once when it goes, however many kinds have it and however often it is tried.
type health struct {
	log *slog.Logger

	mu    sync.Mutex
	kinds map[Kind]*kindState
	// logged are the errors that are there, by their text.
	logged map[string]struct{}
	// wake is closed when a kind can be read again, or by poke.
	wake chan struct{}
}

type kindState struct {
	synced  bool
	contact time.Time
	watches uint64
	// errs are the errors of the verbs list and watch. That a list succeeds says
	// nothing about a watch.
	list, watch error
	// again is set while the error is the same as the time before.
	again bool
}

func (s *kindState) err() error {
	if s.list != nil {
		return s.list
	}
	return s.watch
}

func newHealth(log *slog.Logger) *health {
	return &health{log: log, kinds: map[Kind]*kindState{}, logged: map[string]struct{}{}, wake: make(chan struct{})}
}

// add makes a kind known, forget the opposite. Neither minds being late.
func (h *health) add(kind Kind) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.kinds[kind] == nil {
		h.kinds[kind] = &kindState{}
	}
}

func (h *health) forget(kind Kind) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.kinds, kind)
	h.tell()
}

// contact notes that the server said something about a kind.
func (h *health) contact(kind Kind) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if s := h.kinds[kind]; s != nil {
		s.contact = time.Now()
	}
}

// absent notes that the server does not know the kind, and that this is fine.
func (h *health) absent(kind Kind) {
	h.outcome(kind, nil, func(s *kindState) { s.list, s.watch = nil, nil })
}

// listed and watching note how a request went; nil: well.
func (h *health) listed(kind Kind, err error) {
	h.outcome(kind, err, func(s *kindState) { s.list = err })
}

func (h *health) watching(kind Kind, err error) {
	h.outcome(kind, err, func(s *kindState) {
		if s.watch = err; err == nil {
			s.list = nil
			s.watches++
		}
	})
}

func (h *health) outcome(kind Kind, err error, note func(*kindState)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := h.kinds[kind]
	if s == nil {
		return
	}
	before := s.err()
	if note(s); err == nil {
		s.contact = time.Now()
	}
	now := s.err()
	s.again = before != nil && now != nil && before.Error() == now.Error()
	if before != nil && now == nil {
		h.wakeAll()
	}
	h.tell()
}

// poke says that there is a reason to try now what did not work.
func (h *health) poke() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.wakeAll()
}

func (h *health) wakeAll() {
	close(h.wake)
	h.wake = make(chan struct{})
}

// woken returns a channel that is closed when a kind can be read again: then
// others are worth an attempt.
func (h *health) woken() <-chan struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.wake
}

// setSynced says that all objects of a kind were read.
func (h *health) setSynced(kind Kind) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if s := h.kinds[kind]; s != nil {
		s.synced = true
	}
}

// allSynced says whether that is so of all kinds.
func (h *health) allSynced() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, s := range h.kinds {
		if !s.synced {
			return false
		}
	}
	return true
}

// tell logs the errors that came and went. It is called with mu held.
func (h *health) tell() {
	now := map[string]struct{}{}
	for kind, s := range h.kinds {
		err := s.err()
		// A server that has just started refuses everything for a moment.
		passing := errors.Is(err, errBehind) || apierrors.IsForbidden(err) && !s.again
		if err == nil || passing {
			continue
		}
		text := err.Error()
		now[text] = struct{}{}
		if _, ok := h.logged[text]; !ok {
			h.log.Warn("source cannot be read; the last state stays, it is tried again", "kind", kind, "err", err)
			h.logged[text] = struct{}{}
		}
	}
	for text := range h.logged {
		if _, ok := now[text]; !ok {
			h.log.Info("source can be read again", "was", text)
			delete(h.logged, text)
		}
	}
}

// list returns the state of all kinds, sorted.
func (h *health) list() []KindHealth {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := make([]KindHealth, 0, len(h.kinds))
	for kind, s := range h.kinds {
		out = append(out, KindHealth{Kind: kind, Synced: s.synced, LastContact: s.contact, Watches: s.watches, Err: s.err()})
	}
	slices.SortFunc(out, func(a, b KindHealth) int { return cmp.Or(strings.Compare(string(a.Kind), string(b.Kind))) })
	return out
}
