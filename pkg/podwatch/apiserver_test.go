package podwatch

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/runtime/serializer/streaming"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
)

// An apiServer speaks list, watch, watch-list, patch and create as an API server
// does, over real connections, and fails on request.
type apiServer struct {
	t       testing.TB
	scheme  *runtime.Scheme
	codecs  serializer.CodecFactory
	address string

	mu      sync.Mutex
	http    *httptest.Server
	objects map[string]map[nsName]runtime.Object // by resource
	log     []event
	version int
	// compacted is the last resource version that is forgotten.
	compacted int
	notify    chan struct{} // closed at the next event
	// cut is closed to end all watches.
	cut chan struct{}

	// Faults.
	noStreaming bool                // watch-list is refused, as older servers do
	unserved    map[string]bool     // resources that there are not
	refuse      map[string]int      // status by "verb resource" or "verb resource namespace/name"
	stall       map[string]chan int // requests wait, by "verb resource"
	protobuf    bool

	requests []string // "verb resource"
	accepted []string // what clients accept
	agents   map[string]bool
	bodies   []string // of patches and creations
}

type event struct {
	version  int
	kind     watch.EventType
	resource string
	object   runtime.Object
}

func newAPIServer(t testing.TB) *apiServer {
	t.Helper()
	s := &apiServer{
		t: t, scheme: runtime.NewScheme(), objects: map[string]map[nsName]runtime.Object{},
		version: 10, notify: make(chan struct{}), cut: make(chan struct{}),
		unserved: map[string]bool{}, refuse: map[string]int{}, stall: map[string]chan int{}, agents: map[string]bool{},
	}
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, discoveryv1.AddToScheme, gatewayv1.Install, metav1.AddMetaToScheme} {
		if err := add(s.scheme); err != nil {
			t.Fatal(err)
		}
	}
	metav1.AddToGroupVersion(s.scheme, schema.GroupVersion{Version: "v1"})
	s.codecs = serializer.NewCodecFactory(s.scheme)
	s.unserved["httproutes"] = true
	s.up()
	t.Cleanup(s.down)
	return s
}

func (s *apiServer) up() {
	s.t.Helper()
	at := s.address
	if at == "" {
		at = "127.0.0.1:0"
	}
	listener, err := net.Listen("tcp", at)
	if err != nil {
		s.t.Fatalf("listen: %v", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.address, s.cut = listener.Addr().String(), make(chan struct{})
	s.http = &httptest.Server{Listener: listener, Config: &http.Server{Handler: s, ReadHeaderTimeout: 5 * time.Second}}
	s.http.Start()
}

func (s *apiServer) down() {
	s.mu.Lock()
	server := s.http
	s.http = nil
	if server != nil {
		close(s.cut) // and stays so: a watch that still comes would keep the server from closing
	}
	s.mu.Unlock()
	if server != nil {
		server.CloseClientConnections()
		server.Close()
	}
}

func (s *apiServer) cutWatches() {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.cut)
	s.cut = make(chan struct{})
}

func (s *apiServer) config() *rest.Config { return &rest.Config{Host: "http://" + s.address} }

// set changes how the server behaves.
func (s *apiServer) set(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}

func resourceOf(o runtime.Object) string {
	switch o := o.(type) {
	case *corev1.Pod:
		return "pods"
	case *corev1.Node:
		return "nodes"
	case *corev1.Namespace:
		return "namespaces"
	case *corev1.Service:
		return "services"
	case *corev1.Event:
		return "events"
	case *discoveryv1.EndpointSlice:
		return "endpointslices"
	case *gatewayv1.HTTPRoute:
		return "httproutes"
	case *metav1.PartialObjectMetadata:
		return strings.ToLower(o.Kind) + "s"
	}
	panic(fmt.Sprintf("no resource of %T", o))
}

// put adds or changes an object.
func (s *apiServer) put(objects ...runtime.Object) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, o := range objects {
		s.store(o.DeepCopyObject())
	}
}

func (s *apiServer) store(o runtime.Object) {
	m, resource := must(meta.Accessor(o)), resourceOf(o)
	kind := watch.Modified
	n := nsName{m.GetNamespace(), m.GetName()}
	if s.objects[resource][n] == nil {
		kind = watch.Added
	}
	s.version++
	m.SetResourceVersion(strconv.Itoa(s.version))
	insert(s.objects, resource, n, o)
	s.append(event{s.version, kind, resource, o})
}

func (s *apiServer) append(e event) {
	s.log = append(s.log, e)
	close(s.notify)
	s.notify = make(chan struct{})
}

