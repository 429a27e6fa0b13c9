package podwatch

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
)

// KindCRD is the kind in Health that stands for whether there are HTTPRoutes in
// the cluster at all. A Store never has it.
const KindCRD Kind = "CustomResourceDefinition"

// routeCRD is the name of what defines HTTPRoutes.
const routeCRD = "httproutes.gateway.networking.k8s.io"

// KubernetesOptions configure a Kubernetes.
type KubernetesOptions struct {
	// Kubeconfig is the file that says how to reach the API server. Empty: as a
	// pod of the cluster does, with its service account.
	Kubeconfig string
	Store      *Store
	// Node is the name of this node. Pods of others are not read.
	Node string
	// Log gets each problem once when it comes and once when it goes; nil discards.
	Log *slog.Logger
	// Version is for the user agent, "sluice-agent/<version>".
	Version string
}

// Kubernetes fills a Store from the API server: this node's pods, the node
// itself, and all Namespaces, Services, EndpointSlices and HTTPRoutes.
type Kubernetes struct {
	store      *Store
	node       string
	log        *slog.Logger
	access     *access
	health     *health
	reflection reflection
	conditions *conditions

	mu       sync.Mutex
	problems map[Key][]Problem
}

// NewKubernetes returns a Kubernetes; Run does the work. It sends nothing: the
// error is about the options or the kubeconfig, not the API server.
func NewKubernetes(o KubernetesOptions) (*Kubernetes, error) {
	config, err := loadConfig(o.Kubeconfig)
	if err != nil {
		return nil, err
	}
	return newKubernetes(o, config, retryFirst)
}

