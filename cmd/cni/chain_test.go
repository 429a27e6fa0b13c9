package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/sluicemesh/sluice/pkg/podwatch/cniapi"
	"github.com/sluicemesh/sluice/pkg/podwatch/cniapi/cniserver"
	"github.com/sluicemesh/sluice/tests/need"
	"github.com/sluicemesh/sluice/tests/netnstest"
)

// A chain is a node's container runtime, as far as it deals with CNI: libcni
// and the chain bridge (with host-local), sluice-cni. The node is a network
// namespace, so that bridge and veths go with it.
type chain struct {
	cni  *libcni.CNIConfig
	list *libcni.NetworkConfigList
	node netnstest.Namespace
	// ipam is where host-local keeps the addresses that it gave away.
	ipam string
}

func newChain(t *testing.T, dir, version, socket string) *chain {
	t.Helper()
	plugins := need.CNIPlugins(t)
	state := t.TempDir()
	ipam := filepath.Join(state, "ipam")
	list, err := libcni.NetworkConfFromBytes([]byte(fmt.Sprintf(`{
		"cniVersion": %q, "name": "pods",
		"plugins": [
			{"type": "bridge", "bridge": "cni0", "isGateway": true, "ipam": {
				"type": "host-local", "dataDir": %q,
				"ranges": [[{"subnet": "10.88.0.0/24"}], [{"subnet": "fd88::/64"}]]}},
			{"type": "sluice-cni", "socket": %q, "excludeNamespaces": ["kube-system"]}
		]}`, version, ipam, socket)))
	if err != nil {
		t.Fatal(err)
	}
	return &chain{
		cni:  libcni.NewCNIConfigWithCacheDir([]string{plugins, dir}, filepath.Join(state, "cache"), nil),
		list: list,
		node: netnstest.New(t, "node"),
		ipam: ipam,
	}
}

// on runs fn as a program on the node does, with time to spare.
func (c *chain) on(t *testing.T, fn func(context.Context) error) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	return c.node.Do(func() error { return fn(ctx) })
}

func (c *chain) add(t *testing.T, rt *libcni.RuntimeConf) (types.Result, error) {
	t.Helper()
	var res types.Result
	err := c.on(t, func(ctx context.Context) (err error) {
		res, err = c.cni.AddNetworkList(ctx, c.list, rt)
		return err
	})
	return res, err
}

func (c *chain) check(t *testing.T, rt *libcni.RuntimeConf) error {
	t.Helper()
	return c.on(t, func(ctx context.Context) error { return c.cni.CheckNetworkList(ctx, c.list, rt) })
}

func (c *chain) del(t *testing.T, rt *libcni.RuntimeConf) error {
	t.Helper()
	return c.on(t, func(ctx context.Context) error { return c.cni.DelNetworkList(ctx, c.list, rt) })
}

func (c *chain) status(t *testing.T) error {
	t.Helper()
	return c.on(t, func(ctx context.Context) error { return c.cni.GetStatusNetworkList(ctx, c.list) })
}

// leases counts the addresses that are given away.
func (c *chain) leases(t *testing.T) int {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(c.ipam, "pods", "*[0-9]"))
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, f := range files {
		if !strings.HasPrefix(filepath.Base(f), "last_reserved_ip") {
			n++
		}
	}
	return n
}

// sandbox is what the runtime says of a pod, as containerd does.
func sandbox(t *testing.T, namespace, name string) (*libcni.RuntimeConf, netnstest.Namespace) {
	t.Helper()
	ns := netnstest.New(t, name)
	id := "c0ffee" + name
	return &libcni.RuntimeConf{
		ContainerID: id,
		NetNS:       ns.Netns,
		IfName:      "eth0",
		Args: [][2]string{
			{"IgnoreUnknown", "1"},
			{"K8S_POD_NAMESPACE", namespace},
			{"K8S_POD_NAME", name},
			{"K8S_POD_INFRA_CONTAINER_ID", id},
			{"K8S_POD_UID", "uid-" + name},
		},
	}, ns
}

func code(err error) uint {
	var e *types.Error
	if !errors.As(err, &e) {
		return 0
	}
	return e.Code
}

