package server

import (
	"container/list"
	"slices"
	"strings"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"

	"github.com/sluicemesh/sluice/pkg/xds"
)

// The types that are served, in the order in which additions are sent.
const (
	clusters = iota
	endpoints
	listeners
	routes
	numTypes
)

var typeURLs = [numTypes]string{xds.ClusterType, xds.EndpointType, xds.ListenerType, xds.RouteType}

// typeNames are the values of the metrics' label type.
var typeNames = [numTypes]string{"cluster", "endpoint", "listener", "route"}

func typeOf(url string) (t int, ok bool) {
	t = slices.Index(typeURLs[:], url)
	return t, t >= 0
}

// quorum is the number of pods that must reject a version that no pod has
// accepted before it is kept from all pods. It is more than one so that a
// single sidecar, whose pod may belong to anyone, cannot hold up its neighbours.
const quorum = 2

// A version is one state of one resource.
type version struct {
	// res is shared by all responses; marshalling reads it only.
	res      *discovery.Resource
	slot     *slot // nil for what Options.Empty made
	accepted bool
	// rejected is by pod UID and nil as long as nobody rejected it.
	rejected map[string]Rejection
}

func newVersion(r xds.Resource) *version {
	return &version{res: &discovery.Resource{Name: r.Name, Version: r.Version, Resource: r.Body}}
}

// quarantined says that no pod gets the version.
func (v *version) quarantined() bool { return !v.accepted && len(v.rejected) >= quorum }

func (v *version) usable(uid string) bool {
	_, own := v.rejected[uid]
	return !own && !v.quarantined()
}

// A claim is one owner's version of a resource.
type claim struct {
	owner string
	v     *version
}

// A slot is the place of one resource in a layer. It stays for a while after
// the resource has gone (a tombstone), until all streams have seen that.
type slot struct {
	layer *layer
	node  *node
	// claims are sorted by owner; the first one counts.
	claims []claim
	// cur is nil in a tombstone. good is the last version before cur that a
	// pod accepted (before a tombstone: that none rejected), nil if there was none.
	cur, good *version
	gen       uint64    // when cur changed
	since     time.Time // time of the event that changed cur
	at        time.Time // when cur changed
	elem      *list.Element
}

// pick returns the version that the pod shall have, nil if all were rejected.
func (s *slot) pick(uid string) *version {
	switch {
	case s.cur.usable(uid):
		return s.cur
	case s.good != nil && s.good.usable(uid):
		return s.good
	}
	return nil
}

// A tomb is a tombstone's entry in the list of those to be collected.
type tomb struct {
	sl  *slot
	gen uint64
}

// layerType is the part of a layer that holds one type.
type layerType struct {
	slots map[string]*slot
	log   list.List // of *slot, oldest change first
	dead  []tomb    // oldest first; may hold slots that came back
	live  int       // slots with a resource
}

// last is the generation of the last change.
func (lt *layerType) last() uint64 {
	if e := lt.log.Back(); e != nil {
		return e.Value.(*slot).gen
	}
	return 0
}

// A layer is a set of resources: those that all pods share, those of one base,
// or those of one pod.
type layer struct {
	types  [numTypes]layerType
	owners map[string][]key
}

type key struct {
	t    int
	name string
}

func newLayer() *layer {
	l := &layer{owners: map[string][]key{}}
	for t := range l.types {
		l.types[t].slots = map[string]*slot{}
	}
	return l
}

// A node is a name of a resource with its number, by which the streams note
// what their clients asked for.
type node struct {
	name string
	num  int
	refs int // slots and streams
}

// names numbers the names of one type, as densely as it can.
type names struct {
	byName map[string]*node
	free   []int
	next   int
}

func (n *names) hold(name string) *node {
	nd := n.byName[name]
	if nd == nil {
		nd = &node{name: strings.Clone(name), num: n.next}
		if k := len(n.free); k > 0 {
			nd.num, n.free = n.free[k-1], n.free[:k-1]
		} else {
			n.next++
		}
		n.byName[nd.name] = nd
	}
	nd.refs++
	return nd
}

func (n *names) drop(nd *node) {
	if nd.refs--; nd.refs == 0 {
		delete(n.byName, nd.name)
		n.free = append(n.free, nd.num)
	}
}

// bits is a set of numbers of nodes.
type bits []uint64

func (b bits) has(i int) bool { return i/64 < len(b) && b[i/64]&(1<<(i%64)) != 0 }

func (b *bits) set(i int) {
	for i/64 >= len(*b) {
		*b = append(*b, 0)
	}
	(*b)[i/64] |= 1 << (i % 64)
}

func (b bits) clear(i int) { b[i/64] &^= 1 << (i % 64) }

// A store holds the layers and the log of their changes. Its owner locks.
type store struct {
	gen    uint64
	names  [numTypes]names
	shared *layer
	bases  map[string]*layer
}

func newStore() *store {
	st := &store{shared: newLayer(), bases: map[string]*layer{}}
	for t := range st.names {
		st.names[t].byName = map[string]*node{}
	}
	return st
}