func newKubernetes(o KubernetesOptions, config *rest.Config, retry time.Duration) (*Kubernetes, error) {
	switch {
	case o.Store == nil:
		return nil, errors.New("kubernetes source: no store given")
	case o.Node == "":
		return nil, errors.New("kubernetes source: no name of this node given")
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	access, err := newAccess(config, "sluice-agent/"+cmp.Or(o.Version, "unknown"))
	if err != nil {
		return nil, err
	}
	o.Store.clusterUIDs.Store(true)
	h := newHealth(o.Log)
	return &Kubernetes{
		store: o.Store, node: o.Node, log: o.Log, access: access, health: h,
		reflection: reflection{access: access, health: h, retryFirst: retry},
		conditions: newConditions(),
		problems:   map[Key][]Problem{},
	}, nil
}

// Run reads everything, marks the Store as synced, and follows changes until
// ctx ends, then returns nil. While the API server does not answer or refuses,
// the Store keeps its last state and Run goes on trying. It may be called once.
func (k *Kubernetes) Run(ctx context.Context) error {
	ctx = withKlog(ctx, k.log)
	var wg sync.WaitGroup
	readings := k.readings()
	k.health.add(KindCRD)
	for _, r := range readings { // all of them before any of them can be the last
		k.health.add(r.kind)
	}
	for _, r := range readings {
		wg.Go(func() { k.reflection.run(ctx, r) })
	}
	k.followRoutes(ctx)
	wg.Wait()
	return nil
}

// Health says how well each kind is read, sorted by kind.
func (k *Kubernetes) Health() []KindHealth { return k.health.list() }

// Problems returns what objects ask for and do not get, sorted. A field of an
// object that cannot be used is left out, all else of the object is used.
func (k *Kubernetes) Problems() []Problem {
	k.mu.Lock()
	defer k.mu.Unlock()
	var all []Problem
	for _, p := range k.problems {
		all = append(all, p...)
	}
	slices.SortFunc(all, func(a, b Problem) int {
		return cmp.Or(strings.Compare(a.Object, b.Object), compareProblems(a, b))
	})
	return all
}

// committed takes note of what is not in the Store.
func (k *Kubernetes) committed(items map[Key]*item) {
	k.conditions.observe(items)
	k.mu.Lock()
	defer k.mu.Unlock()
	for key, i := range items {
		delete(k.problems, key)
		if i == nil {
			continue
		}
		for _, p := range i.problems {
			k.problems[key] = append(k.problems[key], Problem{Object: key.object(), Field: p.Field, Message: p.ErrorBody()})
		}
	}
}

func (k *Kubernetes) synced(kind Kind) {
	k.health.setSynced(kind)
	if k.health.allSynced() {
		k.store.SetSynced()
	}
}

// readings are the resources that every cluster has.
func (k *Kubernetes) readings() []reading {
	names := interner{} // of the EndpointSlices alone
	return []reading{
		read(k, KindPod, k.access.core, "", "pods", fields.OneTermEqualSelector("spec.nodeName", k.node), &corev1.Pod{}, func(in *corev1.Pod) *item {
			out := convertPod(in)
			delete(out.Annotations, corev1.LastAppliedConfigAnnotation)
			return &item{object: out, condition: conditionOf(in)}
		}),
		read(k, KindNode, k.access.core, "", "nodes", fields.OneTermEqualSelector(metav1.ObjectNameField, k.node), &corev1.Node{}, func(in *corev1.Node) *item {
			out := convertNode(in)
			out.Labels, out.Annotations = nil, nil
			return &item{object: out}
		}),
		read(k, KindNamespace, k.access.core, "", "namespaces", fields.Everything(), &corev1.Namespace{}, func(in *corev1.Namespace) *item {
			out := convertNamespace(in)
			delete(out.Annotations, corev1.LastAppliedConfigAnnotation)
			return &item{object: out}
		}),
		read(k, KindService, k.access.core, "", "services", fields.Everything(), &corev1.Service{}, func(in *corev1.Service) *item {
			out := convertService(in)
			out.Labels, out.Annotations = nil, nil
			return &item{object: out, problems: unusableIPs(in)}
		}),
		read(k, KindEndpointSlice, k.access.discovery, discoveryv1.GroupName, "endpointslices", fields.Everything(), &discoveryv1.EndpointSlice{}, func(in *discoveryv1.EndpointSlice) *item {
			out := convertSlice(in)
			out.Meta = Meta{Namespace: names.string(out.Namespace), Name: out.Name}
			out.Service = names.string(out.Service)
			for i := range out.Endpoints {
				e := &out.Endpoints[i]
				e.Node, e.Zone = names.string(e.Node), names.string(e.Zone)
				names.strings(e.ForZones)
				names.strings(e.ForNodes)
			}
			return &item{object: out, problems: unusableAddresses(in, out)}
		}),
	}
}

// routes is the reading of the HTTPRoutes.
func (k *Kubernetes) routes() reading {
	r := read(k, KindHTTPRoute, k.access.gateway, gatewayv1.GroupName, "httproutes", fields.Everything(), &gatewayv1.HTTPRoute{}, func(in *gatewayv1.HTTPRoute) *item {
		out := convertRoute(in)
		out.Labels, out.Annotations = nil, nil
		return &item{object: out, problems: notesRoute(in)}
	})
	var once sync.Once
	r.missing = func() {
		// A moment after the CRD was made, or one without the version.
		once.Do(func() { k.log.Info("HTTPRoutes are defined, but not served in version v1 yet") })
		k.synced(KindHTTPRoute)
	}
	return r
}

// read returns the reading of a resource whose objects go into the Store.
func read[O runtime.Object](k *Kubernetes, kind Kind, client rest.Interface, group, resource string, which fields.Selector, example O, convert func(O) *item) reading {
	request := func(o *metav1.ListOptions) *rest.Request {
		o.FieldSelector = which.String()
		return client.Get().Resource(resource).VersionedParams(o, metav1.ParameterCodec)
	}
	return reading{
		kind: kind, resource: schema.GroupResource{Group: group, Resource: resource}, example: example,
		list: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			return request(&o).Do(ctx).Get()
		},
		watch: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			o.Watch = true
			return request(&o).Watch(ctx)
		},
		sink: &sink{
			kind: kind, store: k.store,
			convert: func(in runtime.Object) (*item, error) {
				typed, ok := in.(O)
				if !ok {
					return nil, fmt.Errorf("read %s: is a %T", kind, in)
				}
				return convert(typed), nil
			},
			committed: k.committed,
			replaced:  func() { k.synced(kind) },
		},
	}
}