// One pod's life through a real chain, in every version of the specification.
func TestChain(t *testing.T) {
	need.Root(t)
	dir := build(t)
	for _, tc := range []struct {
		version            string
		check, gcAndStatus bool
	}{
		{"0.3.1", false, false},
		{"0.4.0", true, false},
		{"1.0.0", true, false},
		{"1.1.0", true, true},
	} {
		t.Run(tc.version, func(t *testing.T) {
			f := &fake{}
			c := newChain(t, dir, tc.version, agent(t, f))
			rt, ns := sandbox(t, "shop", "web-0")

			res, err := c.add(t, rt)
			if err != nil {
				t.Fatalf("ADD: %v", err)
			}
			if res.Version() != tc.version {
				t.Errorf("result has version %s", res.Version())
			}
			r, err := current.NewResultFromResult(res)
			if err != nil {
				t.Fatal(err)
			}
			var addrs []netip.Addr
			for _, ip := range r.IPs {
				a, _ := netip.AddrFromSlice(ip.Address.IP)
				addrs = append(addrs, a.Unmap())
			}
			if len(addrs) != 2 || len(r.Interfaces) != 3 {
				t.Errorf("result lost something: %v", r)
			}
			calls, got := f.took()
			want := cniapi.Attachment{
				AttachmentID: cniapi.AttachmentID{ContainerID: rt.ContainerID, IfName: "eth0"},
				Network:      "pods",
				Netns:        ns.Netns,
				PodNamespace: "shop",
				PodName:      "web-0",
				PodUID:       "uid-web-0",
				Interfaces:   []cniapi.Interface{{Name: "eth0", Addrs: addrs}},
			}
			if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
				t.Errorf("attachment (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff([]string{"add web-0"}, calls); diff != "" {
				t.Errorf("calls (-want +got):\n%s", diff)
			}

			if tc.check {
				checkChain(t, c, f, rt, want)
			}
			if tc.gcAndStatus {
				gcAndStatus(t, c, f, rt)
			}

			for _, when := range []string{"DEL", "DEL again"} {
				if err := c.del(t, rt); err != nil {
					t.Errorf("%s: %v", when, err)
				}
				if calls, got := f.took(); len(calls) != 1 || calls[0] != "del web-0" || got.AttachmentID != want.AttachmentID {
					t.Errorf("%s: %v %v", when, calls, got)
				}
			}
			if n := c.leases(t); n != 0 {
				t.Errorf("%d addresses are still given away", n)
			}
		})
	}
}

func checkChain(t *testing.T, c *chain, f *fake, rt *libcni.RuntimeConf, want cniapi.Attachment) {
	t.Helper()
	if err := c.check(t, rt); err != nil {
		t.Errorf("CHECK: %v", err)
	}
	if _, got := f.took(); !cmp.Equal(want, got, cmpopts.EquateComparable(netip.Addr{})) {
		t.Errorf("CHECK: attachment %+v, want %+v", got, want)
	}
	f.fail(errors.New("redirection is not whole: the filter on eth0 is gone"))
	err := c.check(t, rt)
	f.fail(nil)
	if code(err) != codeRefused || err.Error() != "redirection is not whole: the filter on eth0 is gone" {
		t.Errorf("CHECK of a broken redirection: %v", err)
	}
	f.took()
}

func gcAndStatus(t *testing.T, c *chain, f *fake, rt *libcni.RuntimeConf) {
	t.Helper()
	valid := []types.GCAttachment{{ContainerID: rt.ContainerID, IfName: rt.IfName}}
	gc := func(args *libcni.GCArgs) error {
		return c.on(t, func(ctx context.Context) error { return c.cni.GCNetworkList(ctx, c.list, args) })
	}
	if err := gc(&libcni.GCArgs{ValidAttachments: valid}); err != nil {
		t.Errorf("GC: %v", err)
	}
	if diff := cmp.Diff([]cniapi.AttachmentID{{ContainerID: rt.ContainerID, IfName: "eth0"}}, f.valid); f.network != "pods" || diff != "" {
		t.Errorf("GC of network %q (-want +got):\n%s", f.network, diff)
	}
	if calls, _ := f.took(); !cmp.Equal(calls, []string{"gc"}) {
		t.Errorf("GC that keeps the pod: %v", calls)
	}
	f.fail(errors.New("map is locked"))
	if err := gc(&libcni.GCArgs{ValidAttachments: valid}); code(err) != codeRefused || !strings.Contains(err.Error(), ": map is locked") {
		t.Errorf("GC that fails: %v", err)
	}
	f.fail(nil)

	if err := c.status(t); err != nil {
		t.Errorf("STATUS: %v", err)
	}
	f.fail(errors.New("the source is not read yet"))
	if err := c.status(t); code(err) != types.ErrPluginNotAvailable || !strings.HasSuffix(err.Error(), "the source is not read yet") {
		t.Errorf("STATUS while not ready: %v", err)
	}
	f.fail(nil)
	f.took()

	// What no runtime knows any more is taken down, address included.
	if err := gc(&libcni.GCArgs{ValidAttachments: []types.GCAttachment{}}); err != nil {
		t.Errorf("GC of everything: %v", err)
	}
	if calls, _ := f.took(); !cmp.Equal(calls, []string{"del web-0", "gc"}) || f.valid == nil || len(f.valid) != 0 {
		t.Errorf("GC of everything: %v, valid %#v", calls, f.valid)
	}
	if n := c.leases(t); n != 0 {
		t.Errorf("GC leaves %d addresses", n)
	}
}

