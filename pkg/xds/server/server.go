package server

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	grpcpeer "google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/sluicemesh/sluice/pkg/xds"
)

// Options are the options of a Server.
type Options struct {
	// Log must be set.
	Log *slog.Logger
	// Socket is the address of the unix socket; a leading @ makes it
	// abstract. Empty means @sluice/xds.
	Socket string
	// RemoveTimeout is how long a removal waits for those who refer to the
	// resource, and how long an addition waits for what it may refer to.
	// 0 means 5 s.
	RemoveTimeout time.Duration
	// InNetns runs f in the network namespace at path. nil allows Open
	// without a path only.
	InNetns func(path string, f func() error) error
	// Empty makes the answer for a name that is subscribed to and does not
	// exist; false, as nil, answers that it does not exist. Envoy waits for
	// endpoints and routes until it is answered, and ignores that answer.
	Empty func(typeURL, name string) (xds.Resource, bool)
	// IsProxy, if not nil, is asked of every connection to the socket of the pod
	// uid from a process of the right user whether that process is the pod's
	// proxy. Connections that it denies end, also when it does so later, at an
	// Open of the pod.
	IsProxy func(uid string, c syscall.Conn) bool
	// Refused, if not nil, is told that connections to the socket of the pod uid
	// are refused because of who they come from, at most once a second for each
	// pod. It must return at once.
	Refused func(uid string)
}

// A Pod names a pod and says what it sees.
type Pod struct {
	UID, Namespace, Name string
	// Base is the owner, one that begins with "base/", whose resources the
	// pod sees beside those of the owners that are no base. Empty means none.
	Base string
}

// A pod is what is known of one pod.
type pod struct {
	s         *Server
	ID        Pod
	present   bool // SetPod was called
	own, base *layer
	streams   map[*stream]struct{}
	rejected  map[key]Rejection
}

// A Server serves the Envoys of one node. All methods are safe for concurrent use.
type Server struct {
	opts    Options
	metrics *metrics
	grpc    *grpc.Server
	serving sync.WaitGroup // goroutines of sockets and streams

	mu      sync.Mutex // guards what follows and all streams
	ready   bool
	store   *store
	pods    map[string]*pod
	streams map[*stream]struct{}

	socketsMu sync.Mutex // taken before mu
	sockets   map[string]*socket
	stopped   bool
}

// New makes a server that listens nowhere yet and serves nothing before
// SetReady and a pod's SetPod: clients that are earlier wait.
func New(opts Options) (*Server, error) {
	if opts.Log == nil {
		return nil, fmt.Errorf("make xDS server: no Log")
	}
	if opts.RemoveTimeout < 0 {
		return nil, fmt.Errorf("make xDS server: RemoveTimeout %s is negative", opts.RemoveTimeout)
	}
	opts.Socket = cmp.Or(opts.Socket, "@sluice/xds")
	opts.RemoveTimeout = cmp.Or(opts.RemoveTimeout, 5*time.Second)
	if opts.InNetns == nil {
		opts.InNetns = func(path string, _ func() error) error {
			return fmt.Errorf("enter netns %s: no InNetns", path)
		}
	}
	s := &Server{opts: opts, store: newStore(), pods: map[string]*pod{}, streams: map[*stream]struct{}{}, sockets: map[string]*socket{}}
	s.metrics = newMetrics(s)
	s.grpc = grpc.NewServer(
		// A client that reconnects lists all that it has in one message.
		grpc.MaxRecvMsgSize(32<<20),
		grpc.MaxSendMsgSize(math.MaxInt32),
		grpc.MaxConcurrentStreams(4),
		grpc.ConnectionTimeout(10*time.Second),
		grpc.WaitForHandlers(true),
	)
	discovery.RegisterAggregatedDiscoveryServiceServer(s.grpc, ads{s: s})
	return s, nil
}

// Run waits until ctx is done and then closes all sockets and streams. The
// server cannot be used again.
func (s *Server) Run(ctx context.Context) error {
	<-ctx.Done()
	s.socketsMu.Lock()
	s.stopped = true
	s.socketsMu.Unlock()
	s.grpc.Stop() // GracefulStop would wait for streams, which never end by themselves
	s.serving.Wait()
	return nil
}