// readOne returns the reading of the metadata of one object.
func readOne(kind Kind, client metadata.ResourceInterface, resource schema.GroupResource, name string, changed func(*metav1.PartialObjectMetadata)) reading {
	which := fields.OneTermEqualSelector(metav1.ObjectNameField, name).String()
	return reading{
		kind: kind, resource: resource, example: &metav1.PartialObjectMetadata{},
		list: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			o.FieldSelector = which
			return client.List(ctx, o)
		},
		watch: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			o.FieldSelector = which
			return client.Watch(ctx, o)
		},
		sink: mirror{changed: changed},
	}
}

// followRoutes reads HTTPRoutes while the cluster has them, until ctx ends. That
// is known from the one object that defines them.
func (k *Kubernetes) followRoutes(ctx context.Context) {
	var mu sync.Mutex
	var defined types.UID // of the definition, empty if there is none
	changed := make(chan struct{}, 1)
	resource := schema.GroupResource{Group: "apiextensions.k8s.io", Resource: "customresourcedefinitions"}
	definition := readOne(KindCRD, k.access.metadata.Resource(resource.WithVersion("v1")), resource, routeCRD, func(o *metav1.PartialObjectMetadata) {
		mu.Lock()
		defined = ""
		if o != nil {
			defined = o.UID
			k.health.add(KindHTTPRoute) // before the last kind that is missing may be synced
		}
		mu.Unlock()
		k.synced(KindCRD)
		k.health.poke() // what is defined may be served from now on
		select {
		case changed <- struct{}{}:
		default: // the last signal is still there
		}
	})
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { k.reflection.run(ctx, definition) })

	var reading types.UID
	end := func() {}
	defer func() { end() }()
	for {
		select {
		case <-ctx.Done():
			return
		case <-changed:
		}
		mu.Lock()
		now := defined
		mu.Unlock()
		if now == reading {
			continue
		}
		end()
		end = func() {}
		if reading = now; now != "" {
			end = k.readRoutes(ctx)
			continue
		}
		mu.Lock()
		if defined == "" { // else it was added again meanwhile
			k.health.forget(KindHTTPRoute)
		}
		mu.Unlock()
	}
}

// readRoutes reads HTTPRoutes until end is called, which takes them out of the
// Store unless ctx has ended.
func (k *Kubernetes) readRoutes(ctx context.Context) (end func()) {
	routes, cancel := context.WithCancel(ctx)
	r := k.routes()
	done := make(chan struct{})
	go func() {
		defer close(done)
		k.reflection.run(routes, r)
	}()
	return func() {
		cancel()
		<-done
		if ctx.Err() == nil {
			_ = r.sink.Replace(nil, "") // of no objects, none of which can be wrong
		}
	}
}

// unusableIPs names the addresses of a service that are none.
func unusableIPs(in *corev1.Service) field.ErrorList {
	var c check
	for i, ip := range clusterIPs(in) {
		if ip != corev1.ClusterIPNone && in.Spec.Type != corev1.ServiceTypeExternalName {
			c.ip(field.NewPath("spec", "clusterIPs").Index(i), ip)
		}
	}
	return c.errs
}

// unusableAddresses names the addresses of a slice that are none. Names are left
// out without a word: nobody serves slices of them.
func unusableAddresses(in *discoveryv1.EndpointSlice, out *EndpointSlice) field.ErrorList {
	if in.AddressType == discoveryv1.AddressTypeFQDN || len(in.Endpoints) == len(out.Endpoints) {
		return nil
	}
	var c check
	for i, e := range in.Endpoints {
		for j, a := range e.Addresses {
			c.ip(field.NewPath("endpoints").Index(i).Child("addresses").Index(j), a)
		}
	}
	return c.errs
}