// remove deletes an object.
func (s *apiServer) remove(objects ...runtime.Object) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, o := range objects {
		m, resource := must(meta.Accessor(o)), resourceOf(o)
		n := nsName{m.GetNamespace(), m.GetName()}
		old := s.objects[resource][n]
		if old == nil {
			s.t.Errorf("remove %s %v: there is none", resource, n)
			continue
		}
		remove(s.objects, resource, n)
		s.version++
		last := old.DeepCopyObject()
		must(meta.Accessor(last)).SetResourceVersion(strconv.Itoa(s.version))
		s.append(event{s.version, watch.Deleted, resource, last})
	}
}

// compact forgets what happened until now.
func (s *apiServer) compact() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.compacted, s.log = s.version, nil
}

// bookmark tells all watches where they are.
func (s *apiServer) bookmark() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.version++
	s.append(event{version: s.version, kind: watch.Bookmark})
}

// count returns how many requests of "verb resource" there were.
func (s *apiServer) count(request string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, r := range s.requests {
		if r == request {
			n++
		}
	}
	return n
}

func (s *apiServer) sent() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.bodies)
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// A call is one request, taken apart.
type call struct {
	verb, resource, namespace, name string
	options                         metav1.ListOptions
}

func parseCall(r *http.Request) call {
	parts := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
	if parts[0] == "api" {
		parts = parts[2:]
	} else {
		parts = parts[3:]
	}
	var c call
	if parts[0] == "namespaces" && len(parts) > 2 {
		c.namespace, parts = parts[1], parts[2:]
	}
	c.resource = parts[0]
	if len(parts) > 1 {
		c.name = parts[1]
	}
	if len(parts) > 2 {
		c.resource += "/" + parts[2]
	}
	q := r.URL.Query()
	c.options.ResourceVersion, c.options.FieldSelector = q.Get("resourceVersion"), q.Get("fieldSelector")
	if v := q.Get("sendInitialEvents"); v != "" {
		yes := v == "true"
		c.options.SendInitialEvents = &yes
	}
	switch {
	case r.Method == http.MethodPatch:
		c.verb = "patch"
	case r.Method == http.MethodPost:
		c.verb = "create"
	case c.name != "":
		c.verb = "get"
	case q.Get("watch") != "":
		c.verb = "watch"
	default:
		c.verb = "list"
	}
	return c
}

func (s *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c := parseCall(r)
	request := c.verb + " " + c.resource
	s.mu.Lock()
	s.requests = append(s.requests, request)
	s.accepted = append(s.accepted, r.Header.Get("Accept"))
	s.agents[r.UserAgent()] = true
	code := cmp.Or(s.refuse[request], s.refuse[request+" "+c.namespace+"/"+c.name])
	stall, unserved, isDown := s.stall[request], s.unserved[c.resource], s.http == nil
	s.mu.Unlock()
	if isDown { // it came between the end of the other requests and that of the server
		panic(http.ErrAbortHandler)
	}
	if stall != nil {
		select {
		case <-stall:
		case <-r.Context().Done():
			return
		}
	}
	group := schema.GroupResource{Resource: c.resource}
	switch {
	case code == http.StatusForbidden:
		s.fail(w, apierrors.NewForbidden(group, c.name, fmt.Errorf("user cannot %s", request)))
	case code == http.StatusUnauthorized:
		s.fail(w, apierrors.NewUnauthorized("Unauthorized"))
	case code == http.StatusUnprocessableEntity:
		s.fail(w, apierrors.NewInvalid(schema.GroupKind{Kind: "Pod"}, c.name, nil))
	case code != 0:
		s.fail(w, apierrors.NewInternalError(fmt.Errorf("asked to fail with %d", code)))
	case unserved:
		s.fail(w, apierrors.NewNotFound(group, ""))
	case c.verb == "watch" && c.options.SendInitialEvents != nil && s.noStreaming:
		s.fail(w, apierrors.NewInvalid(schema.GroupKind{Kind: "ListOptions"}, "", nil))
	case c.verb == "watch":
		s.watch(w, r, c)
	case c.verb == "list":
		s.list(w, r, c)
	case c.verb == "create":
		s.create(w, r, c)
	case c.verb == "patch":
		s.patch(w, r, c)
	default:
		s.fail(w, apierrors.NewMethodNotSupported(group, c.verb))
	}
}

func (s *apiServer) fail(w http.ResponseWriter, err *apierrors.StatusError) {
	status := err.Status()
	status.Kind, status.APIVersion = "Status", "v1"
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(int(status.Code))
	_ = json.NewEncoder(w).Encode(status)
}