func (st *store) base(name string) *layer {
	l := st.bases[name]
	if l == nil {
		l = newLayer()
		st.bases[name] = l
	}
	return l
}

// put replaces what owner has in l and returns whether that changed anything
// that pods see, and the names that some other owner claims too.
func (st *store) put(l *layer, owner string, res []xds.Resource, since, now time.Time) (changed bool, clashes []string) {
	gen := st.gen + 1
	var have []key
	claimed := make(map[key]bool, len(res))
	for _, r := range res {
		t, ok := typeOf(r.TypeURL)
		k := key{t, r.Name}
		if !ok || claimed[k] {
			clashes = append(clashes, r.TypeURL+" "+r.Name)
			continue
		}
		claimed[k] = true
		have = append(have, k)
		sl := st.slot(l, t, r.Name)
		i, found := slices.BinarySearchFunc(sl.claims, owner, func(c claim, o string) int { return strings.Compare(c.owner, o) })
		switch {
		case !found:
			sl.claims = slices.Insert(sl.claims, i, claim{owner, newVersion(r)})
			sl.claims[i].v.slot = sl
		case sl.claims[i].v.res.GetVersion() != r.Version:
			sl.claims[i].v = newVersion(r)
			sl.claims[i].v.slot = sl
		}
		if len(sl.claims) > 1 {
			clashes = append(clashes, r.TypeURL+" "+r.Name)
		}
		changed = st.settle(l, t, sl, gen, since, now) || changed
	}
	for _, k := range l.owners[owner] {
		if claimed[k] {
			continue
		}
		sl := l.types[k.t].slots[k.name]
		sl.claims = slices.DeleteFunc(sl.claims, func(c claim) bool { return c.owner == owner })
		changed = st.settle(l, k.t, sl, gen, since, now) || changed
	}
	if len(have) > 0 {
		l.owners[owner] = have
	} else {
		delete(l.owners, owner)
	}
	if changed {
		st.gen = gen
	}
	return changed, clashes
}

func (st *store) slot(l *layer, t int, name string) *slot {
	sl := l.types[t].slots[name]
	if sl == nil {
		nd := st.names[t].hold(name)
		sl = &slot{layer: l, node: nd}
		sl.elem = l.types[t].log.PushFront(sl)
		l.types[t].slots[nd.name] = sl
	}
	return sl
}

// settle makes the first claim the current version and logs the change, if it is one.
func (st *store) settle(l *layer, t int, sl *slot, gen uint64, since, now time.Time) bool {
	var v *version
	if len(sl.claims) > 0 {
		v = sl.claims[0].v
	}
	old := sl.cur
	switch {
	case old == nil && v == nil:
		return false
	case old != nil && v != nil && old.res.GetVersion() == v.res.GetVersion():
		sl.claims[0].v = old // what pods said of it stays
		return false
	}
	if old != nil && (old.accepted || v == nil && len(old.rejected) == 0) {
		sl.good = old // of a tombstone for those who still need it
	}
	if v != nil && sl.good != nil && sl.good.res.GetVersion() == v.res.GetVersion() {
		v = sl.good
		sl.claims[0].v = v
	}
	sl.cur = v
	st.touch(l, t, sl, gen, since, now)
	switch {
	case v == nil:
		l.types[t].live--
		l.types[t].dead = append(l.types[t].dead, tomb{sl, gen})
	case old == nil:
		l.types[t].live++
	}
	return true
}

// touch makes all streams look at the slot again.
func (st *store) touch(l *layer, t int, sl *slot, gen uint64, since, now time.Time) {
	sl.gen, sl.since, sl.at = gen, since, now
	l.types[t].log.MoveToBack(sl.elem)
}

// cover makes the streams of the pod with layer own look at name again,
// because what lies below own has changed.
func (st *store) cover(own *layer, t int, name string, gen uint64, now time.Time) {
	sl := st.slot(own, t, name)
	st.touch(own, t, sl, gen, time.Time{}, now)
	if sl.cur == nil {
		own.types[t].dead = append(own.types[t].dead, tomb{sl, gen})
	}
}

// sweep forgets the tombstones of l that no stream needs: those of changes up
// to seen[t], not made after at.
func (st *store) sweep(l *layer, seen [numTypes]uint64, at time.Time) {
	for t := range l.types {
		lt := &l.types[t]
		n := 0
		for ; n < len(lt.dead) && lt.dead[n].gen <= seen[t]; n++ {
			sl := lt.dead[n].sl
			if sl.gen == lt.dead[n].gen && sl.at.After(at) {
				break
			}
			if sl.cur == nil && sl.gen == lt.dead[n].gen {
				delete(lt.slots, sl.node.name)
				lt.log.Remove(sl.elem)
				st.names[t].drop(sl.node)
			}
		}
		if n > 0 {
			lt.dead = slices.Delete(lt.dead, 0, n)
		}
	}
}
