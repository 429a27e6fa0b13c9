package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	"github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	peer "github.com/envoyproxy/go-control-plane/pkg/server/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/sluicemesh/sluice/pkg/xds"
	"github.com/sluicemesh/sluice/pkg/xds/server"
)

// A controlPlane is a running server.
type controlPlane struct {
	socket func(pod int) string
	update func(*clusterv3.Cluster) error
	close  func() error
}

// A contender is what is compared: start makes it serve these clusters to all pods.
type contender struct {
	name  string
	start func(dir string, sz size, all []*clusterv3.Cluster) (controlPlane, error)
}

// contenders are what is compared; ratios are to the first.
func contenders() []contender {
	return []contender{
		{"Sluice", startOurs},
		{"go-control-plane LinearCache", startLinear},
		{"go-control-plane SnapshotCache", startSnapshot},
		{"gRPC alone", startBare},
	}
}

// toResource does what the translator does with each resource.
func toResource(c *clusterv3.Cluster) (xds.Resource, error) {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(c)
	if err != nil {
		return xds.Resource{}, fmt.Errorf("marshal cluster: %w", err)
	}
	return xds.Resource{
		TypeURL: xds.ClusterType, Name: c.GetName(), Version: fmt.Sprintf("%x", sha256.Sum256(b)),
		Body: &anypb.Any{TypeUrl: xds.ClusterType, Value: b},
	}, nil
}

func startOurs(dir string, sz size, all []*clusterv3.Cluster) (controlPlane, error) {
	socket := filepath.Join(dir, "xds")
	sv, err := server.New(server.Options{
		Log:    slog.New(slog.DiscardHandler),
		Socket: socket,
		// In a node each pod has a namespace, and the socket's name is the
		// same in all; here each has a directory to which it is moved.
		InNetns: func(path string, listen func() error) error {
			if err := listen(); err != nil {
				return err
			}
			return os.Rename(socket, filepath.Join(path, "xds"))
		},
	})
	if err != nil {
		return controlPlane{}, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- sv.Run(ctx) }()
	stop := func() error {
		cancel()
		return <-done
	}
	update := func(c *clusterv3.Cluster) error {
		res, err := toResource(c)
		if err != nil {
			return err
		}
		sv.SetShared("service/"+c.GetName(), []xds.Resource{res}, time.Now())
		return nil
	}
	for _, c := range all {
		if err := update(c); err != nil {
			return controlPlane{}, errors.Join(err, stop())
		}
	}
	sv.SetReady()
	pod := func(i int) string { return filepath.Join(dir, strconv.Itoa(i)) }
	for i := range sz.pods {
		uid := strconv.Itoa(i)
		sv.SetPod(server.Pod{UID: uid}, nil, time.Time{})
		err := os.Mkdir(pod(i), 0o700)
		if err == nil {
			err = sv.Open(uid, pod(i), uint32(os.Geteuid()))
		}
		if err != nil {
			return controlPlane{}, errors.Join(err, stop())
		}
	}
	return controlPlane{
		socket: func(i int) string { return filepath.Join(pod(i), "xds") },
		update: update,
		close:  stop,
	}, nil
}

// listen serves the discovery service with the settings of Sluice's server.
func listen(dir string, ads discovery.AggregatedDiscoveryServiceServer, update func(*clusterv3.Cluster) error, end context.CancelFunc) (controlPlane, error) {
	socket := filepath.Join(dir, "xds")
	lis, err := net.Listen("unix", socket)
	if err != nil {
		end()
		return controlPlane{}, fmt.Errorf("listen on unix socket: %w", err)
	}
	g := grpc.NewServer(grpc.MaxRecvMsgSize(32<<20), grpc.MaxSendMsgSize(math.MaxInt32), grpc.WaitForHandlers(true))
	discovery.RegisterAggregatedDiscoveryServiceServer(g, ads)
	done := make(chan error, 1)
	go func() { done <- g.Serve(lis) }()
	return controlPlane{
		socket: func(int) string { return socket },
		update: update,
		close: func() error {
			end()
			g.Stop()
			return <-done
		},
	}, nil
}

