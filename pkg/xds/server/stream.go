package server

import (
	"cmp"
	"context"
	"fmt"
	"hash/fnv"
	"maps"
	"slices"
	"strconv"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/sluicemesh/sluice/pkg/xds"
)

const (
	// maxNames bounds the bytes of names that a stream may subscribe to,
	// each counted with 64 bytes of overhead.
	maxNames = 32 << 20
	// ackTimeout ends the stream of a client that does not answer; when it
	// is back it says what it has. Until then removed resources are kept for it.
	ackTimeout = time.Minute
)

// An item is a resource in a response.
type item struct {
	name string
	v    *version
	gen  uint64
	// since is zero unless the item is sent because of a change.
	since time.Time
	// empty items stand for names that do not exist.
	empty bool
}

// A flight is a response that was not answered yet; there is at most one per
// type and stream, which bounds what a stream holds and tells to which
// response an error belongs.
type flight struct {
	t       int
	nonce   string
	items   []item
	removed []string
	// all is the whole set (state of the world only) and version its hash.
	all     []*version
	version string
	// upd, whole and rem are the cursors once the client has answered.
	upd, whole, rem uint64
	sent            time.Time
}

// A redo is a resource to be sent, whatever the cursors say.
type redo struct {
	gen uint64
	// at is set for removals that must wait for those who refer to them.
	at time.Time
	// have is the version that the client says it has, on a new stream.
	have string
}

// A sub is what a client wants and has of one type.
type sub struct {
	active   bool
	wildcard bool
	names    bits
	count    int
	// fresh is set until the client, which has only what known says
	// (name -> version), was compared with everything.
	fresh        bool
	known        map[string]string
	knownVersion string // state of the world
	// The client has been sent everything that changed last at or before upd,
	// and has seen all removals up to rem. Of what changed again after upd it
	// may not have the change before: only up to whole it has it all.
	upd, whole, rem uint64
	redo            map[string]redo
	// suspects are parts of a response that was rejected without a name;
	// they are sent one by one.
	suspects [][]string
	flight   *flight
	// blocked is since when something waits for an earlier type.
	blocked time.Time

	sent, acked, nacked uint64
	lastAck             time.Time
}

// advance moves the cursors to where they are once fl was answered.
func (sb *sub) advance(fl *flight) { sb.upd, sb.whole, sb.rem = fl.upd, fl.whole, fl.rem }

// A stream is one client. The server's lock guards it.
type stream struct {
	s       *Server
	pod     *pod
	sotw    bool
	started time.Time
	subs    [numTypes]sub
	nonce   uint64
	bytes   int // of names
	wake    chan struct{}
	// due is when next has to look again, zero if not before it is woken.
	due time.Time
}

// has says whether the client asked for name explicitly.
func (st *stream) has(t int, name string) bool {
	nd := st.s.store.names[t].byName[name]
	return nd != nil && st.subs[t].names.has(nd.num)
}

func (st *stream) subscribe(t int, name string) error {
	sb := &st.subs[t]
	nd := st.s.store.names[t].hold(name)
	if sb.names.has(nd.num) {
		st.s.store.names[t].drop(nd)
		return nil
	}
	sb.names.set(nd.num)
	sb.count++
	if st.bytes += len(name) + 64; st.bytes > maxNames {
		return status.Errorf(codes.ResourceExhausted, "names subscribed to exceed %d bytes", maxNames)
	}
	return nil
}

func (st *stream) unsubscribe(t int, name string) {
	if !st.has(t, name) {
		return
	}
	sb, all := &st.subs[t], &st.s.store.names[t]
	nd := all.byName[name]
	sb.names.clear(nd.num)
	sb.count--
	st.bytes -= len(name) + 64
	delete(sb.redo, name)
	all.drop(nd)
}

// each calls f for each name that the client asked for explicitly.
func (st *stream) each(t int, f func(name string)) {
	sb := &st.subs[t]
	if sb.count == 0 {
		return
	}
	for name, nd := range st.s.store.names[t].byName {
		if sb.names.has(nd.num) {
			f(name)
		}
	}
}

