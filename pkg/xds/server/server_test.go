package server

import (
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/sluicemesh/sluice/pkg/xds"
)

// service is what the translator makes of a service, roughly.
func service(name, v string) []xds.Resource {
	return []xds.Resource{
		res(clusters, name, "c"+v), res(endpoints, name, "e"+v), res(listeners, name, "l"+v), res(routes, name, "r"+v),
	}
}

// follow subscribes to everything that service makes and takes it.
func (c *client) follow(name, v string) {
	c.t.Helper()
	c.subscribe(clusters)
	c.expectAck("cluster +" + name + "=c" + v)
	c.subscribe(endpoints, name)
	c.expectAck("endpoint +" + name + "=e" + v)
	c.subscribe(listeners)
	c.expectAck("listener +" + name + "=l" + v)
	c.subscribe(routes, name)
	c.expectAck("route +" + name + "=r" + v)
}

func TestProtocol(t *testing.T) {
	tests := []struct {
		name string
		do   func(t *testing.T, r *rig)
	}{
		{"a first wildcard is answered even if there is nothing", func(_ *testing.T, r *rig) {
			c := r.delta("a")
			c.subscribe(clusters) // without names
			c.expectAck("cluster")
			c.subscribe(listeners, "*")
			c.expectAck("listener")
			c.quiet()
		}},
		{"endpoints and routes have no implicit wildcard", func(_ *testing.T, r *rig) {
			r.share("s", service("s", "1")...)
			c := r.delta("a")
			c.subscribe(endpoints)
			c.subscribe(routes)
			c.quiet()
			c.subscribe(endpoints, "*") // an explicit one they have
			c.expectAck("endpoint +s=e1")
		}},
		{"only what changed is sent", func(_ *testing.T, r *rig) {
			r.share("s", res(clusters, "x", "1"), res(clusters, "y", "1"))
			r.share("t", res(clusters, "z", "1"))
			c := r.delta("a")
			c.subscribe(clusters)
			c.expectAck("cluster +x=1 +y=1 +z=1")
			r.share("s", res(clusters, "x", "1"), res(clusters, "y", "2"))
			c.expectAck("cluster +y=2")
			r.share("s", res(clusters, "x", "1"), res(clusters, "y", "2")) // equal
			c.quiet()
		}},
		{"only to those who subscribe", func(_ *testing.T, r *rig) {
			r.share("s", res(endpoints, "x", "1"), res(endpoints, "y", "1"))
			c := r.delta("a")
			c.subscribe(endpoints, "x")
			c.expectAck("endpoint +x=1")
			r.share("s", res(endpoints, "x", "1"), res(endpoints, "y", "2"))
			c.quiet()
			c.unsubscribe(endpoints, "x")
			c.quiet()
			r.share("s", res(endpoints, "x", "2"))
			c.quiet()
		}},
		{"unknown names are answered, and followed", func(_ *testing.T, r *rig) {
			c := r.delta("a")
			c.subscribe(endpoints, "x")
			c.expectAck("endpoint +x=empty")
			c.subscribe(clusters, "x") // there is no empty cluster
			c.expectAck("cluster -x")
			r.share("s", res(endpoints, "x", "1"), res(clusters, "x", "1"))
			c.expectAck("cluster +x=1")
			c.expectAck("endpoint +x=1")
		}},
		{"what is subscribed to again is answered again", func(_ *testing.T, r *rig) {
			r.share("s", service("s", "1")...)
			c := r.delta("a")
			c.follow("s", "1")
			c.subscribe(endpoints, "s")
			c.expectAck("endpoint +s=e1")
			c.subscribe(clusters, "s") // beside the wildcard
			c.expectAck("cluster +s=c1")
			c.unsubscribe(clusters, "s")
			c.expectAck("cluster +s=c1") // still has it
			c.quiet()
		}},
		{"unsubscribing from the wildcard", func(_ *testing.T, r *rig) {
			r.share("s", res(clusters, "x", "1"), res(clusters, "y", "1"))
			c := r.delta("a")
			c.subscribe(clusters, "*", "x")
			c.expectAck("cluster +x=1 +y=1")
			c.unsubscribe(clusters, "*")
			r.share("s", res(clusters, "x", "2"), res(clusters, "y", "2"))
			c.expectAck("cluster +x=2")
			c.quiet()
		}},
		{"endpoints come again with their cluster", func(_ *testing.T, r *rig) {
			r.share("s", service("s", "1")...)
			c := r.delta("a")
			c.follow("s", "1")
			r.share("s", res(clusters, "s", "c2"), res(endpoints, "s", "e1+c2"), res(listeners, "s", "l1"), res(routes, "s", "r1"))
			c.expectAck("cluster +s=c2")
			c.expectAck("endpoint +s=e1+c2")
			c.quiet()
		}},
		{"additions wait for the types before them", func(_ *testing.T, r *rig) {
			r.share("s", service("s", "1")...)
			c := r.delta("a")
			c.follow("s", "1")
			r.share("s", service("s", "2")...)
			// Envoy answers for a cluster when it is warm, for which it needs
			// the endpoints: they wait for the cluster to be sent only.
			cluster := c.expect("cluster +s=c2")
			c.ack(c.expect("endpoint +s=e2"))
			c.quiet()
			c.ack(cluster)
			for _, want := range []string{"listener +s=l2", "route +s=r2"} {
				resp := c.expect(want)
				if resp.GetTypeUrl() != xds.RouteType {
					c.quiet() // nothing more before the answer
				}
				c.ack(resp)
			}
			c.quiet()
		}},
		{"a change of routes does not wait for unrelated later clusters", func(_ *testing.T, r *rig) {
			r.share("s", service("s", "1")...)
			c := r.delta("a")
			c.follow("s", "1")
			r.share("r", res(routes, "s", "r0")) // first by name
			route := c.expect("route +s=r0")
			r.share("t", res(clusters, "t", "1"))
			c.expect("cluster +t=1") // never answered
			c.ack(route)
			c.quiet()
		}},
		{"removals wait for those who refer to them", func(_ *testing.T, r *rig) {
			r.share("s", service("s", "1")...)
			c := r.delta("a")
			c.follow("s", "1")
			r.share("s")
			resp := c.expect("listener -s")
			c.quiet()
			c.unsubscribe(routes, "s") // as Envoy does when it applies the removal
			c.ack(resp)
			c.expectAck("cluster -s")
			c.unsubscribe(endpoints, "s")
			c.quiet()
		}},
		{"a route moves off a cluster before that goes", func(_ *testing.T, r *rig) {
			r.share("s", service("s", "1")...)
			c := r.delta("a")
			c.follow("s", "1")
			r.share("s", res(clusters, "new", "1"), res(endpoints, "new", "1"), res(listeners, "s", "l1"), res(routes, "s", "to new"))
			resp := c.expect("cluster +new=1")
			c.subscribe(endpoints, "new")
			c.ack(resp)
			c.expectAck("endpoint +new=1")
			resp = c.expect("route +s=to new")
			c.quietBefore(endpoints)
			c.ack(resp)
			c.expectAck("cluster -s")
		}},
		{"a new listener comes with the removal that frees its address", func(_ *testing.T, r *rig) {
			r.share("s", res(listeners, "old", "1"))
			c := r.delta("a")
			c.subscribe(listeners)
			c.expectAck("listener +old=1")
			r.share("s", res(listeners, "new", "1"))
			c.expectAck("listener +new=1 -old")
		}},
		{"a removed name that comes back is not removed", func(_ *testing.T, r *rig) {
			r.share("s", service("s", "1")...)
			c := r.delta("a")
			c.follow("s", "1")
			r.share("s")
			resp := c.expect("listener -s")
			r.share("s", service("s", "2")...)
			c.ack(resp)
			c.expectAck("cluster +s=c2")
			c.expectAck("endpoint +s=e2")
			c.expectAck("listener +s=l2")
			c.expectAck("route +s=r2")
			c.quiet()
		}},
		{"reconnecting costs only the difference", func(_ *testing.T, r *rig) {
			r.share("s", service("s", "1")...)
			r.share("t", service("t", "1")...)
			c := r.delta("a")
			c.send(&discovery.DeltaDiscoveryRequest{TypeUrl: xds.ClusterType, InitialResourceVersions: map[string]string{"s": "c1", "t": "c0", "u": "c1"}})
			c.expectAck("cluster +t=c1")
			c.send(&discovery.DeltaDiscoveryRequest{
				TypeUrl: xds.EndpointType, ResourceNamesSubscribe: []string{"s", "t", "u"},
				InitialResourceVersions: map[string]string{"s": "e1", "t": "e0", "u": "empty"},
			})
			c.expectAck("endpoint +t=e1")
			c.send(&discovery.DeltaDiscoveryRequest{
				TypeUrl: xds.RouteType, ResourceNamesSubscribe: []string{"s", "t", "u"},
				InitialResourceVersions: map[string]string{"s": "r1", "t": "r1", "u": "r1"},
			})
			c.expectAck("route +u=empty")
			c.send(&discovery.DeltaDiscoveryRequest{TypeUrl: xds.ListenerType, InitialResourceVersions: map[string]string{"s": "l1", "t": "l1", "u": "l1"}})
			c.expectAck("listener -u")
			c.expectAck("cluster -u") // after the listener that led to it
			c.quiet()
			r.share("s", service("s", "2")...)
			c.expectAck("cluster +s=c2")
		}},
		{"reconnecting without a difference costs nothing", func(_ *testing.T, r *rig) {
			r.share("s", service("s", "1")...)
			c := r.delta("a")
			c.send(&discovery.DeltaDiscoveryRequest{TypeUrl: xds.ClusterType, InitialResourceVersions: map[string]string{"s": "c1"}})
			c.send(&discovery.DeltaDiscoveryRequest{TypeUrl: xds.EndpointType, ResourceNamesSubscribe: []string{"s"}, InitialResourceVersions: map[string]string{"s": "e1"}})
			c.send(&discovery.DeltaDiscoveryRequest{TypeUrl: xds.ListenerType, InitialResourceVersions: map[string]string{"s": "l1"}})
			c.send(&discovery.DeltaDiscoveryRequest{TypeUrl: xds.RouteType, ResourceNamesSubscribe: []string{"s"}, InitialResourceVersions: map[string]string{"s": "r1"}})
			c.quiet()
		}},
		{"an unknown nonce answers nothing", func(_ *testing.T, r *rig) {
			r.share("s", res(clusters, "x", "1"))
			c := r.delta("a")
			c.subscribe(clusters)
			resp := c.expect("cluster +x=1")
			c.send(&discovery.DeltaDiscoveryRequest{TypeUrl: xds.ClusterType, ResponseNonce: "no such"})
			r.share("s", res(clusters, "x", "2"))
			c.quiet() // still waiting for the right one
			c.ack(resp)
			c.expectAck("cluster +x=2")
		}},
		{"types that are not served are ignored", func(_ *testing.T, r *rig) {
			c := r.delta("a")
			c.send(&discovery.DeltaDiscoveryRequest{TypeUrl: "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"})
			c.quiet()
		}},
		{"private resources hide shared ones", func(_ *testing.T, r *rig) {
			r.share("s", res(listeners, "x", "shared"), res(listeners, "y", "shared"))
			r.set("a", res(listeners, "x", "own"))
			c, other := r.delta("a"), r.delta("b")
			r.set("b")
			c.subscribe(listeners)
			c.expectAck("listener +x=own +y=shared")
			other.subscribe(listeners)
			other.expectAck("listener +x=shared +y=shared")
			r.share("s", res(listeners, "x", "shared 2"))
			other.expectAck("listener +x=shared 2 -y")
			c.expectAck("listener -y")
			r.set("a")
			c.expectAck("listener +x=shared 2")
			c.quiet()
			other.quiet()
		}},
		{"a pod sees the base that it names", func(_ *testing.T, r *rig) {
			r.share("base/pass", res(clusters, "out", "pass"), res(clusters, "both", "1"), res(clusters, "pass", "1"))
			r.share("base/block", res(clusters, "out", "block"), res(clusters, "both", "1"))
			r.SetPod(Pod{UID: "a", Base: "base/pass"}, nil, time.Time{})
			c := r.delta("a")
			c.subscribe(clusters)
			c.expectAck("cluster +both=1 +out=pass +pass=1")
			c.subscribe(listeners)
			c.expectAck("listener")
			c.quiet()
			r.SetPod(Pod{UID: "a", Base: "base/block"}, nil, time.Time{})
			c.expectAck("cluster +out=block")
			c.expectAck("cluster -pass")
			r.share("base/pass", res(clusters, "out", "pass 2"))
			c.quiet()
		}},
		{"the first of two owners has a name", func(t *testing.T, r *rig) {
			r.share("m", res(clusters, "x", "of m"))
			r.share("b", res(clusters, "x", "of b"))
			c := r.delta("a")
			c.subscribe(clusters)
			c.expectAck("cluster +x=of b")
			r.share("b")
			c.expectAck("cluster +x=of m")
			if r.logs.count("another owner") != 1 {
				t.Error("the clash was not logged")
			}
		}},
		{"two streams of a pod are independent", func(_ *testing.T, r *rig) {
			r.share("s", res(clusters, "x", "1"))
			one, two := r.delta("a"), r.delta("a")
			for _, c := range []*client{one, two} {
				c.subscribe(clusters)
				c.expect("cluster +x=1")
			}
			two.ack(&discovery.DeltaDiscoveryResponse{TypeUrl: xds.ClusterType, Nonce: "1"})
			r.share("s", res(clusters, "x", "2"))
			two.expectAck("cluster +x=2")
			one.end()
			r.share("s", res(clusters, "x", "3"))
			two.expectAck("cluster +x=3")
		}},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			r := start(t, Options{RemoveTimeout: time.Minute}).ready()
			r.set("a")
			tc.do(t, r)
		})
	}
}

