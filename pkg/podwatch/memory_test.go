package podwatch

import (
	"context"
	"fmt"
	"runtime"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/cache"
)

// BenchmarkMemory reads a cluster of 1000 services with 5000 endpoints from a
// server, and says how many bytes are held for each service with its slice: by
// the source, and by client-go's informers, which keep the objects as they are.
func BenchmarkMemory(b *testing.B) {
	const services, endpoints = 1000, 5
	api := newAPIServer(b)
	api.protobuf = true
	number, name, protocol, yes := int32(8080), "http", corev1.ProtocolTCP, true
	for i := range services {
		s := apiService(fmt.Sprint("service-", i), fmt.Sprintf("10.96.%d.%d", i/250, i%250))
		s.Annotations = map[string]string{corev1.LastAppliedConfigAnnotation: fmt.Sprintf("%0500d", i)}
		s.ManagedFields = []metav1.ManagedFieldsEntry{{Manager: "kubectl", FieldsV1: metav1.NewFieldsV1(fmt.Sprintf(`{"f:spec":"%0300d"}`, i))}}
		e := apiSlice(s.Name+"-abcde", s.Name)
		e.ManagedFields = s.ManagedFields
		e.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: "Service", Name: s.Name, UID: s.UID}}
		e.Ports = []discoveryv1.EndpointPort{{Name: &name, Port: &number, Protocol: &protocol}}
		for j := range endpoints {
			node, zone := fmt.Sprint("node-", (i+j)%100), fmt.Sprint("zone-", j%3)
			e.Endpoints = append(e.Endpoints, discoveryv1.Endpoint{
				Addresses: []string{fmt.Sprintf("10.%d.%d.%d", j+1, i/250, i%250)}, NodeName: &node, Zone: &zone,
				Conditions: discoveryv1.EndpointConditions{Ready: &yes, Serving: &yes},
				TargetRef:  &corev1.ObjectReference{Kind: "Pod", Namespace: "shop", Name: fmt.Sprintf("%s-%d", s.Name, j), UID: types.UID(fmt.Sprintf("%036d", i*endpoints+j))},
			})
		}
		api.put(s, e)
	}
	held := func() uint64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	measure := func(b *testing.B, start func(context.Context) (held any)) {
		for b.Loop() {
			ctx, cancel := context.WithCancel(context.Background())
			before := held()
			kept := start(ctx)
			b.ReportMetric(float64(held()-before)/services, "B/service")
			runtime.KeepAlive(kept)
			cancel()
		}
	}
	newSource := func() *Kubernetes {
		k, err := newKubernetes(KubernetesOptions{Store: NewStore(StoreOptions{}), Node: "n1"}, api.config(), time.Second)
		if err != nil {
			b.Fatal(err)
		}
		return k
	}
	b.Run("source", func(b *testing.B) {
		measure(b, func(ctx context.Context) any {
			k := newSource()
			go func() { _ = k.Run(ctx) }()
			<-k.store.Synced()
			k.store.mu.Lock()
			k.store.pending = map[Key]struct{}{} // as the agent does
			k.store.mu.Unlock()
			return k
		})
	})
	b.Run("informers", func(b *testing.B) {
		measure(b, func(ctx context.Context) any {
			access := newSource().access
			services := cache.NewSharedIndexInformer(cache.NewListWatchFromClient(access.core, "services", "", fields.Everything()), &corev1.Service{}, 0, cache.Indexers{})
			slices := cache.NewSharedIndexInformer(cache.NewListWatchFromClient(access.discovery, "endpointslices", "", fields.Everything()), &discoveryv1.EndpointSlice{}, 0, cache.Indexers{})
			go services.RunWithContext(ctx)
			go slices.RunWithContext(ctx)
			cache.WaitForCacheSync(ctx.Done(), services.HasSynced, slices.HasSynced)
			return []any{services, slices}
		})
	})
}
