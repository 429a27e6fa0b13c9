package translate

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/sluicemesh/sluice/pkg/xds"
)

// Defaults of Options.
const (
	// DefaultProtocolDetectionTimeout is how long a port whose protocol is not
	// known waits for the client's first bytes. docs/xds.md has the measurement.
	DefaultProtocolDetectionTimeout = 100 * time.Millisecond
	// DefaultConnectTimeout is how long one attempt to connect may take.
	DefaultConnectTimeout = 10 * time.Second
)

// Options are the same for all pods of a node. The zero value is valid.
type Options struct {
	// ProtocolDetectionTimeout is the time after which a connection to a port
	// of ProtocolAuto on which the client has said nothing is taken for TCP.
	// 0 means DefaultProtocolDetectionTimeout.
	ProtocolDetectionTimeout time.Duration
	// ConnectTimeout bounds one attempt to connect to an endpoint or to an
	// original destination. 0 means DefaultConnectTimeout.
	ConnectTimeout time.Duration
	// IPv4Only is set on nodes whose kernel has no IPv6, where no IPv6 socket
	// can be opened.
	IPv4Only bool
	// NoAccessLog turns the access log off.
	NoAccessLog bool
}

// A Translator translates. It holds what is the same in all resources.
type Translator struct {
	opts Options

	router        *hcmv3.HttpFilter
	preserveCase  *corev3.TypedExtensionConfig
	previousHosts *anypb.Any
	httpInspector *anypb.Any
	// downstreamHTTP and http2 are the protocol options of clusters: speak what
	// the client speaks, or always HTTP/2.
	downstreamHTTP, http2 *anypb.Any
	logs                  map[logKey][]*accesslogv3.AccessLog
}

// New returns a Translator.
func New(opts Options) (*Translator, error) {
	if opts.ProtocolDetectionTimeout < 0 || opts.ConnectTimeout < 0 {
		return nil, fmt.Errorf("protocol detection timeout %s and connect timeout %s must not be negative",
			opts.ProtocolDetectionTimeout, opts.ConnectTimeout)
	}
	if opts.ProtocolDetectionTimeout == 0 {
		opts.ProtocolDetectionTimeout = DefaultProtocolDetectionTimeout
	}
	if opts.ConnectTimeout == 0 {
		opts.ConnectTimeout = DefaultConnectTimeout
	}
	t := &Translator{opts: opts, logs: map[logKey][]*accesslogv3.AccessLog{}}
	if err := errors.Join(t.prepareHTTP(), t.prepareLogs()); err != nil {
		return nil, err
	}
	return t, nil
}

// A message is a protobuf message that knows its own constraints.
type message interface {
	proto.Message
	ValidateAll() error
}

// resource checks and marshals m.
func resource(typeURL, name string, m message) (xds.Resource, error) {
	body, err := pack(m)
	if err != nil {
		return xds.Resource{}, err
	}
	body.TypeUrl = typeURL
	return xds.Resource{TypeURL: typeURL, Name: name, Version: version(body.Value), Body: body}, nil
}

// pack checks and marshals m; equal messages give equal bytes.
func pack(m message) (*anypb.Any, error) {
	if err := m.ValidateAll(); err != nil {
		return nil, err
	}
	a := &anypb.Any{}
	if err := anypb.MarshalFrom(a, m, proto.MarshalOptions{Deterministic: true}); err != nil {
		return nil, fmt.Errorf("marshal %s: %w", m.ProtoReflect().Descriptor().FullName(), err)
	}
	return a, nil
}

// version hashes the parts.
func version(parts ...[]byte) string {
	h := sha256.New()
	for _, p := range parts {
		h.Write(p)
	}
	return hex.EncodeToString(h.Sum(nil)[:16])
}

// A list collects resources and the errors of those that could not be made.
type list struct {
	resources []xds.Resource
	errs      []error
}

func (l *list) add(typeURL, name string, m message) {
	r, err := resource(typeURL, name, m)
	if err != nil {
		l.fail(fmt.Errorf("translate %s: %w", name, err))
		return
	}
	l.resources = append(l.resources, r)
}

func (l *list) fail(err error) { l.errs = append(l.errs, err) }

func (l *list) result() ([]xds.Resource, error) { return l.resources, errors.Join(l.errs...) }

// metadata says which object a message came of.
func metadata(kind, namespace, name string) *corev3.Metadata {
	return &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{
		MetadataKey: {Fields: map[string]*structpb.Value{
			"kind":      structpb.NewStringValue(kind),
			"namespace": structpb.NewStringValue(namespace),
			"name":      structpb.NewStringValue(name),
		}},
	}}
}

func u32(v uint32) *wrapperspb.UInt32Value { return wrapperspb.UInt32(v) }

// never is the duration that turns a timeout off.
func never() *durationpb.Duration { return durationpb.New(0) }

// overADS is where resources are fetched that others name. Routes are waited
// for without a limit: a listener without its routes would answer 404.
// Endpoints keep Envoy's limit of 15 s, after which those of the previous
// cluster of the same name are used.
func overADS(timeout *durationpb.Duration) *corev3.ConfigSource {
	return &corev3.ConfigSource{
		ResourceApiVersion:    corev3.ApiVersion_V3,
		ConfigSourceSpecifier: &corev3.ConfigSource_Ads{Ads: &corev3.AggregatedConfigSource{}},
		InitialFetchTimeout:   timeout,
	}
}
