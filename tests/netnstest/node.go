package netnstest

import (
	"fmt"
	"net/netip"
	"os"
	"sync"
	"testing"

	"github.com/sluicemesh/sluice/tests/need"
)

// A Node is the namespace of a node: what would be the host's on a real one.
// It routes between its networks.
type Node struct {
	Namespace
	tb testing.TB

	mu       sync.Mutex
	networks map[string]*network
	veths    int
}

// A network is a bridge of the node with one subnet of each family.
type network struct {
	bridge   string
	gateway4 netip.Prefix
	gateway6 netip.Prefix
	last4    netip.Addr
	last6    netip.Addr
}

// podNetwork is the network that pods are on; all others are reached through
// the node.
const podNetwork = "pods"

// NewNode makes a node without pods. It needs root.
func NewNode(tb testing.TB) *Node {
	tb.Helper()
	need.Root(tb)
	n := &Node{Namespace: newNamespace(tb, "node"), tb: tb, networks: make(map[string]*network)}
	n.Sysctl(tb, "net/ipv4/ip_forward", "1")
	n.Sysctl(tb, "net/ipv6/conf/all/forwarding", "1")
	n.network(podNetwork)
	return n
}

// Addr4 and Addr6 return the node's addresses on the pods' network.
func (n *Node) Addr4() netip.Addr { return n.network(podNetwork).gateway4.Addr() }

// Addr6 is Addr4 for IPv6.
func (n *Node) Addr6() netip.Addr { return n.network(podNetwork).gateway6.Addr() }

// network returns the named network and makes it if it is new. The first is
// 10.88.0.0/16 and fd00:88::/64, the next 10.89.0.0/16 and so on.
func (n *Node) network(name string) *network {
	n.tb.Helper()
	n.mu.Lock()
	defer n.mu.Unlock()
	if nw, ok := n.networks[name]; ok {
		return nw
	}
	i := len(n.networks)
	nw := &network{
		bridge:   fmt.Sprintf("br%d", i),
		gateway4: netip.MustParsePrefix(fmt.Sprintf("10.%d.0.1/16", 88+i)),
		gateway6: netip.MustParsePrefix(fmt.Sprintf("fd00:%d::1/64", 88+i)),
	}
	nw.last4, nw.last6 = nw.gateway4.Addr(), nw.gateway6.Addr()
	n.link(n.tb, func(h *handle) error {
		if err := h.bridge(nw.bridge); err != nil {
			return err
		}
		if err := h.addr(nw.bridge, nw.gateway4); err != nil {
			return err
		}
		return h.addr(nw.bridge, nw.gateway6)
	})
	n.networks[name] = nw
	return nw
}

// A Pod is a namespace with interfaces on networks of a node.
type Pod struct {
	Namespace
	// Addr4 and Addr6 are the addresses of eth0; zero without that family.
	Addr4, Addr6 netip.Addr

	node   *Node
	opts   PodOptions
	ifaces int
}

// PodOptions are what a pod may have otherwise than usual.
type PodOptions struct {
	NoIPv4, NoIPv6 bool
}

// An Interface is one more interface of a pod.
type Interface struct {
	Name         string
	Addr4, Addr6 netip.Addr
}

// Pod makes a pod on the pods' network, with addresses of both families on eth0
// and the node as default router. It lives until tb ends.
func (n *Node) Pod(tb testing.TB, name string) *Pod {
	tb.Helper()
	return n.newPod(tb, name, podNetwork, PodOptions{})
}

// PodWith is Pod with options.
func (n *Node) PodWith(tb testing.TB, name string, opts PodOptions) *Pod {
	tb.Helper()
	return n.newPod(tb, name, podNetwork, opts)
}

// Remote makes a machine on another network, which reaches the pods through
// the node.
func (n *Node) Remote(tb testing.TB, name string) *Pod {
	tb.Helper()
	return n.newPod(tb, name, "remote", PodOptions{})
}

func (n *Node) newPod(tb testing.TB, name, on string, opts PodOptions) *Pod {
	tb.Helper()
	p := &Pod{Namespace: newNamespace(tb, name), node: n, opts: opts}
	eth0 := p.attach(tb, on, "eth0")
	p.Addr4, p.Addr6 = eth0.Addr4, eth0.Addr6
	nw := n.network(on)
	p.link(tb, func(h *handle) error {
		if !opts.NoIPv4 {
			if err := h.defaultRoute(nw.gateway4.Addr()); err != nil {
				return err
			}
		}
		if opts.NoIPv6 {
			return nil
		}
		return h.defaultRoute(nw.gateway6.Addr())
	})
	return p
}

// Attach adds an interface on the named network, which is made if it is new:
// net1, net2 and so on.
func (p *Pod) Attach(tb testing.TB, network string) Interface {
	tb.Helper()
	return p.attach(tb, network, fmt.Sprintf("net%d", p.ifaces))
}

func (p *Pod) attach(tb testing.TB, on, iface string) Interface {
	tb.Helper()
	nw := p.node.network(on)
	p.node.mu.Lock()
	p.node.veths++
	local := fmt.Sprintf("v%d", p.node.veths)
	nw.last4, nw.last6 = nw.last4.Next(), nw.last6.Next()
	addr4, addr6 := nw.last4, nw.last6
	p.node.mu.Unlock()

	f, err := os.Open(p.Netns)
	if err != nil {
		tb.Fatalf("open namespace of %s: %v", p.Name, err)
	}
	defer func() { _ = f.Close() }()
	p.node.link(tb, func(h *handle) error { return h.veth(local, nw.bridge, iface, int(f.Fd())) })

	p.ifaces++
	got := Interface{Name: iface}
	p.link(tb, func(h *handle) error {
		if err := h.up(iface); err != nil {
			return err
		}
		if !p.opts.NoIPv4 {
			got.Addr4 = addr4
			if err := h.addr(iface, netip.PrefixFrom(addr4, nw.gateway4.Bits())); err != nil {
				return err
			}
		}
		if p.opts.NoIPv6 {
			return nil
		}
		got.Addr6 = addr6
		return h.addr(iface, netip.PrefixFrom(addr6, nw.gateway6.Bits()))
	})
	return got
}

// Addrs returns the pod's addresses, as a redirect.Workload holds them.
func (p *Pod) Addrs() []netip.Addr {
	var addrs []netip.Addr
	for _, a := range []netip.Addr{p.Addr4, p.Addr6} {
		if a.IsValid() {
			addrs = append(addrs, a)
		}
	}
	return addrs
}
