package translate

import (
	"fmt"
	"math"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	inspectorv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/http_inspector/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	preservecasev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/http/header_formatters/preserve_case/v3"
	previoushostsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/retry/host/previous_hosts/v3"
	httpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// Limits of HTTP. An application that wants less says so itself; these are the
// largest that Envoy accepts, or out of reach.
const (
	maxHeadersKB    = 8192
	maxHeadersCount = 1 << 20
)

// prepareHTTP packs what is the same for all ports that speak HTTP.
func (t *Translator) prepareHTTP() error {
	preserveCase, err := pack(&preservecasev3.PreserveCaseFormatterConfig{})
	if err != nil {
		return fmt.Errorf("make header formatter: %w", err)
	}
	t.preserveCase = &corev3.TypedExtensionConfig{Name: "preserve_case", TypedConfig: preserveCase}

	router, err := pack(&routerv3.Router{SuppressEnvoyHeaders: true})
	if err != nil {
		return fmt.Errorf("make router: %w", err)
	}
	t.router = &hcmv3.HttpFilter{Name: "router", ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: router}}

	if t.previousHosts, err = pack(&previoushostsv3.PreviousHostsPredicate{}); err != nil {
		return fmt.Errorf("make retry predicate: %w", err)
	}
	if t.httpInspector, err = pack(&inspectorv3.HttpInspector{}); err != nil {
		return fmt.Errorf("make protocol detection: %w", err)
	}

	common := &corev3.HttpProtocolOptions{
		MaxHeadersCount:      u32(maxHeadersCount),
		MaxResponseHeadersKb: u32(maxHeadersKB),
	}
	t.downstreamHTTP, err = pack(&httpv3.HttpProtocolOptions{
		CommonHttpProtocolOptions: common,
		UpstreamProtocolOptions: &httpv3.HttpProtocolOptions_UseDownstreamProtocolConfig{
			UseDownstreamProtocolConfig: &httpv3.HttpProtocolOptions_UseDownstreamHttpConfig{
				HttpProtocolOptions:  t.http1Options(""),
				Http2ProtocolOptions: http2Options(upstreamStreams),
			},
		},
	})
	if err != nil {
		return fmt.Errorf("make protocol options: %w", err)
	}
	t.http2, err = pack(&httpv3.HttpProtocolOptions{
		CommonHttpProtocolOptions: common,
		UpstreamProtocolOptions: &httpv3.HttpProtocolOptions_ExplicitHttpConfig_{
			ExplicitHttpConfig: &httpv3.HttpProtocolOptions_ExplicitHttpConfig{
				ProtocolConfig: &httpv3.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions{
					Http2ProtocolOptions: http2Options(upstreamStreams),
				},
			},
		},
	})
	if err != nil {
		return fmt.Errorf("make protocol options: %w", err)
	}
	return nil
}

// http1Options change as little as possible of what passes: header names keep
// their case, trailers and HTTP/1.0 pass. host is what an HTTP/1.0
// request without one is given.
func (t *Translator) http1Options(host string) *corev3.Http1ProtocolOptions {
	return &corev3.Http1ProtocolOptions{
		AcceptHttp_10:         host != "",
		DefaultHostForHttp_10: host,
		EnableTrailers:        true,
		HeaderKeyFormat: &corev3.Http1ProtocolOptions_HeaderKeyFormat{
			HeaderFormat: &corev3.Http1ProtocolOptions_HeaderKeyFormat_StatefulFormatter{StatefulFormatter: t.preserveCase},
		},
		// Some clients offer TLS this way and go on without it when nobody
		// answers; Envoy would refuse the request.
		IgnoreHttp_11Upgrade: []*matcherv3.StringMatcher{{
			MatchPattern: &matcherv3.StringMatcher_Prefix{Prefix: "TLS/"},
		}},
	}
}

// upstreamStreams bounds the streams of one connection to a server. Envoy opens
// streams before it has read how many the server allows, and what is too many is
// refused. That limit should not be below 100 (RFC 9113, 6.5.2), so up to here
// nothing is; what goes beyond gets another connection.
const upstreamStreams = 100