// Register registers the server's metrics.
func (s *Server) Register(r prometheus.Registerer) error {
	for _, c := range s.metrics.all {
		if err := r.Register(c); err != nil {
			return fmt.Errorf("register metrics of the xDS server: %w", err)
		}
	}
	return nil
}

// SetReady says that everything was set for the first time.
func (s *Server) SetReady() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ready = true
	s.wake(s.streams)
}

// SetShared replaces what owner contributes to all pods of the node, or, if
// owner begins with "base/", to those that name it in their Pod. No
// resources remove the owner. since is the time of the event at the source
// that led here.
//
// A name belongs to one owner; should several claim it, the first by name has
// it, and an error is logged.
func (s *Server) SetShared(owner string, res []xds.Resource, since time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sweep()
	l := s.store.shared
	if strings.HasPrefix(owner, "base/") {
		l = s.store.base(owner)
	}
	if s.put(l, owner, res, since) {
		s.wake(s.streams)
	}
}

// SetPod makes the pod known and replaces its private resources, which hide
// shared ones of the same type and name.
func (s *Server) SetPod(id Pod, res []xds.Resource, since time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sweep()
	p := s.pod(id.UID)
	if old := p.base; p.ID.Base != id.Base || !p.present {
		p.base = s.store.base(id.Base)
		s.rebase(p, old)
	}
	p.ID, p.present = id, true
	s.put(p.own, id.UID, res, since)
	s.wake(p.streams)
}

// rebase logs what the change from old to p.base changes for the pod.
func (s *Server) rebase(p *pod, old *layer) {
	now, gen := time.Now(), s.store.gen+1
	for t := range typeURLs {
		for _, l := range [...]*layer{old, p.base} {
			for name := range l.types[t].slots {
				a, b := old.types[t].slots[name], p.base.types[t].slots[name]
				if a == nil || b == nil || a.cur == nil || b.cur == nil || a.cur.res.GetVersion() != b.cur.res.GetVersion() {
					s.store.cover(p.own, t, name, gen, now)
					s.store.gen = gen
				}
			}
		}
	}
}

// RemovePod forgets the pod's private resources. Its streams get nothing more;
// ClosePod ends them.
func (s *Server) RemovePod(uid string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.pods[uid]
	if p == nil {
		return
	}
	s.put(p.own, uid, nil, time.Time{})
	p.present = false
	s.forget(p)
}

// pod returns the pod, which is made if need be.
func (s *Server) pod(uid string) *pod {
	p := s.pods[uid]
	if p == nil {
		p = &pod{s: s, ID: Pod{UID: uid}, own: newLayer(), base: s.store.base(""), streams: map[*stream]struct{}{}, rejected: map[key]Rejection{}}
		s.pods[uid] = p
	}
	return p
}

// forget drops a pod that is neither known nor connected.
func (s *Server) forget(p *pod) {
	if !p.present && len(p.streams) == 0 {
		s.store.sweep(p.own, everything(), time.Now())
		delete(s.pods, p.ID.UID)
	}
}

func (s *Server) put(l *layer, owner string, res []xds.Resource, since time.Time) bool {
	changed, clashes := s.store.put(l, owner, res, since, time.Now())
	if len(clashes) > 0 {
		s.opts.Log.Error("resources with an unknown type, or that another owner has too", "owner", owner, "resources", clashes)
	}
	return changed
}

func (s *Server) wake(streams map[*stream]struct{}) {
	for st := range streams {
		st.poke()
	}
}

// layers iterates over all layers.
func (s *Server) layers(yield func(*layer) bool) {
	if !yield(s.store.shared) {
		return
	}
	for _, l := range s.store.bases {
		if !yield(l) {
			return
		}
	}
	for _, p := range s.pods {
		if !yield(p.own) {
			return
		}
	}
}

func everything() (seen [numTypes]uint64) {
	for t := range seen {
		seen[t] = math.MaxUint64
	}
	return seen
}

// sweep forgets tombstones that all streams have seen.
func (s *Server) sweep() {
	all, at := everything(), time.Now().Add(-s.opts.RemoveTimeout)
	for _, p := range s.pods {
		seen := everything()
		for st := range p.streams {
			for t := range st.subs {
				if sb := &st.subs[t]; sb.active && !sb.fresh {
					seen[t] = min(seen[t], sb.upd, sb.rem)
				}
			}
		}
		for t := range seen {
			all[t] = min(all[t], seen[t])
		}
		s.store.sweep(p.own, seen, at)
	}
	s.store.sweep(s.store.shared, all, at)
	for _, l := range s.store.bases {
		s.store.sweep(l, all, at)
	}
}

