package redirect

import (
	"context"
	"sync"
)

// Turns admit one operation at a time to each thing, and let those on different
// things run side by side. The zero value is ready to use.
type Turns[K comparable] struct {
	mu   sync.Mutex
	busy map[K]*turn
}

// A turn is a lock with the number of those who hold or await it.
type turn struct {
	held  chan struct{}
	users int
}

// Take waits for the thing's turn and returns what ends it.
func (t *Turns[K]) Take(key K) (end func()) {
	end, _ = t.TakeContext(context.Background(), key)
	return end
}

// Try is Take, but returns nil if it would have to wait.
func (t *Turns[K]) Try(key K) (end func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.busy[key] != nil {
		return nil
	}
	own := &turn{held: make(chan struct{}, 1), users: 1}
	own.held <- struct{}{}
	if t.busy == nil {
		t.busy = make(map[K]*turn)
	}
	t.busy[key] = own
	return func() { t.end(key, own) }
}

// TakeContext is Take, but gives up with the error of ctx when that ends.
func (t *Turns[K]) TakeContext(ctx context.Context, key K) (end func(), err error) {
	t.mu.Lock()
	own := t.busy[key]
	if own == nil {
		own = &turn{held: make(chan struct{}, 1)}
		if t.busy == nil {
			t.busy = make(map[K]*turn)
		}
		t.busy[key] = own
	}
	own.users++
	t.mu.Unlock()
	select {
	case own.held <- struct{}{}:
		return func() { t.end(key, own) }, nil
	case <-ctx.Done():
		t.leave(key, own)
		return nil, ctx.Err()
	}
}

func (t *Turns[K]) end(key K, own *turn) {
	<-own.held
	t.leave(key, own)
}

func (t *Turns[K]) leave(key K, own *turn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if own.users--; own.users == 0 {
		delete(t.busy, key)
	}
}