func TestNACK(t *testing.T) {
	const reason = "Error adding/updating cluster(s) bad: no such filter"
	tests := []struct {
		name string
		do   func(t *testing.T, r *rig, pods []*client)
	}{
		{"a rejected resource is not sent again, the others go on", func(_ *testing.T, r *rig, pods []*client) {
			r.share("s", res(clusters, "bad", "1"), res(clusters, "good", "1"))
			c := pods[0]
			c.nack(c.expect("cluster +bad=1 +good=1"), reason)
			c.quiet()
			r.share("s", res(clusters, "bad", "1"), res(clusters, "good", "2"))
			c.expectAck("cluster +good=2")
			c.quiet()
		}},
		{"a new version lifts the quarantine", func(_ *testing.T, r *rig, pods []*client) {
			r.share("s", res(clusters, "bad", "1"))
			pods[0].nack(pods[0].expect("cluster +bad=1"), reason)
			pods[0].quiet()
			r.share("s", res(clusters, "bad", "2"))
			pods[0].expectAck("cluster +bad=2")
			if s := r.Status(); len(s[0].Rejected) != 0 {
				r.t.Errorf("still reported: %+v", s[0].Rejected)
			}
		}},
		{"the last good version is kept and served", func(_ *testing.T, r *rig, pods []*client) {
			r.share("s", res(clusters, "bad", "1"))
			for _, c := range pods {
				c.expectAck("cluster +bad=1")
			}
			for _, c := range pods {
				c.quiet() // the answer has arrived
			}
			r.share("s", res(clusters, "bad", "2"))
			for _, c := range pods[:quorum] {
				c.nack(c.expect("cluster +bad=2"), reason)
				c.expectAck("cluster +bad=1") // it may be a new Envoy that never had it
				c.quiet()
			}
			late := r.delta("late")
			r.set("late")
			late.subscribe(clusters)
			late.expectAck("cluster +bad=1")
			late.quiet()
		}},
		{"one pod alone cannot keep a version from the others", func(_ *testing.T, r *rig, pods []*client) {
			r.share("s", res(clusters, "bad", "1"))
			pods[0].nack(pods[0].expect("cluster +bad=1"), reason)
			pods[0].quiet()
			late := r.delta("late")
			r.set("late")
			late.subscribe(clusters)
			late.expectAck("cluster +bad=1")
		}},
		{"a version that somebody accepts is kept only from those who reject it", func(_ *testing.T, r *rig, pods []*client) {
			r.share("s", res(clusters, "bad", "1"))
			third := pods[2].expect("cluster +bad=1")
			for _, c := range pods[:2] {
				c.nack(c.expect("cluster +bad=1"), reason)
				c.quiet()
			}
			late := r.delta("late")
			r.set("late")
			late.subscribe(clusters)
			late.expectAck("cluster")
			pods[2].ack(third)
			late.expectAck("cluster +bad=1")
			pods[0].quiet()
		}},
		{"an error without a name is traced to its resource", func(t *testing.T, r *rig, pods []*client) {
			var all []xds.Resource
			for i := range 10 {
				all = append(all, res(clusters, fmt.Sprintf("c%d", i), "1"))
			}
			r.share("s", all...)
			c, good, n := pods[0], map[string]bool{}, 0
			for len(good) < 9 {
				resp := <-c.in
				n++
				bad := false
				for _, x := range resp.GetResources() {
					bad = bad || x.GetName() == "c7"
				}
				if bad {
					c.nack(resp, "Proto constraint validation failed")
					continue
				}
				for _, x := range resp.GetResources() {
					good[x.GetName()] = true
				}
				c.ack(resp)
			}
			for n < 20 && len(r.Status()[0].Rejected) == 0 {
				resp, ok := <-c.in
				if !ok {
					t.Fatal("stream ended")
				}
				n++
				c.nack(resp, "Proto constraint validation failed")
				r.until("the answer is handled", func() bool { return r.acked("a") >= uint64(n) })
			}
			c.quiet()
			if got := r.Status()[0].Rejected; len(got) != 1 || got[0].Name != "c7" || got[0].Error != "Proto constraint validation failed" {
				t.Errorf("got %+v", got)
			}
			if n > 9 {
				t.Errorf("took %d responses", n)
			}
		}},
		{"it is reported by name, once", func(t *testing.T, r *rig, pods []*client) {
			r.share("s", res(clusters, "bad", "1"), res(clusters, "good", "1"))
			var sent []*discovery.DeltaDiscoveryResponse
			for _, c := range pods {
				sent = append(sent, c.expect("cluster +bad=1 +good=1"))
			}
			for i, c := range pods {
				c.nack(sent[i], reason)
				c.quiet()
			}
			got := r.Status()[0].Rejected
			if len(got) != 1 {
				t.Fatalf("got %+v", got)
			}
			want := Rejection{TypeURL: xds.ClusterType, Name: "bad", Version: "1", Error: "no such filter", Time: got[0].Time}
			if diff := cmp.Diff(want, got[0]); diff != "" {
				t.Error(diff)
			}
			if n := r.logs.count("level=ERROR"); n != 1 {
				t.Errorf("%d errors logged", n)
			}
			err := testutil.CollectAndCompare(multi(r.metrics.all), strings.NewReader(`
				# HELP sluice_xds_nacks_total Responses that sidecars rejected, in whole or in part, by type of resource.
				# TYPE sluice_xds_nacks_total counter
				sluice_xds_nacks_total{type="cluster"} 3
				sluice_xds_nacks_total{type="endpoint"} 0
				sluice_xds_nacks_total{type="listener"} 0
				sluice_xds_nacks_total{type="route"} 0
				# HELP sluice_xds_quarantined_resources Resources whose newest version at least one sidecar rejected.
				# TYPE sluice_xds_quarantined_resources gauge
				sluice_xds_quarantined_resources 1
				`), "sluice_xds_nacks_total", "sluice_xds_quarantined_resources")
			if err != nil {
				t.Error(err)
			}
		}},
		{"endpoints beside a rejected one are sent again", func(_ *testing.T, r *rig, pods []*client) {
			r.share("s", res(endpoints, "x", "1"), res(endpoints, "y", "1"))
			c := pods[0]
			c.subscribe(endpoints, "x", "y")
			c.nack(c.expect("endpoint +x=1 +y=1"), "malformed IP address")
			c.expectAck("endpoint +x=1")
			c.nack(c.expect("endpoint +y=1"), "malformed IP address")
			c.expectAck("endpoint +y=empty") // a cluster waits for an answer
			c.quiet()
		}},
		{"a client that rejects everything is not asked again and again", func(_ *testing.T, r *rig, pods []*client) {
			r.share("s", res(endpoints, "x", "1"))
			c := pods[0]
			c.subscribe(endpoints, "x")
			c.nack(c.expect("endpoint +x=1"), "no")
			c.nack(c.expect("endpoint +x=empty"), "no")
			c.quiet()
		}},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			r := start(t, Options{RemoveTimeout: time.Minute}).ready()
			var pods []*client
			for _, pod := range []string{"a", "b", "c"} {
				r.set(pod)
				c := r.delta(pod)
				c.subscribe(clusters)
				c.expectAck("cluster")
				pods = append(pods, c)
			}
			tc.do(t, r, pods)
		})
	}
}