func startLinear(dir string, _ size, all []*clusterv3.Cluster) (controlPlane, error) {
	initial := make(map[string]types.Resource, len(all))
	for _, c := range all {
		initial[c.GetName()] = c
	}
	lc := cache.NewLinearCache(resource.ClusterType, cache.WithInitialResources(initial))
	ctx, cancel := context.WithCancel(context.Background())
	return listen(dir, peer.NewServer(ctx, lc, nil), func(c *clusterv3.Cluster) error { return lc.UpdateResource(c.GetName(), c) }, cancel)
}

// oneNode makes all pods share one snapshot, which is set once.
type oneNode struct{}

// ID implements cache.NodeHash.
func (oneNode) ID(*corev3.Node) string { return "all" }

func startSnapshot(dir string, _ size, all []*clusterv3.Cluster) (controlPlane, error) {
	sc := cache.NewSnapshotCache(true, oneNode{}, nil)
	items := make([]types.Resource, len(all))
	index := make(map[string]int, len(all))
	for i, c := range all {
		items[i], index[c.GetName()] = c, i
	}
	version := 0
	set := func() error {
		version++
		s, err := cache.NewSnapshot(strconv.Itoa(version), map[resource.Type][]types.Resource{resource.ClusterType: items})
		if err != nil {
			return fmt.Errorf("make snapshot: %w", err)
		}
		return sc.SetSnapshot(context.Background(), "all", s)
	}
	if err := set(); err != nil {
		return controlPlane{}, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	return listen(dir, peer.NewServer(ctx, sc, nil), func(c *clusterv3.Cluster) error {
		items[index[c.GetName()]] = c
		return set()
	}, cancel)
}

// bare sends what it is given to all streams and decides nothing: what is left
// is the cost of the transport and of the clients.
type bare struct {
	discovery.UnimplementedAggregatedDiscoveryServiceServer
	fill *discovery.DeltaDiscoveryResponse

	mu      sync.Mutex
	streams []chan *discovery.DeltaDiscoveryResponse
}

func startBare(dir string, _ size, all []*clusterv3.Cluster) (controlPlane, error) {
	b := &bare{}
	fill, err := response(all...)
	if err != nil {
		return controlPlane{}, err
	}
	b.fill = fill
	return listen(dir, b, b.update, func() {})
}

func response(all ...*clusterv3.Cluster) (*discovery.DeltaDiscoveryResponse, error) {
	resp := &discovery.DeltaDiscoveryResponse{TypeUrl: resource.ClusterType, Nonce: "1"}
	for _, c := range all {
		r, err := toResource(c)
		if err != nil {
			return nil, err
		}
		resp.Resources = append(resp.Resources, &discovery.Resource{Name: r.Name, Version: r.Version, Resource: r.Body})
	}
	return resp, nil
}

func (b *bare) update(c *clusterv3.Cluster) error {
	resp, err := response(c)
	if err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, ch := range b.streams {
		ch <- resp
	}
	return nil
}

// DeltaAggregatedResources implements the discovery service.
func (b *bare) DeltaAggregatedResources(g grpc.BidiStreamingServer[discovery.DeltaDiscoveryRequest, discovery.DeltaDiscoveryResponse]) error {
	ch := make(chan *discovery.DeltaDiscoveryResponse, 1)
	b.mu.Lock()
	b.streams = append(b.streams, ch)
	b.mu.Unlock()
	resp := b.fill
	for {
		if _, err := g.Recv(); err != nil { // the request, then each answer
			return err
		}
		if err := g.Send(resp); err != nil {
			return err
		}
		select {
		case resp = <-ch:
		case <-g.Context().Done():
			return g.Context().Err()
		}
	}
}
