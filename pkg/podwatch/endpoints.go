package podwatch

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	discoveryv1 "k8s.io/api/discovery/v1"
)

// derivedInfix is in the names of all derived endpoint slices and of no others.
const derivedInfix = "-derived-v"

// A deriver plays the cluster's endpoint slice controller: it keeps the slices
// of services with a selector up to date, unless slices are written for the
// service. A change costs the services that it concerns, however many others
// there are. It is not safe for concurrent use.
type deriver struct {
	pods      podIndex
	selectors selectorIndex
	services  map[nsName]*Service
	// written has the slices that are not derived, by service, and the way back.
	written   map[nsName]map[Key]struct{}
	writtenOf map[Key]nsName
	// derived has the names of the slices of each service.
	derived map[nsName]map[Key]struct{}
}

func newDeriver() *deriver {
	return &deriver{
		pods:      newPodIndex(),
		selectors: newSelectorIndex(),
		services:  map[nsName]*Service{},
		written:   map[nsName]map[Key]struct{}{},
		writtenOf: map[Key]nsName{},
		derived:   map[nsName]map[Key]struct{}{},
	}
}

// apply returns the changes and, after them, those of derived slices that
// follow from them.
func (d *deriver) apply(changes []Change) []Change {
	concerned := map[nsName]struct{}{}
	for _, c := range changes {
		d.note(c, concerned)
	}
	for n := range concerned {
		changes = append(changes, d.update(n)...)
	}
	return changes
}

// note takes one change in and adds the services that it concerns.
func (d *deriver) note(c Change, concerned map[nsName]struct{}) {
	n := c.Key.nsName()
	switch c.Key.Kind {
	case KindService:
		concerned[n] = struct{}{}
		d.selectors.remove(n)
		delete(d.services, n)
		if s, ok := c.Object.(*Service); ok {
			d.selectors.put(s)
			d.services[n] = s
		}
	case KindPod:
		if old := d.pods.pods[n]; old != nil {
			d.selecting(old, concerned)
		}
		d.pods.remove(n)
		if p, ok := c.Object.(*Pod); ok {
			d.pods.put(p)
			d.selecting(p, concerned)
		}
	case KindEndpointSlice:
		if service, ok := d.writtenOf[c.Key]; ok {
			remove(d.written, service, c.Key)
			delete(d.writtenOf, c.Key)
			concerned[service] = struct{}{}
		}
		if s, ok := c.Object.(*EndpointSlice); ok {
			service := nsName{s.Namespace, s.Service}
			insert(d.written, service, c.Key, struct{}{})
			d.writtenOf[c.Key] = service
			concerned[service] = struct{}{}
		}
	}
}

func (d *deriver) selecting(p *Pod, concerned map[nsName]struct{}) {
	for _, s := range d.selectors.selecting(p.Namespace, p.Labels) {
		concerned[nsName{s.Namespace, s.Name}] = struct{}{}
	}
}

// update returns the changes that bring the slices of one service up to date;
// the Store finds out which of them are none.
func (d *deriver) update(n nsName) []Change {
	var want []*EndpointSlice
	if s := d.services[n]; s != nil && len(d.written[n]) == 0 {
		want = deriveSlices(s, d.pods.selected(s))
	}
	var changes []Change
	keys := map[Key]struct{}{}
	for _, s := range want {
		keys[s.Key()] = struct{}{}
		changes = append(changes, Change{s.Key(), s})
	}
	for k := range d.derived[n] {
		if _, ok := keys[k]; !ok {
			changes = append(changes, Change{Key: k})
		}
	}
	if delete(d.derived, n); len(keys) > 0 {
		d.derived[n] = keys
	}
	return changes
}