// multi makes one collector of many.
type multi []prometheus.Collector

func (m multi) Describe(ch chan<- *prometheus.Desc) {
	for _, c := range m {
		c.Describe(ch)
	}
}

func (m multi) Collect(ch chan<- prometheus.Metric) {
	for _, c := range m {
		c.Collect(ch)
	}
}

// acked is the number of responses about clusters that the pod has answered.
func (r *rig) acked(pod string) uint64 {
	for _, p := range r.Status() {
		for _, ty := range p.Types {
			if p.Pod.UID == pod && ty.Type == "cluster" {
				return ty.Acked + ty.Nacked - 1 // the empty one at first
			}
		}
	}
	return 0
}

func TestWorld(t *testing.T) {
	tests := []struct {
		name string
		do   func(t *testing.T, r *rig, c *worldClient)
	}{
		{"wildcards are answered with everything", func(_ *testing.T, r *rig, c *worldClient) {
			c.request(&discovery.DiscoveryRequest{TypeUrl: xds.ClusterType})
			c.ack(c.expect("cluster"))
			r.share("s", res(clusters, "x", "x1"), res(clusters, "y", "y1"))
			c.ack(c.expect("cluster x1 y1"))
			r.share("s", res(clusters, "x", "x2"), res(clusters, "y", "y1"))
			c.ack(c.expect("cluster x2 y1"))
		}},
		{"names", func(_ *testing.T, r *rig, c *worldClient) {
			r.share("s", res(endpoints, "x", "x1"), res(endpoints, "y", "y1"))
			c.request(&discovery.DiscoveryRequest{TypeUrl: xds.EndpointType, ResourceNames: []string{"x"}})
			resp := c.expect("endpoint x1")
			c.ack(resp, "x", "z")
			c.ack(c.expect("endpoint x1 empty"), "z")
			r.share("s", res(endpoints, "x", "x2"), res(endpoints, "z", "z1"))
			c.ack(c.expect("endpoint z1"), "z")
		}},
		{"a rejection makes no loop", func(t *testing.T, r *rig, c *worldClient) {
			r.share("s", res(clusters, "bad", "b1"), res(clusters, "x", "x1"))
			c.request(&discovery.DiscoveryRequest{TypeUrl: xds.ClusterType})
			first := c.expect("cluster b1 x1")
			c.ack(first)
			r.share("s", res(clusters, "bad", "b2"), res(clusters, "x", "x2"))
			c.nack(c.expect("cluster b2 x2"), first.GetVersionInfo(), "Error adding/updating cluster(s) bad: no")
			c.ack(c.expect("cluster b1 x2")) // the last good one
			r.share("s", res(clusters, "bad", "b3"), res(clusters, "x", "x3"))
			c.nack(c.expect("cluster b3 x3"), first.GetVersionInfo(), "no name")
			r.share("t", res(clusters, "y", "y1"))
			c.ack(c.expect("cluster b3 x3 y1")) // not before something changes
			if n := r.logs.count("named no resource"); n != 1 {
				t.Errorf("%d errors logged", n)
			}
		}},
		{"old nonces are ignored", func(_ *testing.T, r *rig, c *worldClient) {
			r.share("s", res(clusters, "x", "x1"))
			c.request(&discovery.DiscoveryRequest{TypeUrl: xds.ClusterType})
			old := c.expect("cluster x1")
			c.ack(old)
			r.share("s", res(clusters, "x", "x2"))
			resp := c.expect("cluster x2")
			c.ack(old)
			c.nack(old, "", "late")
			c.ack(resp)
			r.share("s", res(clusters, "x", "x3"))
			c.ack(c.expect("cluster x3"))
		}},
		{"reconnecting without a difference costs nothing", func(_ *testing.T, r *rig, c *worldClient) {
			r.share("s", res(clusters, "x", "x1"), res(endpoints, "x", "e1"))
			c.request(&discovery.DiscoveryRequest{TypeUrl: xds.ClusterType})
			cds := c.expect("cluster x1")
			c.ack(cds)
			c.request(&discovery.DiscoveryRequest{TypeUrl: xds.EndpointType, ResourceNames: []string{"x"}})
			eds := c.expect("endpoint e1")
			c.ack(eds, "x")
			again := r.world("a")
			again.request(&discovery.DiscoveryRequest{TypeUrl: xds.ClusterType, VersionInfo: cds.GetVersionInfo()})
			again.request(&discovery.DiscoveryRequest{TypeUrl: xds.EndpointType, VersionInfo: eds.GetVersionInfo(), ResourceNames: []string{"x"}})
			again.request(&discovery.DiscoveryRequest{TypeUrl: xds.ListenerType})
			again.ack(again.expect("listener"))
			r.share("s", res(clusters, "x", "x2"), res(endpoints, "x", "e1"))
			again.ack(again.expect("cluster x2"))
		}},
		{"a cluster goes after the listener", func(_ *testing.T, r *rig, c *worldClient) {
			r.share("s", service("s", "1")...)
			c.request(&discovery.DiscoveryRequest{TypeUrl: xds.ClusterType})
			c.ack(c.expect("cluster c1"))
			c.request(&discovery.DiscoveryRequest{TypeUrl: xds.EndpointType, ResourceNames: []string{"s"}})
			c.ack(c.expect("endpoint e1"), "s")
			c.request(&discovery.DiscoveryRequest{TypeUrl: xds.ListenerType})
			c.ack(c.expect("listener l1"))
			c.request(&discovery.DiscoveryRequest{TypeUrl: xds.RouteType, ResourceNames: []string{"s"}})
			c.ack(c.expect("route r1"), "s")
			r.share("s", res(clusters, "new", "n1"), res(listeners, "s", "l2"))
			c.ack(c.expect("cluster n1 c1"))
			c.ack(c.expect("listener l2"))
			c.ack(c.expect("cluster n1"))
		}},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			r := start(t, Options{RemoveTimeout: time.Minute}).ready()
			r.set("a")
			tc.do(t, r, r.world("a"))
		})
	}
}

