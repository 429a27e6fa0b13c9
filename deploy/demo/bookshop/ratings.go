package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// The gRPC service bookshop.Ratings: one method from a title to an answer, with
// protobuf's well-known messages, so that it needs no generated code.
const (
	ratingsService = "bookshop.Ratings"
	ratingsMethod  = "/" + ratingsService + "/Get"
)

type ratingsServer interface {
	get(ctx context.Context, title *wrapperspb.StringValue) (*structpb.Struct, error)
}

func ratingsDesc() *grpc.ServiceDesc {
	return &grpc.ServiceDesc{
		ServiceName: ratingsService,
		HandlerType: (*ratingsServer)(nil),
		Methods: []grpc.MethodDesc{{
			MethodName: "Get",
			Handler: func(srv any, ctx context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
				in := new(wrapperspb.StringValue)
				if err := decode(in); err != nil {
					return nil, err
				}
				return srv.(ratingsServer).get(ctx, in)
			},
		}},
	}
}

func (s server) get(ctx context.Context, _ *wrapperspb.StringValue) (*structpb.Struct, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, fmt.Errorf("rate a title: call without a peer")
	}
	return structpb.NewStruct(map[string]any{
		"service": s.name, "version": s.version, "host": s.host, "peer": p.Addr.String(), "stars": 5,
	})
}

func (s server) serveRatings(ctx context.Context) error {
	l, err := s.open(ctx)
	if err != nil {
		return err
	}
	gs := grpc.NewServer()
	gs.RegisterService(ratingsDesc(), s)
	healthpb.RegisterHealthServer(gs, health.NewServer())
	done := make(chan error, 1)
	go func() { done <- gs.Serve(l) }()
	select {
	case err := <-done:
		return fmt.Errorf("serve on %s: %w", s.listen, err)
	case <-ctx.Done():
		gs.GracefulStop()
		return <-done
	}
}

// serveReviews serves the versions of reviews that ask ratings.
func (s server) serveReviews(ctx context.Context, target string) error {
	var local atomic.Pointer[string] // of the newest connection
	conn, err := grpc.NewClient("passthrough:///"+target,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
			c, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
			if err != nil {
				return nil, err
			}
			addr = c.LocalAddr().String()
			local.Store(&addr)
			return c, nil
		}))
	if err != nil {
		return fmt.Errorf("make gRPC client for %s: %w", target, err)
	}
	defer func() { _ = conn.Close() }()
	return s.serveHTTP(ctx, func(r *http.Request) ([]Call, error) {
		ctx := r.Context()
		if id := r.Header.Get("X-Request-Id"); id != "" {
			ctx = metadata.AppendToOutgoingContext(ctx, "x-request-id", id)
		}
		c, err := rate(ctx, conn, target)
		if err != nil {
			return nil, err
		}
		c.Local = *local.Load()
		return []Call{c}, nil
	})
}

func rate(ctx context.Context, conn *grpc.ClientConn, target string) (Call, error) {
	c := Call{URL: "grpc://" + target + ratingsMethod}
	var p peer.Peer
	out := new(structpb.Struct)
	if err := conn.Invoke(ctx, ratingsMethod, wrapperspb.String("The Comedy of Errors"), out, grpc.Peer(&p)); err != nil {
		return c, fmt.Errorf("call %s: %w", c.URL, err)
	}
	if p.Addr != nil {
		c.Remote = p.Addr.String()
	}
	f := out.GetFields()
	c.Answer = Answer{
		Service: f["service"].GetStringValue(), Version: f["version"].GetStringValue(),
		Host: f["host"].GetStringValue(), Peer: f["peer"].GetStringValue(), Stars: int(f["stars"].GetNumberValue()),
	}
	return c, nil
}