// deriveSlices returns the slices of a service whose selector selects pods:
// one for each address family and each set of port numbers.
func deriveSlices(s *Service, pods []*Pod) []*EndpointSlice {
	if len(s.Selector) == 0 {
		return nil
	}
	var all []*EndpointSlice
	for _, family := range families(s) {
		var ofFamily []*EndpointSlice
		for _, p := range pods {
			addr, ok := addrOf(p, family)
			if !ok || p.Finished {
				continue
			}
			ports := resolvePorts(s, p)
			i := slices.IndexFunc(ofFamily, func(e *EndpointSlice) bool { return slices.Equal(e.Ports, ports) })
			if i < 0 {
				i = len(ofFamily)
				ofFamily = append(ofFamily, &EndpointSlice{Service: s.Name, Ports: ports})
			}
			ofFamily[i].Endpoints = append(ofFamily[i].Endpoints, Endpoint{
				Addrs: []netip.Addr{addr},
				// As the cluster's controller has it: publishing addresses that
				// are not ready also overrides termination.
				Ready:       s.PublishNotReadyAddresses || p.Ready && !p.Terminating,
				Serving:     p.Ready,
				Terminating: p.Terminating,
				Node:        p.Node,
				Pod:         p.Name,
			})
		}
		// Sorted by ports, so that names do not depend on which pod is first.
		slices.SortFunc(ofFamily, func(a, b *EndpointSlice) int { return slices.CompareFunc(a.Ports, b.Ports, comparePorts) })
		for i, e := range ofFamily {
			name := fmt.Sprintf("%s%s%d", s.Name, derivedInfix, family)
			if i > 0 {
				name = fmt.Sprintf("%s-%d", name, i+1)
			}
			e.Meta = derivedMeta(s, name)
		}
		all = append(all, ofFamily...)
	}
	return all
}

func derivedMeta(s *Service, name string) Meta {
	return Meta{
		Namespace: s.Namespace, Name: name,
		UID: derivedUID(Key{KindEndpointSlice, s.Namespace, name}),
		Labels: map[string]string{
			discoveryv1.LabelServiceName: s.Name,
			discoveryv1.LabelManagedBy:   "files.sluice.dev",
		},
	}
}

// families are those of the service's addresses, 4 and 6 if it has none.
func families(s *Service) []int {
	if len(s.ClusterIPs) == 0 {
		return []int{4, 6}
	}
	var found []int
	for _, family := range []int{4, 6} {
		if slices.ContainsFunc(s.ClusterIPs, func(a netip.Addr) bool { return isFamily(a, family) }) {
			found = append(found, family)
		}
	}
	return found
}

// addrOf returns the pod's first address of a family.
func addrOf(p *Pod, family int) (netip.Addr, bool) {
	i := slices.IndexFunc(p.Addrs, func(a netip.Addr) bool { return isFamily(a, family) })
	if i < 0 {
		return netip.Addr{}, false
	}
	return p.Addrs[i], true
}

func isFamily(a netip.Addr, family int) bool { return a.Is4() == (family == 4) }

// resolvePorts returns the ports of the service at this pod. A named target
// port that the pod does not have is left out.
func resolvePorts(s *Service, p *Pod) []EndpointPort {
	var ports []EndpointPort
	for _, sp := range s.Ports {
		number := sp.TargetPort
		if sp.TargetName != "" {
			number = namedPort(p, sp.TargetName)
		}
		if number != 0 {
			ports = append(ports, EndpointPort{Name: sp.Name, Port: number, AppProtocol: sp.AppProtocol})
		}
	}
	return ports
}

// namedPort returns the number of the first container port of that name, 0 if
// there is none.
func namedPort(p *Pod, name string) uint16 {
	for _, c := range p.Containers {
		for _, cp := range c.Ports {
			if cp.Name == name {
				return cp.Port
			}
		}
	}
	return 0
}

func comparePorts(a, b EndpointPort) int {
	return cmp.Or(cmp.Compare(a.Port, b.Port), strings.Compare(a.Name, b.Name), strings.Compare(a.AppProtocol, b.AppProtocol))
}