func TestNothingBeforeEverythingIsKnown(t *testing.T) {
	r := start(t, Options{})
	r.share("s", res(clusters, "x", "1"))
	c := r.delta("a")
	c.subscribe(clusters)
	asked := func() bool {
		s := r.Status()
		return len(s) == 1 && len(s[0].Types) == 1
	}
	r.until("the request has arrived", asked)
	r.SetReady()
	if s := r.Status()[0]; s.Known || s.Types[0].Sent != 0 || s.Types[0].Synced {
		t.Errorf("served before SetPod: %+v", s)
	}
	r.share("s", res(clusters, "x", "2"))
	r.set("a", res(clusters, "own", "1"))
	c.expectAck("cluster +own=1 +x=2")

	r = start(t, Options{})
	r.set("a")
	c = r.delta("a")
	c.subscribe(clusters)
	r.until("the request has arrived", asked)
	r.share("s", res(clusters, "x", "1"))
	if s := r.Status()[0]; s.Types[0].Sent != 0 {
		t.Errorf("served before SetReady: %+v", s)
	}
	r.SetReady()
	c.expectAck("cluster +x=1")
}

func TestTimeouts(t *testing.T) {
	r := start(t, Options{RemoveTimeout: 50 * time.Millisecond}).ready()
	r.set("a")
	r.share("s", service("s", "1")...)
	c := r.delta("a")
	c.follow("s", "1")

	r.share("s")
	c.expect("listener -s") // never answered
	c.expectAck("cluster -s")
	c.expectAck("endpoint +s=empty") // still subscribed to
	c.expectAck("route +s=empty")

	r.share("s", res(clusters, "s", "2"), res(routes, "s", "2"))
	c.expect("cluster +s=2") // never answered
	c.expectAck("route +s=2")
}