// accept notes that a pod has accepted a version.
func (s *Server) accept(t int, v *version, now time.Time) {
	lifted := v.quarantined()
	v.accepted = true
	sl := v.slot
	if sl == nil {
		return
	}
	if sl.cur != v && sl.good == nil {
		sl.good = v // accepted after it was replaced
	}
	if lifted && sl.cur == v {
		s.store.gen++
		s.store.touch(sl.layer, t, sl, s.store.gen, time.Time{}, now)
		s.wake(s.streams)
	}
}

// current is the newest version that the pod would have if it had accepted it.
func (p *pod) current(t int, name string) *version {
	for _, l := range p.layers() {
		if sl := l.types[t].slots[name]; sl != nil && sl.cur != nil {
			return sl.cur
		}
	}
	return nil
}

// reject notes that a pod has rejected a version.
func (s *Server) reject(p *pod, t int, it *item, text string, now time.Time) {
	r := Rejection{TypeURL: typeURLs[t], Name: it.name, Version: it.v.res.GetVersion(), Error: cmp.Or(text, "no reason given"), Time: now}
	first := len(it.v.rejected) == 0
	if it.v.rejected == nil {
		it.v.rejected = map[string]Rejection{}
	}
	it.v.rejected[p.ID.UID] = r
	p.rejected[key{t, it.name}] = r
	log := s.opts.Log.Debug
	if first {
		log = s.opts.Log.Error
	}
	log("Envoy rejected a resource; its last good version stays", "pod", p.ID.Namespace+"/"+p.ID.Name, "pod_uid", p.ID.UID,
		"type_url", r.TypeURL, "name", r.Name, "version", r.Version, "err", r.Error)
}

// quarantined counts the resources whose newest version some pod rejected.
func (s *Server) quarantined() int {
	seen := map[*version]bool{}
	for _, p := range s.pods {
		for k := range p.rejections {
			seen[p.current(k.t, k.name)] = true
		}
	}
	return len(seen)
}

// rejections iterates over the rejections that still stand.
func (p *pod) rejections(yield func(key, Rejection) bool) {
	for k, r := range p.rejected {
		cur := p.current(k.t, k.name)
		if cur == nil || cur.rejected[p.ID.UID].Error == "" {
			delete(p.rejected, k)
		} else if !yield(k, r) {
			return
		}
	}
}

// ads implements the discovery service.
type ads struct {
	discovery.UnimplementedAggregatedDiscoveryServiceServer
	s *Server
}

// open makes the stream of the pod that ctx came from.
func (s *Server) open(ctx context.Context, sotw bool) (*stream, *conn, error) {
	pr, ok := grpcpeer.FromContext(ctx)
	if !ok {
		return nil, nil, status.Error(codes.Unauthenticated, "no peer")
	}
	addr, ok := pr.Addr.(podAddr)
	if !ok {
		return nil, nil, status.Error(codes.Unauthenticated, "not a pod's socket")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.attach(addr.conn.sock.uid, sotw), addr.conn, nil
}

// attach makes a stream; it is registered before it computes anything, so that
// no change is lost in between.
func (s *Server) attach(uid string, sotw bool) *stream {
	p := s.pod(uid)
	st := &stream{s: s, pod: p, sotw: sotw, started: time.Now(), wake: make(chan struct{}, 1)}
	for t := range st.subs {
		st.subs[t].redo = map[string]redo{}
	}
	p.streams[st] = struct{}{}
	s.streams[st] = struct{}{}
	return st
}

func (s *Server) detach(st *stream) {
	st.close()
	delete(st.pod.streams, st)
	delete(s.streams, st)
	s.forget(st.pod)
}

// serve runs a stream: recv reads and handles one request, send sends one response.
func (s *Server) serve(ctx context.Context, sotw bool, recv func(*stream) error, send func(*flight) error) error {
	st, c, err := s.open(ctx, sotw)
	if err != nil {
		return err
	}
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.detach(st)
	}()
	failed := make(chan error, 1)
	s.serving.Go(func() { // ends with the stream: its context ends when this function has returned
		for {
			if err := recv(st); err != nil {
				failed <- err
				return
			}
			st.poke()
		}
	})
	return st.run(ctx, func(fl *flight) error {
		// Send waits while the client does not read.
		guard := time.AfterFunc(ackTimeout, func() { _ = c.UnixConn.Close() })
		defer guard.Stop()
		return send(fl)
	}, failed)
}

