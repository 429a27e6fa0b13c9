package translate

import (
	"errors"
	"fmt"
	"net/netip"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/sluicemesh/sluice/pkg/xds"
)

// Names of filter chains, as the access log shows them.
const (
	httpChain        = "http"
	tcpChain         = "tcp"
	passthroughChain = "passthrough"
	blackholeChain   = "blackhole"
)

// rawBuffer is the transport protocol of connections that were not looked at.
// Envoy compares the fields of a match one after the other: a chain that leaves
// one out loses against chains that do not, so it is always set.
const rawBuffer = "raw_buffer"

// bound is a listener with sockets of its own. What it accepts is handed to
// the virtual listener of the original destination; without one, what dialled
// this port itself is closed and all else goes to cluster.
func (t *Translator) bound(name string, port uint16, families []netip.Addr, direction corev3.TrafficDirection, cluster string) (*listenerv3.Listener, error) {
	loop, err := t.tcpFilter(direction, BlackholeCluster, 1)
	if err != nil {
		return nil, err
	}
	rest, err := t.tcpFilter(direction, cluster, 1)
	if err != nil {
		return nil, err
	}
	chain := passthroughChain
	if cluster == BlackholeCluster {
		chain = blackholeChain
	}
	l := t.socketListener(name, port, families)
	l.TrafficDirection = direction
	l.UseOriginalDst = wrapperspb.Bool(true)
	l.FilterChains = []*listenerv3.FilterChain{{
		Name: blackholeChain + "-self",
		FilterChainMatch: &listenerv3.FilterChainMatch{
			DestinationPort:   u32(uint32(port)),
			TransportProtocol: rawBuffer,
		},
		Filters: []*listenerv3.Filter{loop},
	}}
	l.DefaultFilterChain = &listenerv3.FilterChain{Name: chain, Filters: []*listenerv3.Filter{rest}}
	return l, nil
}

// socketListener listens on port of the wildcard address of each family.
func (t *Translator) socketListener(name string, port uint16, families []netip.Addr) *listenerv3.Listener {
	l := &listenerv3.Listener{
		Name:       name,
		StatPrefix: name,
		// Envoy's own 128 lets bursts of connections be dropped; the kernel
		// cuts this to net.core.somaxconn.
		TcpBacklogSize: u32(65535),
		// Inherited by what is accepted; see cluster.
		TcpKeepalive: keepalive(),
	}
	addrs := make([]netip.AddrPort, len(families))
	for i, f := range families {
		addrs[i] = netip.AddrPortFrom(unspecified(f), port)
	}
	setAddresses(l, addrs)
	return l
}

// unspecified is the wildcard address in the family of a.
func unspecified(a netip.Addr) netip.Addr {
	if a.Is4() {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

// virtual is a listener without sockets: it takes over, from a bound one,
// connections whose original destination is one of addrs.
func (t *Translator) virtual(name string, addrs []netip.AddrPort, direction corev3.TrafficDirection,
	p xds.Protocol, http *hcmv3.HttpConnectionManager, cluster string, attempts uint32,
) (*listenerv3.Listener, error) {
	l := &listenerv3.Listener{
		Name:             name,
		StatPrefix:       name,
		TrafficDirection: direction,
		BindToPort:       wrapperspb.Bool(false),
	}
	setAddresses(l, addrs)
	if p != xds.ProtocolTCP {
		filter, err := httpFilter(http)
		if err != nil {
			return nil, err
		}
		l.DefaultFilterChain = &listenerv3.FilterChain{Name: httpChain, Filters: []*listenerv3.Filter{filter}}
		if p != xds.ProtocolAuto {
			return l, nil
		}
		l.FilterChains = []*listenerv3.FilterChain{l.DefaultFilterChain}
		l.FilterChains[0].FilterChainMatch = &listenerv3.FilterChainMatch{
			TransportProtocol:    rawBuffer,
			ApplicationProtocols: []string{"http/1.0", "http/1.1", "h2c"},
		}
		l.ListenerFilters = []*listenerv3.ListenerFilter{{
			Name:       "http_inspector",
			ConfigType: &listenerv3.ListenerFilter_TypedConfig{TypedConfig: t.httpInspector},
		}}
		l.ListenerFiltersTimeout = durationpb.New(t.opts.ProtocolDetectionTimeout)
		l.ContinueOnListenerFiltersTimeout = true
	}
	filter, err := t.tcpFilter(direction, cluster, attempts)
	if err != nil {
		return nil, err
	}
	l.DefaultFilterChain = &listenerv3.FilterChain{Name: tcpChain, Filters: []*listenerv3.Filter{filter}}
	return l, nil
}

// tcpFilter leads bytes to cluster, with as many attempts to connect. Either
// side may close its half, and both may be silent for as long as they like.
func (t *Translator) tcpFilter(direction corev3.TrafficDirection, cluster string, attempts uint32) (*listenerv3.Filter, error) {
	config, err := pack(&tcpv3.TcpProxy{
		StatPrefix:         statPrefix(direction),
		ClusterSpecifier:   &tcpv3.TcpProxy_Cluster{Cluster: cluster},
		IdleTimeout:        never(),
		MaxConnectAttempts: u32(attempts),
		AccessLog:          t.logs[logKey{direction: direction}],
	})
	if err != nil {
		return nil, err
	}
	return &listenerv3.Filter{Name: "tcp", ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: config}}, nil
}

// statPrefix sums the statistics of all listeners of a direction; each
// service's own are those of its cluster.
func statPrefix(direction corev3.TrafficDirection) string {
	if direction == corev3.TrafficDirection_INBOUND {
		return "inbound"
	}
	return "outbound"
}

// setAddresses gives l its addresses, of which there is at least one.
func setAddresses(l *listenerv3.Listener, addrs []netip.AddrPort) {
	for i, a := range addrs {
		if i == 0 {
			l.Address = address(a)
			continue
		}
		l.AdditionalAddresses = append(l.AdditionalAddresses, &listenerv3.AdditionalAddress{Address: address(a)})
	}
}

func address(a netip.AddrPort) *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: socketAddress(a)}}
}

func socketAddress(a netip.AddrPort) *corev3.SocketAddress {
	return &corev3.SocketAddress{
		Address:       a.Addr().String(),
		PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: uint32(a.Port())},
	}
}

// checkAddrs makes sure that listeners can be given these addresses.
func checkAddrs(addrs []netip.Addr) error {
	var errs []error
	for _, a := range addrs {
		if !a.IsValid() || a.IsUnspecified() || a.Is4In6() || a.Zone() != "" {
			errs = append(errs, fmt.Errorf("address %s cannot be listened on", a))
		}
	}
	return errors.Join(errs...)
}