func TestRemovedPodGetsNothing(t *testing.T) {
	r := start(t, Options{}).ready()
	r.set("a", res(clusters, "own", "1"))
	c := r.delta("a")
	c.subscribe(clusters)
	c.expectAck("cluster +own=1")
	r.RemovePod("a")
	r.RemovePod("no such")
	r.share("s", res(clusters, "x", "1"))
	if s := r.Status(); len(s) != 1 || s[0].Known || s[0].Streams != 1 {
		t.Errorf("got %+v", s)
	}
	if err := r.ClosePod("a"); err != nil {
		t.Fatal(err)
	}
	if err := r.ClosePod("a"); err != nil {
		t.Errorf("again: %v", err)
	}
	if resp, ok := <-c.in; ok {
		t.Errorf("got %s", describe(resp))
	}
	r.until("the pod is forgotten", func() bool { return len(r.Status()) == 0 })
	r.set("a")
	c = r.delta("a") // its name is free at once
	c.subscribe(clusters)
	c.expectAck("cluster +x=1")
}

func TestStuckClientHoldsUpNobody(t *testing.T) {
	r := start(t, Options{}).ready()
	r.set("stuck")
	r.set("b")
	big := strings.Repeat("x", 1<<20)
	var all []xds.Resource
	for i := range 40 {
		all = append(all, res(clusters, fmt.Sprint(i), fmt.Sprint(i)+big))
	}
	r.share("s", all...)
	stuck := r.dial("stuck")
	g, err := discovery.NewAggregatedDiscoveryServiceClient(stuck).DeltaAggregatedResources(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: xds.ClusterType}); err != nil {
		t.Fatal(err)
	}
	r.until("the stuck client is being sent to", func() bool {
		for _, p := range r.Status() {
			if p.Pod.UID == "stuck" && len(p.Types) == 1 && p.Types[0].Sent == 1 {
				return true
			}
		}
		return false
	})
	r.share("s")
	r.share("t", res(clusters, "x", "0"))
	c := r.delta("b")
	c.subscribe(clusters)
	c.expectAck("cluster +x=0")
	for i := 1; i <= 100; i++ {
		r.share("t", res(clusters, "x", fmt.Sprint(i)))
		c.expectAck(fmt.Sprintf("cluster +x=%d", i))
	}
}

