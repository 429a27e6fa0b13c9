package redirect

import (
	"context"
	"errors"
	"sync"
	"testing"
)

// Operations on one workload exclude each other, those on another do not wait,
// and nothing is kept of workloads that nobody is at work on.
func TestTurns(t *testing.T) {
	var turns Turns[ID]
	a, b := ID{PodUID: "a"}, ID{PodUID: "b"}
	end := turns.Take(a)
	late, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := turns.TakeContext(late, a); !errors.Is(err, context.Canceled) {
		t.Errorf("waited for a turn that is taken: %v", err)
	}
	turns.Take(b)() // would wait for ever
	if turns.Try(a) != nil {
		t.Error("took a turn that is taken")
	}
	turns.Try(b)()
	n := 0
	var all sync.WaitGroup
	for range 100 {
		all.Go(func() {
			defer turns.Take(a)()
			n++ // the race detector would tell
		})
	}
	if n != 0 {
		t.Error("somebody else took the turn")
	}
	end()
	all.Wait()
	if n != 100 || len(turns.busy) != 0 {
		t.Errorf("%d turns were taken, %d are kept", n, len(turns.busy))
	}
}
