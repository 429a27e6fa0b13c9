package podwatch

import (
	"fmt"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"k8s.io/client-go/tools/cache"
)

// An item is an object of the API server, converted. It passes through
// client-go's machinery in place of the original, so that no list of originals
// is ever held.
type item struct {
	object   Object
	problems field.ErrorList
	// condition is what the pod's status has of ours, nil if nothing.
	condition *knownCondition
}

// GetObjectMeta implements metav1.ObjectMetaAccessor.
func (i *item) GetObjectMeta() metav1.Object {
	k := i.object.Key()
	return &metav1.ObjectMeta{Namespace: k.Namespace, Name: k.Name}
}

// A sink puts one kind of objects into the Store.
type sink struct {
	kind    Kind
	store   *Store
	convert func(runtime.Object) (*item, error)
	// committed is called after objects came (keys with items) or went (nil).
	committed func(map[Key]*item)
	// replaced is called after a complete list.
	replaced func()
}

var _ cache.TransformingStore = (*sink)(nil)

// Transformer implements cache.TransformingStore. It runs while a list is still
// being streamed.
func (s *sink) Transformer() cache.TransformFunc {
	return func(o any) (any, error) { return s.item(o) }
}

func (s *sink) item(o any) (*item, error) {
	switch o := o.(type) {
	case *item:
		return o, nil
	case runtime.Object:
		return s.convert(o)
	}
	return nil, fmt.Errorf("read %s: is a %T", s.kind, o)
}

// Add implements cache.ReflectorStore.
func (s *sink) Add(o any) error {
	i, err := s.item(o)
	if err != nil {
		return err
	}
	s.commit(map[Key]*item{i.object.Key(): i})
	return nil
}

// Update implements cache.ReflectorStore.
func (s *sink) Update(o any) error { return s.Add(o) }

// Delete implements cache.ReflectorStore.
func (s *sink) Delete(o any) error {
	i, err := s.item(o)
	if err != nil {
		return err
	}
	s.commit(map[Key]*item{i.object.Key(): nil})
	return nil
}

// Replace implements cache.ReflectorStore: objects that are not in the list were
// deleted while nobody looked, and those that are unchanged are no change.
func (s *sink) Replace(all []any, _ string) error {
	items := make(map[Key]*item, len(all))
	for n, o := range all {
		i, err := s.item(o)
		if err != nil {
			return err
		}
		items[i.object.Key()] = i
		all[n] = nil // the original is not needed any more
	}
	for _, k := range s.store.keys(s.kind) {
		if _, ok := items[k]; !ok {
			items[k] = nil
		}
	}
	s.commit(items)
	s.replaced()
	return nil
}

func (s *sink) commit(items map[Key]*item) {
	changes := make([]Change, 0, len(items))
	for k, i := range items {
		c := Change{Key: k}
		if i != nil {
			c.Object = i.object
		}
		changes = append(changes, c)
	}
	s.committed(items)
	s.store.Update(changes)
}

// Resync implements cache.ReflectorStore.
func (s *sink) Resync() error { return nil }

// An interner lets equal strings share their memory. It belongs to one
// goroutine.
type interner map[string]string

// maxInterned bounds how many strings are known, in case that they never repeat.
const maxInterned = 10_000

func (n interner) string(s string) string {
	if known, ok := n[s]; ok {
		return known
	}
	if len(n) >= maxInterned {
		clear(n)
	}
	s = strings.Clone(s) // it may be a part of something large
	n[s] = s
	return s
}

func (n interner) strings(list []string) {
	for i := range list {
		list[i] = n.string(list[i])
	}
}
