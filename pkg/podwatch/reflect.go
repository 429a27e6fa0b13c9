package podwatch

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
	"k8s.io/utils/clock"
)

const (
	// answerTimeout is how long a list, or the beginning of a watch, may take. The
	// API server itself gives up after a minute.
	answerTimeout = 90 * time.Second
	// Between two attempts, each up to twice as long by jitter. The longest is a
	// third of client-go's, and ends when another kind got through: after an
	// outage a pod on this node starts only once the source knows of it.
	retryFirst, retryMax = 500 * time.Millisecond, 10 * time.Second
)

var (
	errNoAnswer = fmt.Errorf("no answer within %v", answerTimeout)
	// errBehind is nothing to worry about: the server does not remember what
	// happened since the last contact, and everything is listed anew.
	errBehind = errors.New("what happened meanwhile is not known: all is listed anew")
)

// A reading is one resource that is listed and watched.
type reading struct {
	kind     Kind
	resource schema.GroupResource
	list     func(context.Context, metav1.ListOptions) (runtime.Object, error)
	watch    func(context.Context, metav1.ListOptions) (watch.Interface, error)
	example  runtime.Object
	// sink takes what is read. It may also be a cache.TransformingStore.
	sink cache.ReflectorStore
	// missing, if not nil, is called when the server does not know the resource.
	missing func()
}

// A reflection runs readings.
type reflection struct {
	access     *access
	health     *health
	retryFirst time.Duration
}

// run keeps r.sink up to date until ctx ends. Nothing that the server says or
// fails to say ends it.
func (f reflection) run(ctx context.Context, r reading) {
	f.health.add(r.kind)
	backoff := wait.Backoff{Duration: f.retryFirst, Cap: retryMax, Factor: 2, Jitter: 1, Steps: 1 << 10}
	reflector := cache.NewReflectorWithOptions(f.listerWatcher(r), r.example, r.sink, cache.ReflectorOptions{
		Name:            "podwatch",
		TypeDescription: r.resource.String(),
		Clock:           wakingClock{woken: f.health.woken, done: ctx.Done()},
		Backoff:         &backoff,
	})
	next := backoff
	for ctx.Err() == nil {
		begin := time.Now()
		// What goes wrong is noted where it does: some of it never gets here.
		_ = reflector.ListAndWatchWithContext(ctx)
		if time.Since(begin) > retryMax {
			next = backoff // it was well in between, or has waited enough
		}
		select {
		case <-ctx.Done():
		case <-f.health.woken():
			next = backoff
		case <-time.After(next.Step()):
		}
	}
}

// listerWatcher makes the requests of a reading and notes how they went.
func (f reflection) listerWatcher(r reading) *cache.ListWatch {
	outcome := func(ctx context.Context, verb string, note func(Kind, error), err error) {
		switch {
		case ctx.Err() != nil: // it is us who end
		case err == nil:
			note(r.kind, nil)
		case apierrors.IsResourceExpired(err) || apierrors.IsGone(err):
			note(r.kind, errBehind)
		case r.missing != nil && apierrors.IsNotFound(err):
			f.health.absent(r.kind)
			r.missing()
		default:
			note(r.kind, f.access.explain(verb, r.resource, err))
		}
	}
	return &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			limited, cancel := context.WithTimeout(ctx, answerTimeout)
			defer cancel()
			list, err := r.list(limited, o)
			if err != nil && errors.Is(limited.Err(), context.DeadlineExceeded) {
				err = errNoAnswer
			}
			outcome(ctx, "list", f.health.listed, err)
			return list, err
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			limited, cancel := context.WithCancel(ctx) // lives as long as the watch
			timer := time.AfterFunc(answerTimeout, cancel)
			w, err := r.watch(limited, o)
			if !timer.Stop() {
				if err == nil {
					w.Stop()
				}
				err = errNoAnswer
			}
			if o.SendInitialEvents == nil || !apierrors.IsInvalid(err) { // an older server: a list comes next
				outcome(ctx, "watch", f.health.watching, err)
			}
			if err != nil {
				cancel()
				return nil, err
			}
			return follow(w, cancel, func(e watch.Event) {
				if e.Type == watch.Error {
					outcome(ctx, "watch", f.health.watching, apierrors.FromObject(e.Object))
					return
				}
				f.health.contact(r.kind)
			}), nil
		},
	}
}

// A followedWatch is a watch whose events are seen on their way.
type followedWatch struct {
	events chan watch.Event
	stop   func()
}

// follow passes the events of w on, to see first, and cancels with w.
func follow(w watch.Interface, cancel context.CancelFunc, see func(watch.Event)) followedWatch {
	stopped := make(chan struct{})
	f := followedWatch{events: make(chan watch.Event), stop: sync.OnceFunc(func() {
		close(stopped)
		w.Stop()
		cancel()
	})}
	go func() { // ends with w, which whoever has f stops
		defer close(f.events)
		for e := range w.ResultChan() {
			see(e)
			select {
			case f.events <- e:
			case <-stopped:
				return
			}
		}
	}()
	return f
}

// ResultChan implements watch.Interface.
func (f followedWatch) ResultChan() <-chan watch.Event { return f.events }

// Stop implements watch.Interface.
func (f followedWatch) Stop() { f.stop() }

// A wakingClock is the real clock, but that After does not wait beyond the end,
// or when another kind could be read again: the reflector looks at nothing else
// while it waits to try again.
type wakingClock struct {
	clock.RealClock
	woken func() <-chan struct{}
	done  <-chan struct{}
}

// After implements clock.Clock.
func (c wakingClock) After(d time.Duration) <-chan time.Time {
	passed, woken := make(chan time.Time, 1), c.woken()
	go func() {
		select {
		case <-c.done:
		case <-woken:
		case <-time.After(d):
		}
		passed <- time.Now()
	}()
	return passed
}

// A mirror is the sink of one object, of which only the metadata is of interest.
type mirror struct {
	// changed is called with the object, nil if there is none, first when the
	// server has said which of both it is.
	changed func(*metav1.PartialObjectMetadata)
}

func (m mirror) set(o any) error {
	meta, ok := o.(*metav1.PartialObjectMetadata)
	if !ok {
		return fmt.Errorf("read metadata: is a %T", o)
	}
	m.changed(meta)
	return nil
}

// Add implements cache.ReflectorStore.
func (m mirror) Add(o any) error { return m.set(o) }

// Update implements cache.ReflectorStore.
func (m mirror) Update(o any) error { return m.set(o) }

// Delete implements cache.ReflectorStore.
func (m mirror) Delete(any) error {
	m.changed(nil)
	return nil
}

// Replace implements cache.ReflectorStore.
func (m mirror) Replace(all []any, _ string) error {
	if len(all) == 0 {
		return m.Delete(nil)
	}
	return m.set(all[0])
}

// Resync implements cache.ReflectorStore.
func (m mirror) Resync() error { return nil }