// A pod that the agent refuses does not start, and its event says why.
func TestAgentRefuses(t *testing.T) {
	need.Root(t)
	f := &fake{err: errors.New(`sluice.dev/backend: "ebfp": want auto, ebpf or iptables`)}
	c := newChain(t, build(t), "1.1.0", agent(t, f))
	rt, _ := sandbox(t, "shop", "web-0")
	_, err := c.add(t, rt)
	want := `plugin type="sluice-cni" failed (add): sluice.dev/backend: "ebfp": want auto, ebpf or iptables`
	if err == nil || err.Error() != want || code(err) != codeRefused {
		t.Errorf("got  %v (%d)\nwant %s", err, code(err), want)
	}
	// The runtime takes down what it could not set up.
	if err := c.del(t, rt); err != nil {
		t.Errorf("DEL: %v", err)
	}
	if n := c.leases(t); n != 0 {
		t.Errorf("%d addresses are still given away", n)
	}
}

// Without an agent no pod starts, but for those of excluded namespaces, and
// every pod can go.
func TestAgentDown(t *testing.T) {
	need.Root(t)
	dir := build(t)
	none := filepath.Join(t.TempDir(), "cni.sock")
	silent := filepath.Join(t.TempDir(), "silent.sock")
	ln, err := net.Listen("unix", silent)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })

	// The plugin alone, so that the time is its own.
	for _, tc := range []struct{ name, socket, want string }{
		{"no socket", none, "connect: no such file or directory"},
		{"no answer", silent, "no answer within 4.8s"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			conf := network(fmt.Sprintf(`"socket":%q,"prevResult":%s`, tc.socket, prev))
			start := time.Now()
			add := execute(t, dir, conf, request("ADD")...)
			if took := time.Since(start); took > cniapi.Budget {
				t.Errorf("ADD took %v, want at most %v", took, cniapi.Budget)
			}
			e := add.cniError(t)
			if e.Code != types.ErrTryAgainLater || !strings.HasPrefix(e.Msg, "sluice agent is not available on this node (socket "+tc.socket+"): ") ||
				!strings.HasSuffix(e.Msg, tc.want+"; pod sandbox creation is retried by the kubelet") {
				t.Errorf("ADD: %d %s", e.Code, e.Msg)
			}
			start = time.Now()
			del := execute(t, dir, conf, request("DEL")...)
			if took := time.Since(start); del.code != 0 || took > cniapi.Budget {
				t.Errorf("DEL took %v: %+v", took, del)
			}
		})
	}

	t.Run("chain", func(t *testing.T) {
		c := newChain(t, dir, "1.1.0", none)
		rt, ns := sandbox(t, "shop", "web-0")
		// ADD fails, and what bridge made can be taken down, also once the
		// sandbox is gone.
		if _, err := c.add(t, rt); code(err) != types.ErrTryAgainLater {
			t.Errorf("ADD: %v", err)
		}
		if n := c.leases(t); n != 2 {
			t.Errorf("%d addresses are given away, want 2: bridge did not run", n)
		}
		ns.Remove(t)
		if err := c.del(t, rt); err != nil {
			t.Errorf("DEL: %v", err)
		}
		if n := c.leases(t); n != 0 {
			t.Errorf("%d addresses are still given away", n)
		}
		if err := c.status(t); code(err) != types.ErrPluginNotAvailable {
			t.Errorf("STATUS: %v", err)
		}
		system, _ := sandbox(t, "kube-system", "dns-0")
		if _, err := c.add(t, system); err != nil {
			t.Errorf("ADD in an excluded namespace: %v", err)
		}
		if err := c.check(t, system); err != nil {
			t.Errorf("CHECK in an excluded namespace: %v", err)
		}
		if err := c.del(t, system); err != nil {
			t.Errorf("DEL in an excluded namespace: %v", err)
		}
	})
}

// An agent that is restarted finds its pods still there: nothing in the chain
// remembers the old one.
func TestAgentRestarts(t *testing.T) {
	need.Root(t)
	older, newer := &fake{}, &fake{}
	socket := agent(t, older)
	c := newChain(t, build(t), "1.1.0", socket)
	rt, _ := sandbox(t, "shop", "web-0")
	if _, err := c.add(t, rt); err != nil {
		t.Fatalf("ADD: %v", err)
	}
	s, err := cniserver.New(cniserver.Options{Socket: socket, Handler: newer})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	if err := c.check(t, rt); err != nil {
		t.Errorf("CHECK: %v", err)
	}
	if err := c.del(t, rt); err != nil {
		t.Errorf("DEL: %v", err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	before, _ := older.took()
	after, _ := newer.took()
	if !cmp.Equal(before, []string{"add web-0"}) || !cmp.Equal(after, []string{"check web-0", "del web-0"}) {
		t.Errorf("older was asked %v, newer %v", before, after)
	}
}
