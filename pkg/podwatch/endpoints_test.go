package podwatch

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// lines writes derived slices one endpoint a line, for comparison.
func lines(all []*EndpointSlice) []string {
	list := []string{}
	for _, s := range all {
		var ports []string
		for _, p := range s.Ports {
			ports = append(ports, fmt.Sprintf("%s=%d", p.Name, p.Port))
		}
		for _, e := range s.Endpoints {
			line := fmt.Sprintf("%s %s %v %s@%s", s.Name, strings.Join(ports, ","), e.Addrs, e.Pod, e.Node)
			for _, c := range []struct {
				set  bool
				name string
			}{{e.Ready, "ready"}, {e.Serving, "serving"}, {e.Terminating, "terminating"}} {
				if c.set {
					line += " " + c.name
				}
			}
			list = append(list, line)
		}
	}
	return list
}

func TestDeriveSlices(t *testing.T) {
	pod := func(name string, change func(p *Pod)) *Pod {
		p := &Pod{
			Meta:  Meta{Namespace: "shop", Name: name, Labels: map[string]string{"app": "web"}},
			Node:  "n1",
			Addrs: []netip.Addr{addr("10.1.0.1")}, Ready: true,
			Containers: []Container{{Name: "side"}, {Name: "app", Ports: []ContainerPort{{"web", 8080}}}},
		}
		if change != nil {
			change(p)
		}
		return p
	}
	number := []ServicePort{{Name: "http", Port: 80, TargetPort: 8080}}
	named := []ServicePort{{Name: "http", Port: 80, TargetName: "web"}, {Name: "admin", Port: 81, TargetPort: 81}}
	for name, tc := range map[string]struct {
		service Service
		pods    []*Pod
		want    []string
	}{
		"ready": {
			Service{Ports: number},
			[]*Pod{pod("a", nil)},
			[]string{"web-derived-v4 http=8080 [10.1.0.1] a@n1 ready serving"},
		},
		"not ready": {
			Service{Ports: number},
			[]*Pod{pod("a", func(p *Pod) { p.Ready = false })},
			[]string{"web-derived-v4 http=8080 [10.1.0.1] a@n1"},
		},
		"not ready, published": {
			Service{Ports: number, PublishNotReadyAddresses: true},
			[]*Pod{pod("a", func(p *Pod) { p.Ready = false })},
			[]string{"web-derived-v4 http=8080 [10.1.0.1] a@n1 ready"},
		},
		"terminating": {
			Service{Ports: number},
			[]*Pod{pod("a", func(p *Pod) { p.Terminating = true })},
			[]string{"web-derived-v4 http=8080 [10.1.0.1] a@n1 serving terminating"},
		},
		"terminating, published": {
			Service{Ports: number, PublishNotReadyAddresses: true},
			[]*Pod{pod("a", func(p *Pod) { p.Terminating = true })},
			[]string{"web-derived-v4 http=8080 [10.1.0.1] a@n1 ready serving terminating"},
		},
		"finished and without address": {
			Service{Ports: number},
			[]*Pod{pod("a", func(p *Pod) { p.Finished = true }), pod("b", func(p *Pod) { p.Addrs = nil })},
			[]string{},
		},
		"no selector": {Service{Ports: number, Selector: map[string]string{}}, []*Pod{pod("a", nil)}, []string{}},
		"two families": {
			Service{Ports: number},
			[]*Pod{
				pod("a", func(p *Pod) { p.Addrs = append(p.Addrs, addr("fd00::1"), addr("10.9.9.9")) }),
				pod("b", func(p *Pod) { p.Addrs = []netip.Addr{addr("fd00::2")} }),
			},
			[]string{
				"web-derived-v4 http=8080 [10.1.0.1] a@n1 ready serving",
				"web-derived-v6 http=8080 [fd00::1] a@n1 ready serving",
				"web-derived-v6 http=8080 [fd00::2] b@n1 ready serving",
			},
		},
		"one family of two": {
			Service{Ports: number, ClusterIPs: []netip.Addr{addr("fd00:96::1")}},
			[]*Pod{pod("a", func(p *Pod) { p.Addrs = append(p.Addrs, addr("fd00::1")) })},
			[]string{"web-derived-v6 http=8080 [fd00::1] a@n1 ready serving"},
		},
		"named ports": {
			Service{Ports: named},
			[]*Pod{
				pod("a", func(p *Pod) { p.Containers[1].Ports[0].Port = 9090 }),
				pod("b", nil), pod("c", nil),
				pod("d", func(p *Pod) { p.Containers[1].Ports = nil }),
			},
			[]string{
				"web-derived-v4 admin=81 [10.1.0.1] d@n1 ready serving",
				"web-derived-v4-2 http=8080,admin=81 [10.1.0.1] b@n1 ready serving",
				"web-derived-v4-2 http=8080,admin=81 [10.1.0.1] c@n1 ready serving",
				"web-derived-v4-3 http=9090,admin=81 [10.1.0.1] a@n1 ready serving",
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := tc.service
			s.Meta = Meta{Namespace: "shop", Name: "web"}
			if s.Selector == nil {
				s.Selector = map[string]string{"app": "web"}
			}
			if diff := cmp.Diff(tc.want, lines(deriveSlices(&s, tc.pods))); diff != "" {
				t.Errorf("slices (-want +got):\n%s", diff)
			}
		})
	}
}