// media is what the client is answered in, and the codec for an object in it.
func (s *apiServer) media(r *http.Request) (runtime.SerializerInfo, string) {
	accept := r.Header.Get("Accept")
	want := "application/json"
	if s.protobuf && strings.Contains(accept, "application/vnd.kubernetes.protobuf") && !strings.Contains(accept, "as=") {
		want = "application/vnd.kubernetes.protobuf"
	}
	info, _ := runtime.SerializerInfoForMediaType(s.codecs.SupportedMediaTypes(), want)
	return info, want
}

func (s *apiServer) encode(info runtime.SerializerInfo, o runtime.Object) []byte {
	o = o.DeepCopyObject()
	kinds, _, err := s.scheme.ObjectKinds(o)
	if err != nil {
		panic(err)
	}
	if _, metadata := o.(*metav1.PartialObjectMetadata); !metadata {
		o.GetObjectKind().SetGroupVersionKind(kinds[0])
	} else {
		o.GetObjectKind().SetGroupVersionKind(metav1.SchemeGroupVersion.WithKind("PartialObjectMetadata"))
		o.GetObjectKind().SetGroupVersionKind(schema.GroupVersionKind{Group: "meta.k8s.io", Version: "v1", Kind: "PartialObjectMetadata"})
	}
	return must(runtime.Encode(info.Serializer, o))
}

func matches(c call, o runtime.Object) bool {
	m := must(meta.Accessor(o))
	if c.namespace != "" && m.GetNamespace() != c.namespace {
		return false
	}
	set := fields.Set{"metadata.name": m.GetName()}
	if p, ok := o.(*corev1.Pod); ok {
		set["spec.nodeName"] = p.Spec.NodeName
	}
	return fields.ParseSelectorOrDie(c.options.FieldSelector).Matches(set)
}

func (s *apiServer) matching(c call) []runtime.Object {
	var found []runtime.Object
	for _, o := range s.objects[c.resource] {
		if matches(c, o) {
			found = append(found, o)
		}
	}
	return found
}

func (s *apiServer) list(w http.ResponseWriter, r *http.Request, c call) {
	s.mu.Lock()
	found, version := s.matching(c), strconv.Itoa(s.version)
	s.mu.Unlock()
	var list runtime.Object
	switch c.resource {
	case "pods":
		list = &corev1.PodList{}
	case "nodes":
		list = &corev1.NodeList{}
	case "namespaces":
		list = &corev1.NamespaceList{}
	case "services":
		list = &corev1.ServiceList{}
	case "endpointslices":
		list = &discoveryv1.EndpointSliceList{}
	case "httproutes":
		list = &gatewayv1.HTTPRouteList{}
	default:
		list = &metav1.PartialObjectMetadataList{}
	}
	if err := meta.SetList(list, found); err != nil {
		panic(err)
	}
	must(meta.ListAccessor(list)).SetResourceVersion(version)
	info, media := s.media(r)
	body := s.encode(info, list)
	w.Header().Set("Content-Type", media)
	_, _ = w.Write(body)
}

func (s *apiServer) watch(w http.ResponseWriter, r *http.Request, c call) {
	info, media := s.media(r)
	if media != "application/json" {
		media += ";stream=watch"
	}
	s.mu.Lock()
	cut, from := s.cut, s.version
	var initial []runtime.Object
	expired := false
	if c.options.SendInitialEvents != nil {
		initial = s.matching(c)
	} else {
		from, _ = strconv.Atoi(c.options.ResourceVersion)
		expired = from < s.compacted
	}
	s.mu.Unlock()
	w.Header().Set("Content-Type", media)
	w.WriteHeader(http.StatusOK)
	flush := func() { w.(http.Flusher).Flush() }
	stream := streaming.NewEncoder(info.StreamSerializer.NewFrameWriter(w), info.StreamSerializer.Serializer)
	send := func(kind watch.EventType, o runtime.Object) bool {
		return stream.Encode(&metav1.WatchEvent{Type: string(kind), Object: runtime.RawExtension{Raw: s.encode(info, o)}}) == nil
	}
	if expired { // is said in the stream
		status := apierrors.NewResourceExpired(fmt.Sprintf("too old resource version: %d", from)).Status()
		send(watch.Error, &status)
		return
	}
	for _, o := range initial {
		send(watch.Added, o)
	}
	if c.options.SendInitialEvents != nil {
		send(watch.Bookmark, bookmarkOf(c.resource, from, map[string]string{metav1.InitialEventsAnnotationKey: "true"}))
	}
	flush()
	for {
		s.mu.Lock()
		i := slices.IndexFunc(s.log, func(e event) bool { return e.version > from })
		var next []event
		if i >= 0 {
			next = slices.Clone(s.log[i:])
		}
		more := s.notify
		s.mu.Unlock()
		for _, e := range next {
			from = e.version
			switch {
			case e.kind == watch.Bookmark:
				send(e.kind, bookmarkOf(c.resource, e.version, nil))
			case e.resource == c.resource && matches(c, e.object):
				send(e.kind, e.object)
			}
		}
		flush()
		select {
		case <-more:
		case <-cut:
			return
		case <-r.Context().Done():
			return
		}
	}
}