// layers are those that the pod sees, the one that wins first.
func (p *pod) layers() [3]*layer { return [3]*layer{p.own, p.base, p.s.store.shared} }

// resolve returns what the pod shall have under a name: nil and true if it
// exists, but no version of it is fit to be sent.
func (p *pod) resolve(t int, name string) (v *version, gen uint64, exists bool) {
	for _, l := range p.layers() {
		sl := l.types[t].slots[name]
		if sl == nil {
			continue
		}
		gen = max(gen, sl.gen)
		if sl.cur != nil && !exists {
			v, exists = sl.pick(p.ID.UID), true
		}
	}
	return v, gen, exists
}

// recent returns the tombstone of a name that went less than RemoveTimeout ago
// and whose last version can still be had, or nil.
func (p *pod) recent(t int, name string, now time.Time) *slot {
	for _, l := range p.layers() {
		if sl := l.types[t].slots[name]; sl != nil && sl.cur == nil && sl.good != nil && sl.good.usable(p.ID.UID) &&
			now.Sub(sl.at) < p.s.opts.RemoveTimeout {
			return sl
		}
	}
	return nil
}

// last is the generation of the last change of a type that the pod sees.
func (p *pod) last(t int) (gen uint64) {
	for _, l := range p.layers() {
		gen = max(gen, l.types[t].last())
	}
	return gen
}

// settled is the generation up to which the client has answered all of a type.
func (st *stream) settled(t int) uint64 {
	sb := &st.subs[t]
	if sb.fresh {
		return 0
	}
	to := sb.whole
	low := func(gen uint64) {
		if gen > 0 {
			to = min(to, gen-1)
		}
	}
	for _, r := range sb.redo {
		switch {
		case !r.at.IsZero():
		case r.have != "":
			return 0 // how old that is nobody knows
		default:
			low(r.gen)
		}
	}
	if sb.flight != nil {
		for i := range sb.flight.items {
			low(sb.flight.items[i].gen)
		}
	}
	if len(sb.suspects) > 0 {
		return 0
	}
	return to
}

// offered is the generation up to which all of a type was sent to the client.
func (st *stream) offered(t int) uint64 {
	sb := &st.subs[t]
	switch {
	case sb.flight != nil:
		return sb.flight.upd
	case sb.fresh:
		return 0
	}
	return sb.upd
}

// limit is the generation up to which changes of t may be sent: all changes of
// the types that t may refer to were answered up to there.
//
// Endpoints need the cluster's change to be sent only, not answered: Envoy
// answers for clusters once they are warm, for which it needs the endpoints
// (ClusterManagerImpl::updateClusterCounts).
func (st *stream) limit(t int, now time.Time) uint64 {
	sb := &st.subs[t]
	if !sb.blocked.IsZero() && now.Sub(sb.blocked) >= st.s.opts.RemoveTimeout {
		return st.s.store.gen
	}
	limit := st.s.store.gen
	for e := range t {
		switch {
		case !st.subs[e].active:
		case t == endpoints:
			limit = min(limit, st.offered(e))
		default:
			limit = min(limit, st.settled(e))
		}
	}
	return limit
}

// released says whether a removal of generation gen, made at at, may be sent.
// A cluster waits for the listeners and routes that may lead to it; endpoints
// and routes have no removal of their own: their names are given up by the
// client, and only if it holds on to them it hears that they are gone.
func (st *stream) released(t int, gen uint64, at, now time.Time) bool {
	if at.IsZero() || now.Sub(at) >= st.s.opts.RemoveTimeout {
		return true
	}
	if t != clusters {
		return false
	}
	young := now.Sub(st.started) < st.s.opts.RemoveTimeout
	for _, e := range [...]int{listeners, routes} {
		if !st.subs[e].active {
			// A client that reconnects asks for its types one after the other.
			if young {
				st.until(st.started.Add(st.s.opts.RemoveTimeout))
				return false
			}
			continue
		}
		if st.settled(e) < gen {
			return false
		}
	}
	return true
}