// DeltaAggregatedResources implements the discovery service.
func (a ads) DeltaAggregatedResources(g grpc.BidiStreamingServer[discovery.DeltaDiscoveryRequest, discovery.DeltaDiscoveryResponse]) error {
	return a.s.serve(g.Context(), false, func(st *stream) error {
		req, err := g.Recv()
		if err != nil {
			return err
		}
		a.s.mu.Lock()
		defer a.s.mu.Unlock()
		return st.onDelta(req, time.Now())
	}, func(fl *flight) error { return g.Send(deltaResponse(fl)) })
}

func deltaResponse(fl *flight) *discovery.DeltaDiscoveryResponse {
	resp := &discovery.DeltaDiscoveryResponse{
		TypeUrl: typeURLs[fl.t], Nonce: fl.nonce, RemovedResources: fl.removed,
		Resources: make([]*discovery.Resource, len(fl.items)), ControlPlane: &core.ControlPlane{Identifier: "sluice"},
	}
	for i := range fl.items {
		resp.Resources[i] = fl.items[i].v.res
	}
	return resp
}

// StreamAggregatedResources implements the discovery service.
func (a ads) StreamAggregatedResources(g grpc.BidiStreamingServer[discovery.DiscoveryRequest, discovery.DiscoveryResponse]) error {
	return a.s.serve(g.Context(), true, func(st *stream) error {
		req, err := g.Recv()
		if err != nil {
			return err
		}
		a.s.mu.Lock()
		defer a.s.mu.Unlock()
		return st.onWorld(req, time.Now())
	}, func(fl *flight) error { return g.Send(worldResponse(fl)) })
}

func worldResponse(fl *flight) *discovery.DiscoveryResponse {
	resp := &discovery.DiscoveryResponse{
		TypeUrl: typeURLs[fl.t], Nonce: fl.nonce, VersionInfo: fl.version,
		ControlPlane: &core.ControlPlane{Identifier: "sluice"},
	}
	for _, v := range fl.all {
		resp.Resources = append(resp.Resources, v.res.GetResource())
	}
	return resp
}

// want makes the stream answer for name; have is the version that the client
// says it has.
func (st *stream) want(t int, name, have string) {
	_, gen, _ := st.pod.resolve(t, name)
	st.subs[t].redo[name] = redo{gen: gen, have: have}
}

// onDelta handles a request of the incremental protocol.
func (st *stream) onDelta(req *discovery.DeltaDiscoveryRequest, now time.Time) error {
	t, ok := typeOf(req.GetTypeUrl())
	if !ok {
		st.s.opts.Log.Debug("request for a type that is not served", "pod_uid", st.pod.ID.UID, "type_url", req.GetTypeUrl())
		return nil
	}
	sb := &st.subs[t]
	if req.GetResponseNonce() != "" {
		var nack *string
		if d := req.GetErrorDetail(); d != nil {
			nack = &d.Message
		}
		st.answer(t, req.GetResponseNonce(), nack, now)
	}
	subscribe := req.GetResourceNamesSubscribe()
	known := req.GetInitialResourceVersions()
	if !sb.active {
		sb.active, sb.fresh, sb.known = true, true, known
		// Without names a first request for clusters or listeners means all.
		sb.wildcard = len(subscribe) == 0 && (t == clusters || t == listeners)
	} else {
		known = nil
	}
	for _, name := range subscribe {
		if name == "*" {
			if !sb.wildcard {
				sb.wildcard, sb.fresh = true, true
			}
			continue
		}
		if err := st.subscribe(t, name); err != nil {
			return err
		}
		st.want(t, name, known[name])
	}
	for _, name := range req.GetResourceNamesUnsubscribe() {
		if name == "*" {
			sb.wildcard = false
			continue
		}
		asked := st.has(t, name)
		st.unsubscribe(t, name)
		if asked && sb.wildcard {
			st.want(t, name, "") // the client must hear that it still has it, or not
		}
	}
	return nil
}