func TestUnansweredStreamEnds(t *testing.T) {
	s, err := New(Options{Log: start(t, Options{}).opts.Log})
	if err != nil {
		t.Fatal(err)
	}
	s.SetReady()
	s.SetPod(Pod{UID: "a"}, nil, time.Time{})
	st := s.attach("a", false)
	if err := st.onDelta(&discovery.DeltaDiscoveryRequest{TypeUrl: xds.ClusterType}, time.Now()); err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	if fl, err := st.next(now); fl == nil || err != nil {
		t.Fatalf("got %v, %v", fl, err)
	}
	if _, err := st.next(now.Add(ackTimeout - 1)); err != nil || st.due != now.Add(ackTimeout) {
		t.Errorf("before the timeout: %v, due %s", err, st.due)
	}
	if _, err := st.next(now.Add(ackTimeout)); status.Code(err) != codes.Aborted {
		t.Errorf("after the timeout: %v", err)
	}
}

func TestTombstonesAreForgotten(t *testing.T) {
	r := start(t, Options{}).ready()
	r.set("a")
	c := r.delta("a")
	c.subscribe(clusters)
	c.expectAck("cluster")
	c.subscribe(listeners)
	c.expectAck("listener")
	c.subscribe(routes, "probe")
	c.expectAck("route +probe=empty")
	for i := range 100 {
		name := fmt.Sprintf("c%d", i)
		r.share("s", res(clusters, name, "1"))
		resp := c.expect("cluster +" + name + "=1")
		c.ack(resp)
		r.share("s")
		c.expectAck("cluster -" + name)
	}
	r.until("all but the last are forgotten", func() bool {
		r.share("t", res(clusters, "other", fmt.Sprint(time.Now().UnixNano())))
		for len(c.in) > 0 {
			c.ack(<-c.in)
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		lt := &r.store.shared.types[clusters]
		return len(lt.slots) <= 2 && lt.log.Len() == len(lt.slots) && len(r.store.names[clusters].byName) <= 2
	})
	c.end()
	r.until("the names of the stream are given back", func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		return len(r.store.names[routes].byName) == 0
	})
}