func (st *stream) until(at time.Time) {
	if st.due.IsZero() || at.Before(st.due) {
		st.due = at
	}
}

// next returns the next response to send and marks it in flight, or nil when
// there is nothing to do until the stream is woken or st.due.
func (st *stream) next(now time.Time) (*flight, error) {
	st.due = time.Time{}
	if !st.s.ready || !st.pod.present {
		return nil, nil
	}
	// Clusters come twice: whether they may go depends on the types after them.
	for _, t := range [...]int{clusters, endpoints, listeners, routes, clusters} {
		sb := &st.subs[t]
		if fl := sb.flight; fl != nil {
			if now.Sub(fl.sent) >= ackTimeout {
				return nil, status.Errorf(codes.Aborted, "no answer to %s response %s in %s", typeNames[t], fl.nonce, ackTimeout)
			}
			st.until(fl.sent.Add(ackTimeout))
			continue
		}
		if !sb.active {
			continue
		}
		fl := st.build(t, now)
		if fl == nil {
			continue
		}
		st.nonce++
		fl.t, fl.nonce, fl.sent = t, strconv.FormatUint(st.nonce, 10), now
		sb.flight = fl
		sb.sent++
		return fl, nil
	}
	return nil, nil
}

// none is the resource that stands for a name that does not exist, if there is one.
func (st *stream) none(t int, name string) (xds.Resource, bool) {
	if st.s.opts.Empty == nil {
		return xds.Resource{}, false
	}
	return st.s.opts.Empty(typeURLs[t], name)
}

// A batch gathers what goes into one response.
type batch struct {
	st      *stream
	t       int
	fl      *flight
	seen    map[string]bool
	limit   uint64
	blocked bool
}

func (b *batch) once(name string) bool {
	if b.seen[name] {
		return false
	}
	b.seen[name] = true
	return true
}

// absent adds the answer for a name that does not exist, unless the client has it.
func (b *batch) absent(name, have string) {
	if r, ok := b.st.none(b.t, name); ok && b.st.has(b.t, name) {
		if have != r.Version {
			b.fl.items = append(b.fl.items, item{name: name, v: newVersion(r), empty: true})
		}
		return
	}
	b.fl.removed = append(b.fl.removed, name)
}

// build gathers what the client shall have of t and has not, nil if nothing.
func (st *stream) build(t int, now time.Time) *flight {
	sb := &st.subs[t]
	b := &batch{st: st, t: t, fl: &flight{upd: sb.upd, whole: sb.whole, rem: sb.rem}, seen: map[string]bool{}, limit: st.limit(t, now)}
	for len(sb.suspects) > 0 {
		group := sb.suspects[0]
		sb.suspects = sb.suspects[1:]
		for _, name := range group {
			v, gen, _ := st.pod.resolve(t, name)
			if v == nil {
				continue
			}
			b.fl.items = append(b.fl.items, item{name: name, v: v, gen: gen})
			if t == clusters && st.has(endpoints, name) {
				// They may have gone out already, but Envoy needs them after the cluster.
				_, gen, _ := st.pod.resolve(endpoints, name)
				st.subs[endpoints].redo[name] = redo{gen: gen}
			}
		}
		if len(b.fl.items) > 0 {
			return b.fl
		}
	}
	must := false
	switch {
	case sb.fresh && sb.wildcard && st.pod.last(t) > b.limit:
		b.blocked = true
	case sb.fresh:
		must = b.everything(now)
	default:
		b.updates()
		b.removals(now)
	}
	if !sb.fresh {
		b.again(now)
	}
	if !b.blocked {
		sb.blocked = time.Time{}
	} else if sb.blocked.IsZero() {
		sb.blocked = now
	}
	if b.blocked {
		st.until(sb.blocked.Add(st.s.opts.RemoveTimeout))
	}
	if st.sotw {
		return b.world(must, now)
	}
	if len(b.fl.items)+len(b.fl.removed) == 0 && !must {
		sb.advance(b.fl)
		return nil
	}
	slices.SortFunc(b.fl.items, func(a, b item) int { return cmp.Compare(a.name, b.name) })
	slices.Sort(b.fl.removed)
	return b.fl
}