// TestDeriverFollows drives one deriver through a life of changes and wants,
// each time, the services that were worked on and the endpoints that result.
func TestDeriverFollows(t *testing.T) {
	d := newDeriver()
	s := NewStore(StoreOptions{})
	web := map[string]string{"app": "web"}
	v2 := map[string]string{"app": "web", "v": "2"}
	pod := func(name, ip string, labels map[string]string) *Pod {
		p := &Pod{Meta: Meta{Namespace: "shop", Name: name, Labels: labels}, Ready: true}
		if ip != "" {
			p.Addrs = []netip.Addr{addr(ip)}
		}
		return p
	}
	port := ServicePort{Port: 80, TargetPort: 80}
	written := func(service string) *EndpointSlice {
		return &EndpointSlice{
			Meta: Meta{Namespace: "shop", Name: "written"}, Service: service,
			Endpoints: []Endpoint{{Addrs: []netip.Addr{addr("192.0.2.1")}}},
		}
	}
	for _, step := range []struct {
		name    string
		changes []Change
		worked  []string
		want    map[string]string
	}{
		{
			"services first", put(newService("web", web, port), newService("v2", v2, port), newService("db", map[string]string{"app": "db"}, port)),
			[]string{},
			map[string]string{},
		},
		{"a pod without address", put(pod("a", "", web)), []string{}, map[string]string{}},
		{"it gets one", put(pod("a", "10.0.0.1", web)), []string{"web"}, map[string]string{"web": "10.0.0.1"}},
		{
			"another of both", put(pod("b", "10.0.0.2", v2)),
			[]string{"v2", "web"},
			map[string]string{"web": "10.0.0.1 10.0.0.2", "v2": "10.0.0.2"},
		},
		{
			"it changes its labels", put(pod("b", "10.0.0.2", map[string]string{"app": "db"})),
			[]string{"db", "v2", "web"},
			map[string]string{"web": "10.0.0.1", "db": "10.0.0.2"},
		},
		{
			"a slice is written", put(written("web")),
			[]string{"web"},
			map[string]string{"web": "192.0.2.1", "db": "10.0.0.2"},
		},
		{
			"a pod changes meanwhile", put(pod("a", "10.0.0.9", web)),
			[]string{},
			map[string]string{"web": "192.0.2.1", "db": "10.0.0.2"},
		},
		{
			"the slice moves to another service", put(written("db")),
			[]string{"db", "web"},
			map[string]string{"web": "10.0.0.9", "db": "192.0.2.1"},
		},
		{
			"the slice goes",
			[]Change{{Key: written("db").Key()}},
			[]string{"db"},
			map[string]string{"web": "10.0.0.9", "db": "10.0.0.2"},
		},
		{
			"the selector changes", put(newService("web", map[string]string{"app": "db"}, port)),
			[]string{"web"},
			map[string]string{"web": "10.0.0.2", "db": "10.0.0.2"},
		},
		{"the selector goes", put(newService("web", nil, port)), []string{"web"}, map[string]string{"db": "10.0.0.2"}},
		{"the pod goes", []Change{{Key: pod("b", "", nil).Key()}}, []string{"db"}, map[string]string{}},
		{"all goes", []Change{
			{Key: Key{KindService, "shop", "db"}},
			{Key: Key{KindService, "shop", "v2"}},
			{Key: Key{KindService, "shop", "web"}},
			{Key: Key{KindPod, "shop", "a"}},
		}, []string{}, map[string]string{}},
	} {
		changes := d.apply(slices.Clone(step.changes))
		worked := map[string]bool{}
		for _, c := range changes {
			if name, _, ok := strings.Cut(c.Key.Name, derivedInfix); ok {
				worked[name] = true
			}
		}
		if diff := cmp.Diff(step.worked, append([]string{}, slices.Sorted(maps.Keys(worked))...)); diff != "" {
			t.Errorf("%s: slices of these services changed (-want +got):\n%s", step.name, diff)
		}
		s.Update(changes)
		got := map[string]string{}
		for _, e := range s.EndpointSlices() {
			for _, ep := range e.Endpoints {
				got[e.Service] = strings.TrimSpace(got[e.Service] + " " + ep.Addrs[0].String())
			}
		}
		if diff := cmp.Diff(step.want, got); diff != "" {
			t.Errorf("%s: endpoints (-want +got):\n%s", step.name, diff)
		}
	}
	if len(d.derived)+len(d.written)+len(d.writtenOf)+len(d.selectors.under)+len(d.selectors.pair)+len(d.services)+len(d.pods.pods)+len(d.pods.under) > 0 {
		t.Errorf("left behind: %+v", d)
	}
}
