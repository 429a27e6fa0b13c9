package podwatch

import (
	"context"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// StoreOptions configure a Store. The zero value is good.
type StoreOptions struct {
	// Quiet is for how long nothing must change before Wait returns; 20 ms if 0.
	Quiet time.Duration
	// MaxDelay bounds how long Wait holds a change back; 200 ms if 0.
	MaxDelay time.Duration
}

// A Change is the new state of one object.
type Change struct {
	Key Key
	// Object is nil if there is no such object any more.
	Object Object
}

// A Batch is what changed between two calls of Wait.
type Batch struct {
	// Keys are sorted and each there once.
	Keys []Key
	// Since is when the earliest of these changes came in.
	Since time.Time
}

// A Store holds objects by key, with the indexes that the agent needs, and
// tells one consumer what changed. It is safe for concurrent use. Objects and
// slices that it returns must not be modified.
type Store struct {
	quiet, maxDelay time.Duration
	synced          chan struct{}
	syncOnce        sync.Once
	// clusterUIDs is set by a source whose UIDs are those that the runtime has.
	clusterUIDs atomic.Bool
	// changed has room for one signal: that pending is not empty.
	changed chan struct{}

	mu      sync.RWMutex
	objects map[Kind]map[nsName]Object
	// lists caches the sorted objects of a kind, as []T, until one of them changes.
	lists     map[Kind]any
	selectors selectorIndex
	slices    map[nsName]map[Key]*EndpointSlice // by service
	parents   map[nsName]map[Key]*HTTPRoute     // by parent service
	backends  map[nsName]map[Key]*HTTPRoute     // by backend service

	pending     map[Key]struct{}
	since, last time.Time
	// updated is closed at the next change; nil while nobody waits for it.
	updated chan struct{}
}

// NewStore returns an empty Store.
func NewStore(o StoreOptions) *Store {
	if o.Quiet == 0 {
		o.Quiet = 20 * time.Millisecond
	}
	if o.MaxDelay == 0 {
		o.MaxDelay = 200 * time.Millisecond
	}
	return &Store{
		quiet: o.Quiet, maxDelay: o.MaxDelay,
		synced:    make(chan struct{}),
		changed:   make(chan struct{}, 1),
		objects:   map[Kind]map[nsName]Object{},
		lists:     map[Kind]any{},
		selectors: newSelectorIndex(),
		slices:    map[nsName]map[Key]*EndpointSlice{},
		parents:   map[nsName]map[Key]*HTTPRoute{},
		backends:  map[nsName]map[Key]*HTTPRoute{},
		pending:   map[Key]struct{}{},
	}
}

// Update makes changes visible, all at once. Objects that equal those the
// Store has, and deletions of objects it has not, are no changes.
func (s *Store) Update(changes []Change) {
	s.mu.Lock()
	defer s.mu.Unlock()
	changed := false
	for _, c := range changes {
		old := s.objects[c.Key.Kind][c.Key.nsName()]
		if old == nil && c.Object == nil || old != nil && c.Object != nil && reflect.DeepEqual(old, c.Object) {
			continue
		}
		s.replace(c.Key, old, c.Object)
		s.pending[c.Key] = struct{}{}
		changed = true
	}
	if !changed {
		return
	}
	s.last = time.Now()
	if s.since.IsZero() {
		s.since = s.last
	}
	s.signal()
	if s.updated != nil {
		close(s.updated)
		s.updated = nil
	}
}

func (s *Store) signal() {
	select {
	case s.changed <- struct{}{}:
	default: // the last signal is still there
	}
}

func (k Key) nsName() nsName { return nsName{k.Namespace, k.Name} }

// replace puts one object and its index entries in place of another; either may be nil.
func (s *Store) replace(k Key, before, after Object) {
	delete(s.lists, k.Kind)
	switch o := before.(type) {
	case *Service:
		s.selectors.remove(k.nsName())
	case *EndpointSlice:
		remove(s.slices, nsName{o.Namespace, o.Service}, k)
	case *HTTPRoute:
		for _, p := range o.Parents {
			remove(s.parents, nsName{p.Namespace, p.Name}, k)
		}
		for n := range o.backends() {
			remove(s.backends, n, k)
		}
	}
	switch o := after.(type) {
	case nil:
		remove(s.objects, k.Kind, k.nsName())
		return
	case *Service:
		s.selectors.put(o)
	case *EndpointSlice:
		insert(s.slices, nsName{o.Namespace, o.Service}, k, o)
	case *HTTPRoute:
		for _, p := range o.Parents {
			insert(s.parents, nsName{p.Namespace, p.Name}, k, o)
		}
		for n := range o.backends() {
			insert(s.backends, n, k, o)
		}
	}
	insert(s.objects, k.Kind, k.nsName(), after)
}

// backends are the services that a route refers to.
func (o *HTTPRoute) backends() map[nsName]struct{} {
	found := map[nsName]struct{}{}
	for _, r := range o.Rules {
		for _, b := range r.Backends {
			if b.Group == "" && b.Kind == string(KindService) {
				found[nsName{b.Namespace, b.Name}] = struct{}{}
			}
		}
	}
	return found
}

// SetSynced says that the source has been read completely once.
func (s *Store) SetSynced() { s.syncOnce.Do(func() { close(s.synced) }) }

// Synced returns a channel that is closed after SetSynced.
func (s *Store) Synced() <-chan struct{} { return s.synced }

// Wait blocks until something changed, and then until nothing changed for
// Quiet or MaxDelay has passed. A change is reported by exactly one Wait; none
// is lost when ctx ends, in which case the error is that of ctx. There must be
// one consumer.
func (s *Store) Wait(ctx context.Context) (Batch, error) {
	select {
	case <-ctx.Done():
		return Batch{}, ctx.Err()
	case <-s.changed:
	}
	for {
		batch, rest := s.take()
		if rest == 0 {
			return batch, nil
		}
		timer := time.NewTimer(rest)
		select {
		case <-ctx.Done():
			timer.Stop()
			s.signal() // for the next Wait
			return Batch{}, ctx.Err()
		case <-timer.C:
		}
	}
}

// take returns what is pending once it is due, else how long that will take.
func (s *Store) take() (Batch, time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	// Changes that come while Wait runs are part of its batch: their signal is spent.
	select {
	case <-s.changed:
	default:
	}
	due := s.last.Add(s.quiet)
	if limit := s.since.Add(s.maxDelay); limit.Before(due) {
		due = limit
	}
	if rest := time.Until(due); rest > 0 {
		return Batch{}, rest
	}
	keys := slices.SortedFunc(maps.Keys(s.pending), compareKeys)
	batch := Batch{Keys: keys, Since: s.since}
	s.pending = map[Key]struct{}{} // not cleared: clearing a map that once was large stays slow
	s.since = time.Time{}
	return batch, 0
}

// Get returns one object.
func (s *Store) Get(k Key) (Object, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	o, ok := s.objects[k.Kind][k.nsName()]
	return o, ok
}

// Get returns one object by its type, for example Get[*Pod](s, "shop", "web").
func Get[T Object](s *Store, namespace, name string) (T, bool) {
	var zero T
	o, ok := s.Get(Key{Kind: kindOf(zero), Namespace: namespace, Name: name})
	if !ok {
		return zero, false
	}
	t, ok := o.(T)
	return t, ok
}

func kindOf(o Object) Kind {
	switch o.(type) {
	case *Node:
		return KindNode
	case *Namespace:
		return KindNamespace
	case *Pod:
		return KindPod
	case *Service:
		return KindService
	case *EndpointSlice:
		return KindEndpointSlice
	case *HTTPRoute:
		return KindHTTPRoute
	}
	return ""
}

// Namespaces returns all namespaces, sorted by name.
func (s *Store) Namespaces() []*Namespace { return list[*Namespace](s) }

// Pods returns all pods, sorted by namespace and name.
func (s *Store) Pods() []*Pod { return list[*Pod](s) }

// Services returns all services, sorted by namespace and name.
func (s *Store) Services() []*Service { return list[*Service](s) }

// EndpointSlices returns all endpoint slices, sorted by namespace and name.
func (s *Store) EndpointSlices() []*EndpointSlice { return list[*EndpointSlice](s) }

// Routes returns all routes, sorted by namespace and name.
func (s *Store) Routes() []*HTTPRoute { return list[*HTTPRoute](s) }

func list[T Object](s *Store) []T {
	var zero T
	kind := kindOf(zero)
	s.mu.RLock()
	sorted, ok := s.lists[kind].([]T)
	s.mu.RUnlock()
	if ok {
		return sorted
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	sorted = make([]T, 0, len(s.objects[kind]))
	for _, o := range s.objects[kind] {
		if t, ok := o.(T); ok {
			sorted = append(sorted, t)
		}
	}
	sortObjects(sorted)
	s.lists[kind] = sorted
	return sorted
}

// SlicesOf returns the endpoint slices of a service, sorted by name.
func (s *Store) SlicesOf(namespace, service string) []*EndpointSlice {
	s.mu.RLock()
	defer s.mu.RUnlock()
	found := slices.Collect(maps.Values(s.slices[nsName{namespace, service}]))
	sortObjects(found)
	return found
}

// RoutesTo returns the routes attached to a service, the oldest first, then
// sorted by namespace and name: the order in which the Gateway API lets them win.
func (s *Store) RoutesTo(namespace, service string) []*HTTPRoute {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return byAge(s.parents[nsName{namespace, service}])
}

// RoutesReferring returns the routes that have a service as a backend, in the
// order of RoutesTo.
func (s *Store) RoutesReferring(namespace, service string) []*HTTPRoute {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return byAge(s.backends[nsName{namespace, service}])
}

func byAge(routes map[Key]*HTTPRoute) []*HTTPRoute {
	found := slices.Collect(maps.Values(routes))
	slices.SortFunc(found, func(a, b *HTTPRoute) int {
		if c := a.Created.Compare(b.Created); c != 0 {
			return c
		}
		return compareKeys(a.Key(), b.Key())
	})
	return found
}

// ServicesSelecting returns the services of the pod's namespace whose selector
// selects it, sorted by name.
func (s *Store) ServicesSelecting(p *Pod) []*Service {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.selectors.selecting(p.Namespace, p.Labels)
}

// WaitPod returns a pod as soon as the Store has it. uid is what the runtime
// knows the pod by: a pod of the same name with another UID, the one before or
// after it, is not it (see IsPod). The error names the pod and wraps that of ctx.
func (s *Store) WaitPod(ctx context.Context, namespace, name, uid string) (*Pod, error) {
	for {
		o, updated := s.objectOrNext(Key{KindPod, namespace, name})
		p, _ := o.(*Pod)
		if p != nil && s.IsPod(p, uid) {
			return p, nil
		}
		select {
		case <-ctx.Done():
			if p != nil {
				return nil, fmt.Errorf("wait for pod %s/%s with UID %s: the source knows only one with UID %s: %w", namespace, name, uid, p.RuntimeUID, ctx.Err())
			}
			return nil, fmt.Errorf("wait for pod %s/%s: not known to the source: %w", namespace, name, ctx.Err())
		case <-updated:
		}
	}
}

// IsPod says whether p is the pod that the runtime knows by this UID. It is if
// the runtime tells none, or if the source's UIDs are not the cluster's: then
// only the name can tell.
func (s *Store) IsPod(p *Pod, uid string) bool {
	return uid == "" || !s.clusterUIDs.Load() || uid == p.RuntimeUID || uid == p.UID
}

// WaitNamespace returns as soon as the Store has the Namespace; an error names it
// when ctx ends before.
func (s *Store) WaitNamespace(ctx context.Context, name string) error {
	for {
		o, updated := s.objectOrNext(Key{Kind: KindNamespace, Name: name})
		if o != nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for namespace %s: not known to the source: %w", name, ctx.Err())
		case <-updated:
		}
	}
}

// objectOrNext returns the object, nil if there is none, and a channel that is
// closed at the next change.
func (s *Store) objectOrNext(key Key) (Object, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.updated == nil {
		s.updated = make(chan struct{})
	}
	return s.objects[key.Kind][nsName{key.Namespace, key.Name}], s.updated
}

// keys returns the keys of all objects of a kind, in no order.
func (s *Store) keys(kind Kind) []Key {
	s.mu.RLock()
	defer s.mu.RUnlock()
	keys := make([]Key, 0, len(s.objects[kind]))
	for n := range s.objects[kind] {
		keys = append(keys, Key{kind, n.namespace, n.name})
	}
	return keys
}