func TestNamesAreBounded(t *testing.T) {
	r := start(t, Options{}).ready()
	r.set("a")
	c := r.delta("a")
	long := strings.Repeat("n", 1<<20)
	for i := range 40 {
		if err := c.g.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: xds.EndpointType, ResourceNamesSubscribe: []string{fmt.Sprint(long, i)}}); err != nil {
			break
		}
	}
	for range c.in { // until the stream ends
	}
	if status.Code(c.err) != codes.ResourceExhausted {
		t.Errorf("stream ended with %v", c.err)
	}
}

// TestRefusedIsToldAtTimes: a process that is refused in a loop makes no work for
// who is told of it, but is told of again.
func TestRefusedIsToldAtTimes(t *testing.T) {
	var told atomic.Int64
	r := start(t, Options{Refused: func(string) { told.Add(1) }}).ready()
	name := r.socketOf("a")
	if err := r.Open("a", "", uint32(os.Geteuid())+1); err != nil {
		t.Fatal(err)
	}
	begin, refused := time.Now(), 0
	for told.Load() < 2 {
		if time.Since(begin) > patience {
			t.Fatalf("told %d times of %d connections", told.Load(), refused)
		}
		c, err := net.Dial("unix", name)
		if err != nil {
			t.Fatal(err)
		}
		_ = c.SetDeadline(time.Now().Add(patience))
		_, _ = c.Read(make([]byte, 1)) // ends when it is refused
		_ = c.Close()
		refused++
	}
	if took := time.Since(begin); took < refusedEvery/2 || refused < 3 {
		t.Errorf("told twice within %v, of %d connections", took, refused)
	}
}

// TestIsProxy: a process of the right user that is not the proxy is refused, and
// cut off when it turns out later.
func TestIsProxy(t *testing.T) {
	var allowed atomic.Bool
	var told atomic.Int64
	allowed.Store(true)
	r := start(t, Options{
		IsProxy: func(uid string, c syscall.Conn) bool { return uid == "a" && c != nil && allowed.Load() },
		Refused: func(string) { told.Add(1) },
	}).ready()
	name := r.socketOf("a")
	admitted := func() (net.Conn, bool) {
		c, err := net.Dial("unix", name)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		n, err := c.Read(make([]byte, 1)) // a server that admits begins with its settings
		if os.IsTimeout(err) {
			t.Fatal("neither served nor refused")
		}
		return c, n == 1
	}
	early, ok := admitted()
	if !ok {
		t.Fatal("the proxy is refused")
	}
	allowed.Store(false)
	if _, ok := admitted(); ok {
		t.Error("another process is served")
	}
	if told.Load() != 1 {
		t.Errorf("told %d times of one refusal", told.Load())
	}
	if err := r.Open("a", "", uint32(os.Geteuid())); err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, early); os.IsTimeout(err) {
		t.Error("what came before it was known is still served")
	}
	allowed.Store(true)
	if _, ok := admitted(); !ok {
		t.Error("the proxy is refused afterwards")
	}
}