// everything compares the whole view with what the client says that it has,
// and returns whether it must be answered even if there is nothing to say:
// Envoy waits for the first answer to a wildcard.
func (b *batch) everything(now time.Time) (must bool) {
	st, sb, t := b.st, &b.st.subs[b.t], b.t
	sb.fresh = false
	gen := st.s.store.gen
	b.fl.upd, b.fl.whole, b.fl.rem = gen, gen, gen
	if !sb.wildcard {
		return false
	}
	for _, l := range st.pod.layers() {
		for name, sl := range l.types[t].slots {
			if sl.cur == nil || !b.once(name) {
				continue
			}
			v := sl.pick(st.pod.ID.UID)
			switch {
			case v == nil:
			case sb.known[name] == v.res.GetVersion():
				st.s.accept(t, v, now)
			default:
				b.fl.items = append(b.fl.items, item{name: name, v: v, gen: sl.gen})
			}
		}
	}
	for name := range sb.known {
		if _, _, exists := st.pod.resolve(t, name); !exists {
			r := redo{gen: gen, at: now}
			if t == listeners {
				r.at = time.Time{} // nothing refers to a listener
			}
			sb.redo[name] = r
		}
	}
	must = len(sb.known) == 0 && sb.knownVersion == ""
	sb.known = nil
	return must
}

// hidden says whether a layer above has the name.
func hidden(above []*layer, t int, name string) bool {
	for _, l := range above {
		if sl := l.types[t].slots[name]; sl != nil && sl.cur != nil {
			return true
		}
	}
	return false
}

// updates walks the log from its end to what the client has.
func (b *batch) updates() {
	st, sb, t := b.st, &b.st.subs[b.t], b.t
	layers := st.pod.layers()
	for i, l := range layers {
		for e := l.types[t].log.Back(); e != nil; e = e.Prev() {
			sl := e.Value.(*slot)
			if sl.gen <= sb.upd {
				break
			}
			if !sb.wildcard && !sb.names.has(sl.node.num) || hidden(layers[:i], t, sl.node.name) {
				continue
			}
			if sl.gen > b.limit {
				b.blocked = true
				continue
			}
			if !b.once(sl.node.name) {
				continue
			}
			v, gen, exists := st.pod.resolve(t, sl.node.name)
			switch {
			case v != nil:
				b.fl.items = append(b.fl.items, item{name: sl.node.name, v: v, gen: gen, since: sl.since})
				delete(sb.redo, sl.node.name)
			case !exists && t == listeners:
				// With the additions: a new listener may take the address.
				b.fl.removed = append(b.fl.removed, sl.node.name)
				delete(sb.redo, sl.node.name)
			default:
				delete(b.seen, sl.node.name)
			}
		}
	}
	b.fl.upd = max(sb.upd, min(st.s.store.gen, b.limit))
	if !b.blocked {
		b.fl.whole = b.fl.upd
	}
	if t == listeners {
		b.fl.rem = b.fl.upd
	}
}

