package server

import (
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"

	"github.com/sluicemesh/sluice/pkg/xds"
)

// A node as large as Kubernetes recommends, with a large number of services.
const (
	benchPods     = 110
	benchClusters = 5000
	benchSize     = 575 // bytes of a cluster
)

func benchCluster(i, v int) xds.Resource {
	r := res(clusters, fmt.Sprintf("out/namespace/service-%04d/80", i), fmt.Sprint(v, strings.Repeat("x", benchSize)))
	r.Version = fmt.Sprintf("%032x", v)
	return r
}

// benchServer has benchPods streams that have everything; none is connected:
// the benchmark calls what a stream's goroutines call, without a network.
func benchServer(b *testing.B) (*Server, []*stream) {
	b.Helper()
	s, err := New(Options{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		b.Fatal(err)
	}
	for i := range benchClusters {
		s.SetShared(fmt.Sprintf("service/%04d", i), []xds.Resource{benchCluster(i, 0)}, time.Time{})
	}
	s.SetReady()
	var all []*stream
	for i := range benchPods {
		uid := fmt.Sprint(i)
		s.SetPod(Pod{UID: uid}, nil, time.Time{})
		s.mu.Lock()
		st := s.attach(uid, false)
		s.mu.Unlock()
		if err := st.onDelta(&discovery.DeltaDiscoveryRequest{TypeUrl: xds.ClusterType}, time.Now()); err != nil {
			b.Fatal(err)
		}
		all = append(all, st)
	}
	return s, all
}

// drain sends and acknowledges what there is for a stream and returns its bytes.
func (st *stream) drain(b *testing.B) (n int) {
	for {
		st.s.mu.Lock()
		fl, err := st.next(time.Now())
		st.s.mu.Unlock()
		if err != nil {
			b.Fatal(err)
		}
		if fl == nil {
			return n
		}
		out, err := proto.Marshal(deltaResponse(fl))
		if err != nil {
			b.Fatal(err)
		}
		n += len(out)
		st.s.mu.Lock()
		err = st.onDelta(&discovery.DeltaDiscoveryRequest{TypeUrl: typeURLs[fl.t], ResponseNonce: fl.nonce}, time.Now())
		st.s.mu.Unlock()
		if err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkUpdate changes one cluster of 5000 and brings it to 110 pods.
func BenchmarkUpdate(b *testing.B) {
	s, all := benchServer(b)
	for _, st := range all {
		st.drain(b)
	}
	b.ReportAllocs()
	for i := 1; b.Loop(); i++ {
		s.SetShared("service/0042", []xds.Resource{benchCluster(42, i)}, time.Time{})
		for _, st := range all {
			if n := st.drain(b); n < benchSize || n > 2*benchSize {
				b.Fatalf("%d bytes sent", n)
			}
		}
	}
}

// BenchmarkFill brings 5000 clusters to one new pod.
func BenchmarkFill(b *testing.B) {
	s, _ := benchServer(b)
	b.ReportAllocs()
	for b.Loop() {
		s.mu.Lock()
		st := s.attach("0", false)
		err := st.onDelta(&discovery.DeltaDiscoveryRequest{TypeUrl: xds.ClusterType}, time.Now())
		s.mu.Unlock()
		if err != nil {
			b.Fatal(err)
		}
		if n := st.drain(b); n < benchClusters*benchSize {
			b.Fatalf("%d bytes sent", n)
		}
		s.mu.Lock()
		s.detach(st)
		s.mu.Unlock()
	}
}