func TestOnlyTheProxyIsServed(t *testing.T) {
	r := start(t, Options{}).ready()
	name := r.socketOf("a")
	other := uint32(os.Geteuid()) + 1
	if err := r.Open("a", "", other); err != nil {
		t.Fatal(err)
	}
	refused := func() bool {
		c, err := net.Dial("unix", name)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.Close() }()
		if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		n, err := c.Read(make([]byte, 1)) // a server that admits begins with its settings
		return n == 0 && err != nil && !os.IsTimeout(err)
	}
	for range 3 {
		if !refused() {
			t.Fatal("served another user")
		}
	}
	if n := r.logs.count("refused a connection"); n != 1 {
		t.Errorf("warned %d times", n)
	}
	if n := testutil.ToFloat64(r.metrics.refused.WithLabelValues("uid")); n != 3 {
		t.Errorf("counted %v", n)
	}
	r.socketOf("a") // the right user again
	for i := range maxConns + 1 {
		c, err := net.Dial("unix", name)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.Close() }()
		_ = c.SetDeadline(time.Now().Add(patience)) // a fresh socket takes one
		// A server that speaks HTTP/2 waits for the client's preface.
		if _, err := c.Write([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")); err != nil && i < maxConns {
			t.Fatal(err)
		}
		n, _ := c.Read(make([]byte, 1))
		if served := n > 0; served != (i < maxConns) {
			t.Errorf("connection %d: served %t", i, served)
		}
	}
}

func TestOpen(t *testing.T) {
	r := start(t, Options{})
	name := r.socketOf("a")
	if got := r.socketOf("a"); got != name {
		t.Errorf("got %s", got)
	}
	if err := r.Open("b", "/no/such/netns", 1); err == nil {
		t.Error("opened in a namespace that does not exist")
	}
	r.stop()
	if err := r.Open("c", "", 1); err == nil {
		t.Error("opened after the end")
	}
	if err := r.ClosePod("a"); err != nil {
		t.Errorf("close after the end: %v", err)
	}
	if _, err := New(Options{}); err == nil {
		t.Error("made a server without Log")
	}
	if _, err := New(Options{Log: r.opts.Log, RemoveTimeout: -1}); err == nil {
		t.Error("made a server with a negative RemoveTimeout")
	}
}

func TestMetrics(t *testing.T) {
	r := start(t, Options{}).ready()
	r.set("a", res(listeners, "own", "1"))
	r.share("s", res(clusters, "x", "1"))
	c := r.delta("a")
	c.subscribe(clusters)
	c.expectAck("cluster +x=1")
	r.share("s", res(clusters, "x", "2"))
	c.expectAck("cluster +x=2")
	c.quiet()
	reg := prometheus.NewPedanticRegistry()
	if err := r.Register(reg); err != nil {
		t.Fatal(err)
	}
	if err := r.Register(reg); err == nil {
		t.Error("registered twice")
	}
	problems, err := testutil.GatherAndLint(reg)
	if err != nil || len(problems) > 0 {
		t.Errorf("lint: %v %v", problems, err)
	}
	err = testutil.GatherAndCompare(reg, strings.NewReader(`
		# HELP sluice_xds_acks_total Responses that sidecars accepted, by type of resource.
		# TYPE sluice_xds_acks_total counter
		sluice_xds_acks_total{type="cluster"} 2
		sluice_xds_acks_total{type="endpoint"} 0
		sluice_xds_acks_total{type="listener"} 0
		sluice_xds_acks_total{type="route"} 0
		# HELP sluice_xds_resources Resources that the server holds, by type.
		# TYPE sluice_xds_resources gauge
		sluice_xds_resources{type="cluster"} 1
		sluice_xds_resources{type="endpoint"} 0
		sluice_xds_resources{type="listener"} 1
		sluice_xds_resources{type="route"} 0
		# HELP sluice_xds_streams Streams of sidecars.
		# TYPE sluice_xds_streams gauge
		sluice_xds_streams 1
		`), "sluice_xds_resources", "sluice_xds_streams")
	if err != nil {
		t.Error(err)
	}
	if n := testutil.ToFloat64(r.metrics.acks[clusters]); n != 2 {
		t.Errorf("%v answers counted", n)
	}
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == "sluice_xds_event_to_ack_seconds" {
			for _, m := range f.GetMetric() {
				if m.GetLabel()[0].GetValue() == "cluster" && m.GetHistogram().GetSampleCount() != 1 {
					t.Errorf("%d latencies measured: only a change has one", m.GetHistogram().GetSampleCount())
				}
			}
		}
	}
}