// removals walks the tombstones that the client has not seen, oldest first.
func (b *batch) removals(now time.Time) {
	st, sb, t := b.st, &b.st.subs[b.t], b.t
	if t == listeners {
		return
	}
	var tombs []tomb
	for _, l := range st.pod.layers() {
		dead := l.types[t].dead
		i, _ := slices.BinarySearchFunc(dead, sb.rem+1, func(d tomb, gen uint64) int { return cmp.Compare(d.gen, gen) })
		for _, d := range dead[i:] {
			if d.sl.cur == nil && d.sl.gen == d.gen && (sb.wildcard || sb.names.has(d.sl.node.num)) {
				tombs = append(tombs, d)
			}
		}
	}
	slices.SortFunc(tombs, func(a, b tomb) int { return cmp.Compare(a.gen, b.gen) })
	rem := st.s.store.gen
	for _, d := range tombs {
		name := d.sl.node.name
		if _, _, exists := st.pod.resolve(t, name); exists {
			continue
		}
		if !st.released(t, d.gen, d.sl.at, now) {
			st.until(d.sl.at.Add(st.s.opts.RemoveTimeout))
			rem = d.gen - 1
			break
		}
		if b.once(name) {
			b.absent(name, "")
		}
	}
	b.fl.rem = max(sb.rem, rem)
}

// again sends what was asked for explicitly or is in doubt.
func (b *batch) again(now time.Time) {
	st, sb, t := b.st, &b.st.subs[b.t], b.t
	for name, r := range sb.redo {
		v, gen, exists := st.pod.resolve(t, name)
		var gone *slot // endpoints that have just gone: what refers to them may still be in use
		if t == endpoints && !exists && r.at.IsZero() && st.has(t, name) {
			gone = st.pod.recent(t, name, now)
		}
		switch {
		case !b.once(name):
		case v != nil && r.have == v.res.GetVersion():
			st.s.accept(t, v, now)
		case v != nil && gen > b.limit:
			b.blocked = true
			continue
		case v != nil:
			b.fl.items = append(b.fl.items, item{name: name, v: v, gen: gen})
		case exists && !st.has(t, name):
			// Rejected in all versions that there are; the client keeps what it has.
		case gone != nil:
			if gone.good.res.GetVersion() != r.have {
				b.fl.items = append(b.fl.items, item{name: name, v: gone.good})
			}
			sb.redo[name] = redo{at: gone.at}
			st.until(gone.at.Add(st.s.opts.RemoveTimeout))
			continue
		case exists || r.at.IsZero() || st.released(t, r.gen, r.at, now):
			b.absent(name, r.have)
		default:
			st.until(r.at.Add(st.s.opts.RemoveTimeout))
			continue
		}
		delete(sb.redo, name)
	}
}

// world turns the changes into the whole set for a client that wants the state
// of the world.
func (b *batch) world(must bool, now time.Time) *flight {
	st, sb, fl := b.st, &b.st.subs[b.t], b.fl
	if b.blocked {
		for _, it := range fl.items { // all or nothing
			sb.redo[it.name] = redo{gen: it.gen}
		}
		for _, name := range fl.removed {
			sb.redo[name] = redo{}
		}
		sb.fresh = sb.fresh || must
		sb.advance(fl)
		return nil
	}
	var all []*version
	add := func(name string) {
		switch v, _, exists := st.pod.resolve(b.t, name); {
		case v != nil:
			all = append(all, v)
		case !exists && st.has(b.t, name):
			if r, ok := st.none(b.t, name); ok {
				all = append(all, newVersion(r))
			}
		}
	}
	if sb.wildcard {
		seen := map[string]bool{}
		for _, l := range st.pod.layers() {
			for name, sl := range l.types[b.t].slots {
				if seen[name] {
					continue
				}
				if _, _, exists := st.pod.resolve(b.t, name); exists {
					seen[name] = true
					add(name)
				} else if sl.gen > fl.rem && sl.good != nil { // not released yet
					seen[name] = true
					all = append(all, sl.good)
				}
			}
		}
	}
	st.each(b.t, func(name string) {
		if !sb.wildcard {
			add(name)
		}
	})
	slices.SortFunc(all, func(a, b *version) int { return cmp.Compare(a.res.GetName(), b.res.GetName()) })
	fl.all, fl.version = all, digest(all)
	known := sb.knownVersion
	sb.knownVersion = ""
	if len(fl.items)+len(fl.removed) == 0 && !must || known == fl.version {
		if known == fl.version {
			for _, v := range all {
				st.s.accept(b.t, v, now)
			}
		}
		sb.advance(fl)
		return nil
	}
	return fl
}

