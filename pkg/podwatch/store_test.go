package podwatch

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

func put(objects ...Object) []Change {
	var changes []Change
	for _, o := range objects {
		changes = append(changes, Change{o.Key(), o})
	}
	return changes
}

func newService(name string, selector map[string]string, ports ...ServicePort) *Service {
	return &Service{Meta: Meta{Namespace: "shop", Name: name}, Selector: selector, Ports: ports}
}

func names[T Object](objects []T) []string {
	list := []string{}
	for _, o := range objects {
		k := o.Key()
		list = append(list, strings.TrimPrefix(k.Namespace+"/"+k.Name, "/"))
	}
	return list
}

func wantNames[T Object](t *testing.T, what string, got []T, want ...string) {
	t.Helper()
	if want == nil {
		want = []string{}
	}
	if diff := cmp.Diff(want, names(got)); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

// Sleeps in this file are inside synctest bubbles: they only move a fake clock.

func TestWaitCoalesces(t *testing.T) {
	pod := func(i int) Object {
		return &Pod{Meta: Meta{Name: fmt.Sprint(i % 3), UID: fmt.Sprint(i)}}
	}
	for name, tc := range map[string]struct {
		every   time.Duration // how often something changes, 10 times
		batches int
		first   time.Duration // how long the first batch takes
	}{
		"one change at once":        {0, 1, 20 * time.Millisecond},
		"while it is not quiet":     {10 * time.Millisecond, 1, 110 * time.Millisecond},
		"at most the maximum delay": {19 * time.Millisecond, 1, 191 * time.Millisecond},
		"changes far apart":         {30 * time.Millisecond, 10, 20 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := NewStore(StoreOptions{})
				start := time.Now()
				go func() {
					for i := range 10 {
						s.Update(put(pod(i)))
						time.Sleep(tc.every)
					}
				}()
				seen := 0
				for i := range tc.batches {
					b, err := s.Wait(t.Context())
					if err != nil {
						t.Fatal(err)
					}
					if took := time.Since(b.Since); i == 0 && (took != tc.first || !b.Since.Equal(start)) {
						t.Errorf("first batch after %v since %v, want %v since 0", took, b.Since.Sub(start), tc.first)
					}
					seen += len(b.Keys)
				}
				want := 3 // each key once
				if tc.batches > 1 {
					want = 10
				}
				if seen != want {
					t.Errorf("%d keys, want %d", seen, want)
				}
				ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
				defer cancel()
				if b, err := s.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("another batch: %v, %v", b, err)
				}
			})
		})
	}
}

func TestWaitMaxDelay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewStore(StoreOptions{Quiet: 20 * time.Millisecond, MaxDelay: 100 * time.Millisecond})
		var changes sync.WaitGroup
		changes.Go(func() {
			for i := range 30 {
				s.Update(put(&Pod{Meta: Meta{Name: "a", UID: fmt.Sprint(i)}}))
				time.Sleep(15 * time.Millisecond)
			}
		})
		for range 3 {
			b, err := s.Wait(t.Context())
			if took := time.Since(b.Since); err != nil || took != 100*time.Millisecond {
				t.Errorf("batch after %v, want 100ms (%v)", took, err)
			}
		}
		changes.Wait()
	})
}

// TestWaitCancelled: a change is not lost when the Wait that saw it was cancelled.
func TestWaitCancelled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewStore(StoreOptions{})
		s.Update(put(&Namespace{Meta: Meta{Name: "shop"}}))
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Millisecond)
		defer cancel()
		if _, err := s.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("Wait: %v, want a deadline", err)
		}
		b, err := s.Wait(t.Context())
		if err != nil || len(b.Keys) != 1 {
			t.Errorf("Wait: %v, %v, want the namespace", b, err)
		}
	})
}

// TestEqualIsNoChange: only what differs from what the Store has is reported.
func TestEqualIsNoChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewStore(StoreOptions{})
		web := func() Object { return newService("web", map[string]string{"app": "web"}, ServicePort{Port: 80}) }
		s.Update(put(web()))
		if _, err := s.Wait(t.Context()); err != nil {
			t.Fatal(err)
		}
		s.Update(put(web()))
		s.Update([]Change{{Key: Key{KindPod, "shop", "none"}}})
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		if b, err := s.Wait(ctx); err == nil {
			t.Errorf("Wait = %v, want nothing", b)
		}
		s.Update([]Change{{Key: web().Key()}, {Key{KindNamespace, "", "z"}, &Namespace{Meta: Meta{Name: "z"}}}})
		b, err := s.Wait(t.Context())
		if diff := cmp.Diff([]Key{{KindNamespace, "", "z"}, web().Key()}, b.Keys); diff != "" || err != nil {
			t.Errorf("Keys (-want +got):\n%s%v", diff, err)
		}
	})
}

