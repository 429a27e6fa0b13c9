package main

import (
	"context"
	"encoding/json"
	"flag"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/sluicemesh/sluice/pkg/podwatch"
	"github.com/sluicemesh/sluice/pkg/podwatch/cniapi"
	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/pkg/xds"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// A planned is everything that planning makes of a directory of YAML.
type planned struct {
	Services []xds.Service
	Pods     []plannedPod
}

type plannedPod struct {
	Pod      string
	Enabled  bool
	Workload *redirect.Workload `json:",omitempty"`
	Sidecar  *xds.Pod           `json:",omitempty"`
	Errors   []string           `json:",omitempty"`
}

// TestPlan compares what is planned for each directory below testdata/plan with
// the golden file in it.
func TestPlan(t *testing.T) {
	dirs, err := filepath.Glob("testdata/plan/*")
	if err != nil || len(dirs) == 0 {
		t.Fatalf("no cases: %v", err)
	}
	for _, dir := range dirs {
		t.Run(filepath.Base(dir), func(t *testing.T) {
			store := load(t, dir)
			got, err := json.MarshalIndent(planAll(store), "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, '\n')
			golden := filepath.Join(dir, "plan.golden")
			if *update {
				if err := os.WriteFile(golden, got, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), string(got)); diff != "" {
				t.Errorf("plan differs, -want +got; go test ./cmd/agent -update accepts it:\n%s", diff)
			}
		})
	}
}

// load reads a directory of YAML as the agent does, and fails for broken documents.
func load(t *testing.T, dir string) *podwatch.Store {
	t.Helper()
	store := podwatch.NewStore(podwatch.StoreOptions{})
	files, err := podwatch.NewFiles(podwatch.FilesOptions{Dir: dir, Store: store, Log: slog.New(slog.DiscardHandler), Node: "node-a"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	done := make(chan error, 1)
	go func() { done <- files.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("file source: %v", err)
		}
	})
	select {
	case <-store.Synced():
	case <-ctx.Done():
		t.Fatal("the source was not read in time")
	}
	for _, p := range files.Problems() {
		t.Errorf("broken document: %s", p)
	}
	return store
}

func planAll(store *podwatch.Store) planned {
	p := planner{
		node: "node-a", outboundPolicy: xds.OutboundPassthrough,
		redirectDefault: redirect.DefaultPolicy(), excluded: []string{"kube-system"},
	}
	var out planned
	for _, svc := range store.Services() {
		if s, ok := p.service(store, svc); ok {
			out.Services = append(out.Services, s)
		}
	}
	for _, pod := range store.Pods() {
		box := sandbox{
			ContainerID: "c-" + pod.Name, Namespace: pod.Namespace, Name: pod.Name, PodUID: pod.UID,
			Netns: "/run/netns/" + pod.Name, NetnsInode: 42,
			Attachments: map[string]attachment{"eth0": {Interfaces: []cniapi.Interface{{Name: "eth0", Addrs: pod.Addrs}}}},
		}
		x := plannedPod{Pod: pod.Namespace + "/" + pod.Name}
		note := func(err error) bool {
			if err != nil {
				x.Errors = append(x.Errors, err.Error())
			}
			return err == nil
		}
		var err error
		if x.Enabled, err = p.enabled(store, pod); note(err) && x.Enabled {
			if w, err := p.workload(pod, box); note(err) {
				x.Workload = &w
			}
			if s, err := p.sidecar(store, pod, box); note(err) {
				x.Sidecar = &s
			}
		}
		out.Pods = append(out.Pods, x)
	}
	return out
}

func TestSandboxNetwork(t *testing.T) {
	addrs := func(s ...string) (out []netip.Addr) {
		for _, a := range s {
			out = append(out, netip.MustParseAddr(a))
		}
		return out
	}
	for name, test := range map[string]struct {
		attachments map[string][]cniapi.Interface
		addrs       []netip.Addr
		interfaces  []string
	}{
		"one a family, the first": {
			map[string][]cniapi.Interface{"eth0": {{Name: "eth0", Addrs: addrs("10.0.0.2", "10.0.0.3", "fe80::1", "fd00::2")}}},
			addrs("10.0.0.2", "fd00::2"),
			[]string{"eth0"},
		},
		"families on two interfaces": {
			map[string][]cniapi.Interface{"eth0": {{Name: "eth0", Addrs: addrs("10.0.0.2")}, {Name: "eth1", Addrs: addrs("fd00::2")}}},
			addrs("10.0.0.2", "fd00::2"),
			[]string{"eth0", "eth1"},
		},
		"the first attachment is the pod's network": {
			map[string][]cniapi.Interface{
				"net1": {{Name: "net1", Addrs: addrs("192.0.2.1")}},
				"eth0": {{Name: "eth0", Addrs: addrs("::ffff:10.0.0.2")}},
			},
			addrs("10.0.0.2"),
			[]string{"eth0"},
		},
		"no address": {map[string][]cniapi.Interface{"eth0": {{Name: "eth0"}}}, nil, nil},
	} {
		t.Run(name, func(t *testing.T) {
			box := sandbox{Attachments: map[string]attachment{}}
			for name, interfaces := range test.attachments {
				box.Attachments[name] = attachment{Interfaces: interfaces}
			}
			gotAddrs, gotInterfaces := box.network()
			if diff := cmp.Diff(test.addrs, gotAddrs, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
				t.Errorf("addresses -want +got:\n%s", diff)
			}
			if diff := cmp.Diff(test.interfaces, gotInterfaces); diff != "" {
				t.Errorf("interfaces -want +got:\n%s", diff)
			}
		})
	}
}

// TestFeedsNode: a node's zone decides which endpoints every service has.
func TestFeedsNode(t *testing.T) {
	store := load(t, "testdata/plan/hints")
	fed := feeds(store, podwatch.Key{Kind: podwatch.KindNode, Name: "node-a"})
	if want := len(store.Services()); want == 0 || len(fed) != want {
		t.Errorf("node-a feeds %d services, want all %d", len(fed), want)
	}
	here := func(node string) int {
		svc, _ := podwatch.Get[*podwatch.Service](store, "shop", "zone-of-this-node")
		s, _ := planner{node: node}.service(store, svc)
		return len(s.Ports[0].Endpoints)
	}
	for node, want := range map[string]int{"node-a": 2, "node-b": 2, "of no zone": 3} {
		if got := here(node); got != want {
			t.Errorf("%s: %d endpoints, want %d", node, got, want)
		}
	}
}

// TestPortsAgree: the data plane leads to the ports that the sidecars listen on.
func TestPortsAgree(t *testing.T) {
	want := []uint16{redirect.AdminPort, redirect.OutboundPort, redirect.InboundPort, redirect.HealthPort}
	got := []uint16{xds.PortAdmin, xds.PortOutbound, xds.PortInbound, xds.PortHealth}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("ports of redirection and of xDS, -want +got:\n%s", diff)
	}
}

// TestProxyUser: without an annotation the proxy is known by the user that the
// pod has it run as, but never by one that the application has as well.
func TestProxyUser(t *testing.T) {
	fallback := redirect.DefaultPolicy().ProxyUID
	proxy, app := podwatch.Container{Name: "sluice-proxy", User: 2337}, podwatch.Container{Name: "app", User: 1000}
	box := sandbox{Attachments: map[string]attachment{"eth0": {Interfaces: []cniapi.Interface{{Name: "eth0", Addrs: []netip.Addr{netip.MustParseAddr("10.1.0.5")}}}}}}
	for name, tc := range map[string]struct {
		containers  []podwatch.Container
		annotations map[string]string
		want        uint32
	}{
		"said":             {[]podwatch.Container{proxy, app}, nil, 2337},
		"annotation wins":  {[]podwatch.Container{proxy, app}, map[string]string{"sluice.dev/proxy-uid": "2102"}, 2102},
		"not said":         {[]podwatch.Container{{Name: "sluice-proxy"}, app}, nil, fallback},
		"no proxy":         {[]podwatch.Container{app}, nil, fallback},
		"also application": {[]podwatch.Container{proxy, app, {Name: "b", User: 2337}}, nil, fallback},
		"nobody":           {[]podwatch.Container{{Name: "sluice-proxy", User: 1<<32 - 1}, app}, nil, fallback},
		"too large":        {[]podwatch.Container{{Name: "sluice-proxy", User: 1<<32 + 1337}, app}, nil, fallback},
	} {
		t.Run(name, func(t *testing.T) {
			p := planner{redirectDefault: redirect.DefaultPolicy()}
			w, err := p.workload(&podwatch.Pod{Meta: podwatch.Meta{Annotations: tc.annotations}, Containers: tc.containers}, box)
			if err != nil {
				t.Fatal(err)
			}
			if w.Policy.ProxyUID != tc.want {
				t.Errorf("proxy is user %d, want %d", w.Policy.ProxyUID, tc.want)
			}
		})
	}
}