func digest(all []*version) string {
	h := fnv.New64a()
	for _, v := range all {
		_, _ = fmt.Fprintf(h, "%q %q\n", v.res.GetName(), v.res.GetVersion()) // a hash takes everything
	}
	return fmt.Sprintf("%016x", h.Sum64())
}

// answer handles what the client says to the response with that nonce.
func (st *stream) answer(t int, nonce string, nack *string, now time.Time) {
	sb := &st.subs[t]
	fl := sb.flight
	if fl == nil || fl.nonce != nonce {
		return
	}
	sb.flight = nil
	sb.advance(fl)
	if nack == nil {
		sb.acked++
		sb.lastAck = now
		st.s.metrics.acks[t].Inc()
		for i := range fl.items {
			it := &fl.items[i]
			st.s.accept(t, it.v, now)
			if !it.since.IsZero() {
				st.s.metrics.latency[t].Observe(now.Sub(it.since).Seconds())
			}
		}
		return
	}
	sb.nacked++
	st.s.metrics.nacks[t].Inc()
	byName := make(map[string]*item, len(fl.items))
	for i := range fl.items {
		byName[fl.items[i].name] = &fl.items[i]
	}
	bad := parseNACK(*nack, func(name string) bool { return byName[name] != nil })
	named := len(bad) > 0
	if !named && len(fl.items) == 1 {
		bad = []rejection{{fl.items[0].name, *nack}}
	}
	for _, r := range bad {
		it := byName[r.name]
		st.s.reject(st.pod, t, it, r.err, now)
		if !it.empty {
			sb.redo[r.name] = redo{gen: it.gen}
		}
		delete(byName, r.name)
	}
	switch {
	case named && (t == clusters || t == listeners):
		// Envoy has applied the others one by one.
		for _, it := range byName {
			st.s.accept(t, it.v, now)
		}
	case len(bad) > 0:
		for name, it := range byName {
			if !it.empty {
				sb.redo[name] = redo{gen: it.gen}
			}
		}
		st.unremove(fl)
	case st.sotw || len(fl.items) == 0:
		st.s.opts.Log.Error("Envoy rejected a response and named no resource", "pod", st.pod.ID.Namespace+"/"+st.pod.ID.Name,
			"pod_uid", st.pod.ID.UID, "type_url", typeURLs[t], "err", *nack)
	default:
		all := slices.Sorted(maps.Keys(byName))
		sb.suspects = append([][]string{all[:len(all)/2], all[len(all)/2:]}, sb.suspects...)
		st.unremove(fl)
	}
}

// unremove sends removals again that the client may not have made.
func (st *stream) unremove(fl *flight) {
	for _, name := range fl.removed {
		if !st.sotw {
			st.subs[fl.t].redo[name] = redo{}
		}
	}
}

// close gives back what the stream holds.
func (st *stream) close() {
	for t := range st.subs {
		var all []string
		st.each(t, func(name string) { all = append(all, name) })
		for _, name := range all {
			st.unsubscribe(t, name)
		}
	}
}

func (st *stream) poke() {
	select {
	case st.wake <- struct{}{}:
	default:
	}
}

// run sends until the stream ends. failed carries the error of the reader.
func (st *stream) run(ctx context.Context, send func(*flight) error, failed <-chan error) error {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		st.s.mu.Lock()
		fl, err := st.next(time.Now())
		due := st.due
		st.s.mu.Unlock()
		if err != nil {
			return err
		}
		if fl != nil {
			st.s.metrics.pushes[fl.t].Inc()
			if err := send(fl); err != nil {
				return err
			}
			continue
		}
		var alarm <-chan time.Time
		if !due.IsZero() {
			timer.Reset(max(time.Until(due), time.Millisecond))
			alarm = timer.C
		}
		select {
		case <-st.wake:
		case <-alarm:
		case err := <-failed:
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