func TestStoreIndexes(t *testing.T) {
	s := NewStore(StoreOptions{})
	route := func(name string, age int, parents []RouteParent, backends ...string) *HTTPRoute {
		r := &HTTPRoute{Meta: Meta{Namespace: "shop", Name: name, Created: time.Unix(int64(1000-age), 0)}, Parents: parents}
		for _, b := range backends {
			r.Rules = append(r.Rules, HTTPRouteRule{Backends: []HTTPBackend{{Kind: "Service", Namespace: "shop", Name: b}}})
		}
		return r
	}
	web := []RouteParent{{Namespace: "shop", Name: "web"}, {Namespace: "shop", Name: "web", Port: 80}}
	slice := &EndpointSlice{Meta: Meta{Namespace: "shop", Name: "web-1"}, Service: "web"}
	s.Update(put(
		route("b", 1, web, "web-v1", "web-v1"), route("a", 1, web, "web-v2"), route("z", 9, web, "web-v1"),
		route("other", 99, []RouteParent{{Namespace: "other", Name: "web"}}, "web-v1"),
		slice, &EndpointSlice{Meta: Meta{Namespace: "shop", Name: "web-0"}, Service: "web"},
		&EndpointSlice{Meta: Meta{Namespace: "other", Name: "web-1"}, Service: "web"},
		newService("web", map[string]string{"app": "web"}), newService("all", map[string]string{"app": "web", "v": "1"}),
		newService("none", nil),
		&Pod{Meta: Meta{Namespace: "shop", Name: "p"}}, &Pod{Meta: Meta{Namespace: "other", Name: "p"}},
		&Namespace{Meta: Meta{Name: "shop"}},
	))
	wantNames(t, "RoutesTo", s.RoutesTo("shop", "web"), "shop/z", "shop/a", "shop/b")
	wantNames(t, "RoutesReferring", s.RoutesReferring("shop", "web-v1"), "shop/other", "shop/z", "shop/b")
	wantNames(t, "SlicesOf", s.SlicesOf("shop", "web"), "shop/web-0", "shop/web-1")
	pod := &Pod{Meta: Meta{Namespace: "shop", Labels: map[string]string{"app": "web", "v": "1"}}}
	wantNames(t, "ServicesSelecting", s.ServicesSelecting(pod), "shop/all", "shop/web")
	wantNames(t, "Pods", s.Pods(), "other/p", "shop/p")
	wantNames(t, "Services", s.Services(), "shop/all", "shop/none", "shop/web")
	wantNames(t, "Namespaces", s.Namespaces(), "shop")
	wantNames(t, "Routes", s.Routes(), "shop/a", "shop/b", "shop/other", "shop/z")
	wantNames(t, "EndpointSlices", s.EndpointSlices(), "other/web-1", "shop/web-0", "shop/web-1")

	moved := *slice
	moved.Service = "api"
	s.Update(append(put(&moved, route("a", 1, nil, "web-v1"), newService("web", map[string]string{"app": "api"})),
		Change{Key: Key{KindHTTPRoute, "shop", "z"}}, Change{Key: Key{KindService, "shop", "all"}}))
	wantNames(t, "RoutesTo afterwards", s.RoutesTo("shop", "web"), "shop/b")
	wantNames(t, "RoutesReferring afterwards", s.RoutesReferring("shop", "web-v1"), "shop/other", "shop/a", "shop/b")
	wantNames(t, "RoutesReferring web-v2 afterwards", s.RoutesReferring("shop", "web-v2"))
	wantNames(t, "SlicesOf afterwards", s.SlicesOf("shop", "web"), "shop/web-0")
	wantNames(t, "ServicesSelecting afterwards", s.ServicesSelecting(pod))
	wantNames(t, "Services afterwards", s.Services(), "shop/none", "shop/web")

	if got, ok := Get[*EndpointSlice](s, "shop", "web-1"); !ok || got.Service != "api" {
		t.Errorf("Get = %v, %v, want the moved slice", got, ok)
	}
	if got, ok := Get[*Pod](s, "shop", "web-1"); ok {
		t.Errorf("Get = %v, want none", got)
	}
}