// bookmarkOf is an object that says nothing but a version.
func bookmarkOf(resource string, version int, annotations map[string]string) runtime.Object {
	m := metav1.ObjectMeta{ResourceVersion: strconv.Itoa(version), Annotations: annotations}
	switch resource {
	case "pods":
		return &corev1.Pod{ObjectMeta: m}
	case "nodes":
		return &corev1.Node{ObjectMeta: m}
	case "namespaces":
		return &corev1.Namespace{ObjectMeta: m}
	case "services":
		return &corev1.Service{ObjectMeta: m}
	case "endpointslices":
		return &discoveryv1.EndpointSlice{ObjectMeta: m}
	case "httproutes":
		return &gatewayv1.HTTPRoute{ObjectMeta: m}
	}
	return &metav1.PartialObjectMetadata{ObjectMeta: m}
}

func (s *apiServer) create(w http.ResponseWriter, r *http.Request, c call) {
	body, _ := io.ReadAll(r.Body)
	o, _, err := s.codecs.UniversalDeserializer().Decode(body, nil, nil)
	if err != nil {
		s.fail(w, apierrors.NewBadRequest(err.Error()))
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.store(o)
	s.bodies = append(s.bodies, fmt.Sprintf("create %s %s", c.resource, must(json.Marshal(o))))
	info, media := s.media(r)
	w.Header().Set("Content-Type", media)
	w.WriteHeader(http.StatusCreated)
	_, _ = w.Write(s.encode(info, o))
}

// patch merges as far as pods' conditions and events need it.
func (s *apiServer) patch(w http.ResponseWriter, r *http.Request, c call) {
	body, _ := io.ReadAll(r.Body)
	s.mu.Lock()
	defer s.mu.Unlock()
	resource, _, _ := strings.Cut(c.resource, "/")
	old := s.objects[resource][nsName{c.namespace, c.name}]
	group := schema.GroupResource{Resource: resource}
	if old == nil {
		s.fail(w, apierrors.NewNotFound(group, c.name))
		return
	}
	var o runtime.Object
	switch old := old.DeepCopyObject().(type) {
	case *corev1.Pod:
		var patch conditionPatch
		if err := json.Unmarshal(body, &patch); err != nil {
			s.fail(w, apierrors.NewBadRequest(err.Error()))
			return
		}
		if patch.Metadata.UID != string(old.UID) {
			s.fail(w, apierrors.NewConflict(group, c.name, fmt.Errorf("precondition failed: UID in precondition: %s, UID in object meta: %s", patch.Metadata.UID, old.UID)))
			return
		}
		for _, p := range patch.Status.Conditions {
			i := slices.IndexFunc(old.Status.Conditions, func(c corev1.PodCondition) bool { return string(c.Type) == p.Type })
			if i < 0 {
				i = len(old.Status.Conditions)
				old.Status.Conditions = append(old.Status.Conditions, corev1.PodCondition{Type: corev1.PodConditionType(p.Type)})
			}
			to := &old.Status.Conditions[i]
			to.Status, to.Reason, to.Message = corev1.ConditionStatus(p.Status), p.Reason, p.Message
			if p.LastTransitionTime != nil {
				to.LastTransitionTime = *p.LastTransitionTime
			}
		}
		o = old
	case *corev1.Event:
		var patch eventPatch
		if err := json.Unmarshal(body, &patch); err != nil {
			s.fail(w, apierrors.NewBadRequest(err.Error()))
			return
		}
		old.Count, old.LastTimestamp = patch.Count, patch.LastTimestamp
		o = old
	}
	s.store(o)
	s.bodies = append(s.bodies, "patch "+c.resource+" "+string(body))
	info, media := s.media(r)
	w.Header().Set("Content-Type", media)
	_, _ = w.Write(s.encode(info, o))
}