// onWorld handles a request of the state-of-the-world protocol.
func (st *stream) onWorld(req *discovery.DiscoveryRequest, now time.Time) error {
	t, ok := typeOf(req.GetTypeUrl())
	if !ok {
		st.s.opts.Log.Debug("request for a type that is not served", "pod_uid", st.pod.ID.UID, "type_url", req.GetTypeUrl())
		return nil
	}
	sb := &st.subs[t]
	if sb.active {
		if sb.flight != nil && sb.flight.nonce != req.GetResponseNonce() {
			return nil // the answer to what is in flight will say it all again
		}
		var nack *string
		if d := req.GetErrorDetail(); d != nil {
			nack = &d.Message
		}
		st.answer(t, req.GetResponseNonce(), nack, now)
	} else {
		sb.active, sb.fresh, sb.knownVersion = true, true, req.GetVersionInfo()
		sb.wildcard = len(req.GetResourceNames()) == 0 && (t == clusters || t == listeners)
	}
	listed := make(map[string]bool, len(req.GetResourceNames()))
	for _, name := range req.GetResourceNames() {
		listed[name] = true
		switch {
		case name == "*":
			if !sb.wildcard {
				sb.wildcard, sb.fresh = true, true
			}
		case !st.has(t, name):
			if err := st.subscribe(t, name); err != nil {
				return err
			}
			st.want(t, name, "")
		}
	}
	if len(listed) > 0 {
		sb.wildcard = sb.wildcard && listed["*"]
	}
	var gone []string
	st.each(t, func(name string) {
		if !listed[name] {
			gone = append(gone, name)
		}
	})
	for _, name := range gone {
		st.unsubscribe(t, name)
	}
	return nil
}

// A Rejection is a version of a resource that an Envoy has rejected.
type Rejection struct {
	TypeURL, Name, Version string
	// Error is Envoy's text.
	Error string
	Time  time.Time
}

// A PodStatus says how far one pod is.
type PodStatus struct {
	Pod Pod
	// Known is set once SetPod was called.
	Known bool
	// Streams is the number of the pod's streams.
	Streams int
	// Types are those that the newest stream subscribed to.
	Types []TypeStatus
	// Rejected are the resources whose newest version the pod does not have.
	Rejected []Rejection
}

// A TypeStatus says how far one stream is with one type.
type TypeStatus struct {
	// Type is cluster, endpoint, listener or route.
	Type string
	// Wildcard is set if the stream gets all; Names counts those that it
	// asked for by name.
	Wildcard bool
	Names    int
	// Sent, Acked and Nacked count responses.
	Sent, Acked, Nacked uint64
	// Synced is set when nothing is left to send or to be answered.
	Synced bool
	// LastAck is zero before the first.
	LastAck time.Time
}

// Status returns the state of all pods, sorted by UID.
func (s *Server) Status() []PodStatus {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []PodStatus
	for _, p := range s.pods {
		ps := PodStatus{Pod: p.ID, Known: p.present, Streams: len(p.streams)}
		var newest *stream
		for st := range p.streams {
			if newest == nil || st.started.After(newest.started) {
				newest = st
			}
		}
		if newest != nil {
			for t := range newest.subs {
				if sb := &newest.subs[t]; sb.active {
					ps.Types = append(ps.Types, TypeStatus{
						Type: typeNames[t], Wildcard: sb.wildcard, Names: sb.count, Sent: sb.sent, Acked: sb.acked, Nacked: sb.nacked, LastAck: sb.lastAck,
						Synced: s.ready && p.present && sb.flight == nil && !sb.fresh && len(sb.redo)+len(sb.suspects) == 0 && sb.upd == s.store.gen,
					})
				}
			}
		}
		for _, r := range p.rejections {
			ps.Rejected = append(ps.Rejected, r)
		}
		slices.SortFunc(ps.Rejected, func(a, b Rejection) int {
			return cmp.Or(cmp.Compare(a.TypeURL, b.TypeURL), cmp.Compare(a.Name, b.Name))
		})
		all = append(all, ps)
	}
	slices.SortFunc(all, func(a, b PodStatus) int { return cmp.Compare(a.Pod.UID, b.Pod.UID) })
	return all
}