func TestWaitPod(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewStore(StoreOptions{})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		go func() {
			for _, name := range []string{"a", "b", "web"} {
				time.Sleep(100 * time.Millisecond)
				s.Update(put(&Pod{Meta: Meta{Namespace: "shop", Name: name}}))
			}
		}()
		start := time.Now()
		p, err := s.WaitPod(ctx, "shop", "web", "0b6f")
		if took := time.Since(start); err != nil || p.Name != "web" || took != 300*time.Millisecond {
			t.Errorf("WaitPod = %v, %v after %v, want web after 300ms", p, err, took)
		}
		_, err = s.WaitPod(ctx, "shop", "never", "")
		if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "pod shop/never") {
			t.Errorf("WaitPod: %v, want a deadline that names the pod", err)
		}
	})
}

func TestWaitNamespace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewStore(StoreOptions{})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		go func() {
			time.Sleep(100 * time.Millisecond)
			s.Update(put(&Namespace{Meta: Meta{Name: "shop"}}))
		}()
		start := time.Now()
		if err := s.WaitNamespace(ctx, "shop"); err != nil || time.Since(start) != 100*time.Millisecond {
			t.Errorf("WaitNamespace = %v after %v, want shop after 100ms", err, time.Since(start))
		}
		if err := s.WaitNamespace(ctx, "never"); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "namespace never") {
			t.Errorf("WaitNamespace: %v, want a deadline that names the namespace", err)
		}
	})
}

// TestWaitPodUID: a pod that is made again under its name is another pod, if the
// source can tell.
func TestWaitPodUID(t *testing.T) {
	for name, tc := range map[string]struct {
		cluster bool
		want    string
		after   time.Duration
	}{
		"UIDs of the cluster": {true, "new", 200 * time.Millisecond},
		"any other UIDs":      {false, "old", 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := NewStore(StoreOptions{})
				s.clusterUIDs.Store(tc.cluster)
				put := func(uid, runtimeUID string) {
					s.Update(put(&Pod{Meta: Meta{Namespace: "shop", Name: "web-0", UID: uid}, RuntimeUID: runtimeUID}))
				}
				put("a", "old")
				go func() {
					time.Sleep(100 * time.Millisecond)
					s.Update([]Change{{Key: Key{KindPod, "shop", "web-0"}}})
					time.Sleep(100 * time.Millisecond)
					put("b", "new")
				}()
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				defer cancel()
				start := time.Now()
				p, err := s.WaitPod(ctx, "shop", "web-0", "new")
				if took := time.Since(start); err != nil || p.RuntimeUID != tc.want || took != tc.after {
					t.Errorf("WaitPod = %+v, %v after %v, want %s after %v", p, err, took, tc.want, tc.after)
				}
				if !tc.cluster {
					time.Sleep(time.Second)
					return
				}
				if _, err := s.WaitPod(ctx, "shop", "web-0", "b"); err != nil {
					t.Errorf("WaitPod: %v, want the pod by its UID in the API as well", err)
				}
				_, err = s.WaitPod(ctx, "shop", "web-0", "old")
				if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "shop/web-0 with UID old") || !strings.Contains(err.Error(), "UID new") {
					t.Errorf("WaitPod: %v, want a deadline that names both UIDs", err)
				}
			})
		})
	}
}

func TestSynced(t *testing.T) {
	s := NewStore(StoreOptions{})
	select {
	case <-s.Synced():
		t.Fatal("synced before SetSynced")
	default:
	}
	s.SetSynced()
	s.SetSynced()
	<-s.Synced()
}

// TestStoreConcurrent is for the race detector.
func TestStoreConcurrent(t *testing.T) {
	s := NewStore(StoreOptions{Quiet: time.Microsecond, MaxDelay: time.Microsecond})
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			for j := range 200 {
				s.Update(put(newService(fmt.Sprint("s", i), nil, ServicePort{Port: uint16(j + 1)})))
			}
		})
		wg.Go(func() {
			for range 200 {
				s.Services()
				s.SlicesOf("shop", "s0")
				s.ServicesSelecting(&Pod{})
				s.Get(Key{KindService, "shop", "s1"})
			}
		})
	}
	wg.Go(func() {
		for {
			if got, ok := Get[*Service](s, "shop", "s3"); ok && got.Ports[0].Port == 200 {
				return
			}
			if _, err := s.Wait(t.Context()); err != nil {
				t.Error(err)
				return
			}
		}
	})
	wg.Wait()
	wantNames(t, "Services", s.Services(), "shop/s0", "shop/s1", "shop/s2", "shop/s3")
}
