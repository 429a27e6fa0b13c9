package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// patience bounds what takes some seconds at most.
const patience = 2 * time.Minute

// A fleet is the clients of all pods: each has a connection of its own and one
// incremental stream, asks for all clusters and acknowledges what it gets.
type fleet struct {
	sz   size
	want atomic.Pointer[string] // what the next update of one cluster must contain
	got  chan error             // one from each pod: nil once it has acknowledged
	wg   sync.WaitGroup
	ccs  []*grpc.ClientConn
}

// connect returns when all pods have everything; they go on until ctx is done.
func (f *fleet) connect(ctx context.Context, socket func(pod int) string) error {
	for pod := range f.sz.pods {
		// grpc dials when the stream is opened.
		cc, err := grpc.NewClient("passthrough:///pod", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(1<<30)),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
				var d net.Dialer
				return d.DialContext(ctx, "unix", socket(pod))
			}))
		if err != nil {
			return fmt.Errorf("make client of pod %d: %w", pod, err)
		}
		f.ccs = append(f.ccs, cc)
		f.wg.Go(func() {
			if err := f.serve(ctx, pod, cc); ctx.Err() == nil {
				f.got <- fmt.Errorf("pod %d: %w", pod, err)
			}
		})
	}
	return f.wait()
}

// serve is one pod; it returns only with an error.
func (f *fleet) serve(ctx context.Context, pod int, cc *grpc.ClientConn) error {
	st, err := discovery.NewAggregatedDiscoveryServiceClient(cc).DeltaAggregatedResources(ctx)
	if err != nil {
		return err
	}
	if err := st.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: resource.ClusterType, Node: &corev3.Node{Id: fmt.Sprint("pod-", pod)}}); err != nil {
		return err
	}
	missing := f.sz.clusters
	for {
		resp, err := st.Recv()
		if err != nil {
			return err
		}
		res := resp.GetResources()
		switch {
		case missing > 0:
			missing -= len(res)
		case len(res) != 1 || len(resp.GetRemovedResources()) > 0 || !bytes.Contains(res[0].GetResource().GetValue(), []byte(*f.want.Load())):
			return fmt.Errorf("%d resources and %d removals, not the one that changed", len(res), len(resp.GetRemovedResources()))
		}
		if err := st.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: resource.ClusterType, ResponseNonce: resp.GetNonce()}); err != nil {
			return err
		}
		if missing <= 0 {
			f.got <- nil
		}
	}
}

// wait returns when all pods have acknowledged.
func (f *fleet) wait() error {
	late := time.After(patience)
	for range f.sz.pods {
		select {
		case err := <-f.got:
			if err != nil {
				return err
			}
		case <-late:
			return errors.New("a pod was not served in time")
		}
	}
	return nil
}

// close waits for the clients, whose context is done, and closes their connections.
func (f *fleet) close() error {
	f.wg.Wait()
	var err error
	for _, cc := range f.ccs {
		err = errors.Join(err, cc.Close())
	}
	return err
}