func http2Options(streams uint32) *corev3.Http2ProtocolOptions {
	return &corev3.Http2ProtocolOptions{
		MaxConcurrentStreams: u32(streams),
		AllowConnect:         true, // WebSocket over HTTP/2, RFC 8441
		// A bad request ends its stream, not the connection with all others.
		OverrideStreamErrorOnInvalidHttpMessage: wrapperspb.Bool(true),
	}
}

// hcm is the connection manager of a port that speaks HTTP. Nothing times out
// and nothing is added that the application could see, so far as Envoy allows.
func (t *Translator) hcm(direction corev3.TrafficDirection, host string) *hcmv3.HttpConnectionManager {
	prefix := statPrefix(direction)
	return &hcmv3.HttpConnectionManager{
		CodecType:         hcmv3.HttpConnectionManager_AUTO,
		StatPrefix:        prefix,
		HttpFilters:       []*hcmv3.HttpFilter{t.router},
		AccessLog:         t.logs[logKey{direction: direction, http: true}],
		StreamIdleTimeout: never(),
		CommonHttpProtocolOptions: &corev3.HttpProtocolOptions{
			IdleTimeout:     never(),
			MaxHeadersCount: u32(maxHeadersCount),
		},
		MaxRequestHeadersKb:        u32(maxHeadersKB),
		HttpProtocolOptions:        t.http1Options(host),
		Http2ProtocolOptions:       http2Options(math.MaxInt32),
		UseRemoteAddress:           wrapperspb.Bool(false),
		SkipXffAppend:              true,
		GenerateRequestId:          wrapperspb.Bool(false),
		PreserveExternalRequestId:  true,
		ServerHeaderTransformation: hcmv3.HttpConnectionManager_PASS_THROUGH,
		ForwardClientCertDetails:   hcmv3.HttpConnectionManager_ALWAYS_FORWARD_ONLY,
		Proxy_100Continue:          true,
		UpgradeConfigs:             []*hcmv3.HttpConnectionManager_UpgradeConfig{{UpgradeType: "websocket"}},
	}
}

// httpFilter wraps a connection manager that has its routes.
func httpFilter(m *hcmv3.HttpConnectionManager) (*listenerv3.Filter, error) {
	config, err := pack(m)
	if err != nil {
		return nil, err
	}
	return &listenerv3.Filter{Name: "http", ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: config}}, nil
}

// repeatableHeader marks a response with which a sidecar says that its
// application did not answer and that another one may be asked the same. The
// client's sidecar does that, and takes the header away.
const repeatableHeader = "x-sluice-repeatable"

// retries are those that do no harm, because no application has seen the
// request, or because it is idempotent:
//
//   - connect-failure: there was no connection
//   - refused-stream: HTTP/2 promises that it was not processed, RFC 9113, 8.7
//   - reset-before-request: the connection ended before the headers were sent
//   - retriable-headers: the other sidecar says so, see repeatableReply
func (t *Translator) retries() *routev3.RetryPolicy {
	return &routev3.RetryPolicy{
		RetryOn:      "connect-failure,refused-stream,reset-before-request,retriable-headers",
		NumRetries:   u32(3),
		RetryBackOff: backOff(),
		RetriableHeaders: []*routev3.HeaderMatcher{{
			Name:                 repeatableHeader,
			HeaderMatchSpecifier: &routev3.HeaderMatcher_PresentMatch{PresentMatch: true},
		}},
		RetryHostPredicate: []*routev3.RetryPolicy_RetryHostPredicate{{
			Name:       "envoy.retry_host_predicates.previous_hosts",
			ConfigType: &routev3.RetryPolicy_RetryHostPredicate_TypedConfig{TypedConfig: t.previousHosts},
		}},
		HostSelectionRetryMaxAttempts: 5,
	}
}

// backOff is short: Envoy's own 25 ms are for servers that need a rest, here
// another server or connection is tried.
func backOff() *routev3.RetryPolicy_RetryBackOff {
	return &routev3.RetryPolicy_RetryBackOff{
		BaseInterval: durationpb.New(5 * time.Millisecond),
		MaxInterval:  durationpb.New(50 * time.Millisecond),
	}
}
