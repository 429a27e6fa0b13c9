package main

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/sluicemesh/sluice/pkg/podwatch"
	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/pkg/xds"
)

// outboundPolicyAnnotation says for a pod, or for all pods of a namespace, what
// becomes of connections to destinations that no service describes.
const outboundPolicyAnnotation = "sluice.dev/outbound-policy"

// A view is what planning reads of the source: *podwatch.Store, or a fake.
// Its results are sorted and never modified.
type view interface {
	Get(podwatch.Key) (podwatch.Object, bool)
	SlicesOf(namespace, service string) []*podwatch.EndpointSlice
	RoutesTo(namespace, service string) []*podwatch.HTTPRoute
	RoutesReferring(namespace, service string) []*podwatch.HTTPRoute
	ServicesSelecting(*podwatch.Pod) []*podwatch.Service
	Services() []*podwatch.Service
}

// A planner turns what the source says into what redirection and the sidecars
// are to do. It is pure: equal inputs give equal, sorted outputs, and nothing
// is remembered between calls.
type planner struct {
	node            string
	outboundPolicy  xds.OutboundPolicy
	redirectDefault redirect.Policy
	excluded        []string // namespaces that are never redirected
	// namespaces says that every pod's Namespace is in the source, as it is in a
	// cluster: one that is missing is not known yet, or no more, and could ask for
	// anything. A directory may do without them.
	namespaces bool
}

// enabled says whether the pod's traffic is to be redirected.
func (p planner) enabled(v view, pod *podwatch.Pod) (bool, error) {
	if pod.HostNetwork || slices.Contains(p.excluded, pod.Namespace) {
		return false, nil
	}
	containers := make([]string, len(pod.Containers))
	for i, c := range pod.Containers {
		containers[i] = c.Name
	}
	ns, err := p.namespace(v, pod.Namespace)
	if err != nil {
		return false, fmt.Errorf("pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	on, err := redirect.CaptureEnabled(pod.Labels, pod.Annotations, ns.Labels, containers)
	if err != nil {
		return false, fmt.Errorf("pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	return on, nil
}

// namespace returns a pod's Namespace, an empty one where none need be.
func (p planner) namespace(v view, name string) (*podwatch.Namespace, error) {
	ns, ok := get[*podwatch.Namespace](v, podwatch.Key{Kind: podwatch.KindNamespace, Name: name})
	switch {
	case ok:
		return ns, nil
	case p.namespaces:
		return nil, fmt.Errorf("namespace %s is not known to the source", name)
	}
	return &podwatch.Namespace{}, nil
}

// workload returns what redirection is to do for a pod in its sandbox.
func (p planner) workload(pod *podwatch.Pod, s sandbox) (redirect.Workload, error) {
	base := p.redirectDefault
	if uid, ok := proxyUser(pod); ok {
		base.ProxyUID = uid
	}
	policy, err := redirect.ParsePolicy(base, pod.Annotations)
	if err != nil {
		return redirect.Workload{}, fmt.Errorf("pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	addrs, interfaces := s.network()
	if len(addrs) == 0 {
		return redirect.Workload{}, fmt.Errorf("pod %s/%s: the CNI result of sandbox %s names no address: is a network plugin configured before sluice-cni in the chain?", pod.Namespace, pod.Name, s.ContainerID)
	}
	return redirect.Workload{
		ID:         s.id(),
		Pod:        pod.Namespace + "/" + pod.Name,
		Netns:      s.Netns,
		Addrs:      addrs,
		Interfaces: interfaces,
		Policy:     policy,
	}, nil
}

// proxyUser returns the user that the pod says its proxy runs as. It is not ok if
// the pod says nothing, or has another container run as the same, whose
// connections would then pass for the proxy's.
func proxyUser(pod *podwatch.Pod) (uid uint32, ok bool) {
	i := slices.IndexFunc(pod.Containers, func(c podwatch.Container) bool { return isProxyName(c.Name) })
	if i < 0 {
		return 0, false
	}
	user := pod.Containers[i].User
	if user <= 0 || user >= int64(redirect.NoUID) {
		return 0, false
	}
	for _, c := range pod.Containers {
		if !isProxyName(c.Name) && c.User == user {
			return 0, false
		}
	}
	return uint32(user), true
}

func isProxyName(container string) bool {
	return container == "sluice-proxy" || container == "istio-proxy"
}

// sidecar returns what the pod's own Envoy needs beyond what all share.
func (p planner) sidecar(v view, pod *podwatch.Pod, s sandbox) (xds.Pod, error) {
	outbound, err := p.outbound(v, pod)
	if err != nil {
		return xds.Pod{}, err
	}
	addrs, _ := s.network()
	return xds.Pod{
		UID:            s.PodUID,
		Namespace:      pod.Namespace,
		Name:           pod.Name,
		Addrs:          addrs,
		Inbound:        inboundPorts(v, pod),
		OutboundPolicy: outbound,
	}, nil
}

func (p planner) outbound(v view, pod *podwatch.Pod) (xds.OutboundPolicy, error) {
	object, value := "pod "+pod.Namespace+"/"+pod.Name, pod.Annotations[outboundPolicyAnnotation]
	if value == "" {
		ns, err := p.namespace(v, pod.Namespace)
		if err != nil {
			return "", err
		}
		object, value = "namespace "+pod.Namespace, ns.Annotations[outboundPolicyAnnotation]
	}
	if value == "" {
		return p.outboundPolicy, nil
	}
	policy, err := parseOutboundPolicy(value)
	if err != nil {
		return "", fmt.Errorf("%s: annotation %s: %w", object, outboundPolicyAnnotation, err)
	}
	return policy, nil
}

func parseOutboundPolicy(s string) (xds.OutboundPolicy, error) {
	switch o := xds.OutboundPolicy(s); o {
	case xds.OutboundPassthrough, xds.OutboundBlock:
		return o, nil
	}
	return "", fmt.Errorf("%q is neither %q nor %q", s, xds.OutboundPassthrough, xds.OutboundBlock)
}

// inboundPorts lists the ports that the pod declares and those that services
// lead to. Where both name a port the service decides its protocol, since that
// is what its clients go by; of several services the oldest.
func inboundPorts(v view, pod *podwatch.Pod) []xds.InboundPort {
	ports := map[uint16]xds.Protocol{}
	for _, c := range pod.Containers {
		if isProxyName(c.Name) {
			continue // what the proxy itself listens on is nothing to lead to it
		}
		for _, cp := range c.Ports {
			ports[cp.Port] = xds.DetectProtocol("", cp.Name, cp.Port)
		}
	}
	services := slices.Clone(v.ServicesSelecting(pod))
	slices.SortStableFunc(services, func(a, b *podwatch.Service) int { return a.Created.Compare(b.Created) })
	decided := map[uint16]bool{}
	for _, svc := range services {
		for _, sp := range svc.Ports {
			target, ok := targetPort(pod, sp)
			if !ok || decided[target] {
				continue
			}
			decided[target] = true
			ports[target] = portProtocol(sp, target)
		}
	}
	out := make([]xds.InboundPort, 0, len(ports))
	for port, protocol := range ports {
		out = append(out, xds.InboundPort{Port: port, Protocol: protocol})
	}
	slices.SortFunc(out, func(a, b xds.InboundPort) int { return int(a.Port) - int(b.Port) })
	return out
}

func targetPort(pod *podwatch.Pod, sp podwatch.ServicePort) (uint16, bool) {
	if sp.TargetName == "" {
		return sp.TargetPort, sp.TargetPort != 0
	}
	for _, c := range pod.Containers {
		for _, cp := range c.Ports {
			if cp.Name == sp.TargetName {
				return cp.Port, true
			}
		}
	}
	return 0, false
}

// portProtocol is the protocol of a service port: by what is declared, else by
// the well-known number on either side of the service.
func portProtocol(sp podwatch.ServicePort, target uint16) xds.Protocol {
	protocol := xds.DetectProtocol(sp.AppProtocol, sp.Name, sp.Port)
	if protocol == xds.ProtocolAuto && target != 0 {
		protocol = xds.DetectProtocol(sp.AppProtocol, sp.Name, target)
	}
	return protocol
}

// service returns what all sidecars need to know of a service. ok is false for
// services that are none to a sidecar: ExternalName is an alias in DNS only.
func (p planner) service(v view, svc *podwatch.Service) (_ xds.Service, ok bool) {
	if svc.ExternalName != "" {
		return xds.Service{}, false
	}
	out := xds.Service{Namespace: svc.Namespace, Name: svc.Name, VIPs: svc.ClusterIPs}
	slicesOf := v.SlicesOf(svc.Namespace, svc.Name)
	routes := v.RoutesTo(svc.Namespace, svc.Name)
	for _, sp := range svc.Ports {
		out.Ports = append(out.Ports, xds.ServicePort{
			Name:      sp.Name,
			Port:      sp.Port,
			Protocol:  portProtocol(sp, sp.TargetPort),
			Endpoints: p.endpoints(v, svc, sp, slicesOf),
			Routes:    routesOf(v, svc, sp, routes),
		})
	}
	return out, true
}

// A candidate is an endpoint that may be used, with its hints.
type candidate struct {
	xds.Endpoint
	zones, nodes []string
}

// endpoints returns those endpoints of a service port that may get new
// connections, as kube-proxy chooses them: the ready ones, of these the ones
// that are hinted for this node or its zone; while none is ready, those that
// still serve although they terminate (KEP-1669). A dual-stack endpoint counts
// once, with the address of the service's first family.
func (p planner) endpoints(v view, svc *podwatch.Service, sp podwatch.ServicePort, all []*podwatch.EndpointSlice) []xds.Endpoint {
	var ready, draining []candidate
	for _, slice := range all {
		i := slices.IndexFunc(slice.Ports, func(ep podwatch.EndpointPort) bool { return ep.Name == sp.Name })
		if i < 0 {
			continue
		}
		for _, e := range slice.Endpoints {
			if len(e.Addrs) == 0 || svc.InternalTrafficLocal && e.Node != p.node {
				continue
			}
			c := candidate{xds.Endpoint{Addr: netip.AddrPortFrom(e.Addrs[0], slice.Ports[i].Port), Zone: e.Zone}, e.ForZones, e.ForNodes}
			switch {
			case e.Ready && !e.Terminating:
				ready = append(ready, c)
			case e.Serving && e.Terminating:
				draining = append(draining, c)
			}
		}
	}
	v6 := len(svc.ClusterIPs) > 0 && svc.ClusterIPs[0].Is6()
	if len(ready) == 0 {
		return xdsEndpoints(oneFamily(draining, v6))
	}
	ready = oneFamily(ready, v6)
	if !svc.InternalTrafficLocal { // that is narrower already, and hints are not for it
		ready = p.near(v, ready)
	}
	return xdsEndpoints(ready)
}

// near keeps the endpoints that are hinted for this node, else those for its
// zone. Hints count only if every endpoint has one and at least one is for here:
// while they are being changed, and where there is nothing near, all are used.
func (p planner) near(v view, all []candidate) []candidate {
	keep := func(hints func(candidate) []string, here string) []candidate {
		if here == "" || slices.ContainsFunc(all, func(c candidate) bool { return len(hints(c)) == 0 }) {
			return nil
		}
		return slices.DeleteFunc(slices.Clone(all), func(c candidate) bool { return !slices.Contains(hints(c), here) })
	}
	if found := keep(func(c candidate) []string { return c.nodes }, p.node); len(found) > 0 {
		return found
	}
	if found := keep(func(c candidate) []string { return c.zones }, p.zone(v)); len(found) > 0 {
		return found
	}
	return all
}

// zone is where this node is, empty if that is not known.
func (p planner) zone(v view) string {
	if n, ok := get[*podwatch.Node](v, podwatch.Key{Kind: podwatch.KindNode, Name: p.node}); ok {
		return n.Zone
	}
	return ""
}

// oneFamily keeps the endpoints of one family, the other one if that has none.
func oneFamily(endpoints []candidate, v6 bool) []candidate {
	var families [2][]candidate
	for _, e := range endpoints {
		i := 0
		if e.Addr.Addr().Is6() != v6 {
			i = 1
		}
		families[i] = append(families[i], e)
	}
	if len(families[0]) == 0 {
		return families[1]
	}
	return families[0]
}

// xdsEndpoints returns the endpoints sorted and without duplicates.
func xdsEndpoints(candidates []candidate) []xds.Endpoint {
	var out []xds.Endpoint
	for _, c := range candidates {
		out = append(out, c.Endpoint)
	}
	slices.SortFunc(out, func(a, b xds.Endpoint) int { return a.Addr.Compare(b.Addr) })
	return slices.CompactFunc(out, func(a, b xds.Endpoint) bool { return a.Addr == b.Addr })
}

// routesOf returns the routes attached to a service port, resolved. Only
// routes of the service's own namespace count: those of others are for the
// clients there alone (consumer routes, GEP-1294).
func routesOf(v view, svc *podwatch.Service, sp podwatch.ServicePort, routes []*podwatch.HTTPRoute) []xds.HTTPRoute {
	var out []xds.HTTPRoute
	for _, r := range routes {
		if r.Namespace != svc.Namespace || !attached(r, svc, sp) {
			continue
		}
		x := xds.HTTPRoute{Namespace: r.Namespace, Name: r.Name, Created: r.Created}
		for _, rule := range r.Rules {
			x.Rules = append(x.Rules, httpRule(v, rule))
		}
		out = append(out, x)
	}
	return out
}

func attached(r *podwatch.HTTPRoute, svc *podwatch.Service, sp podwatch.ServicePort) bool {
	return slices.ContainsFunc(r.Parents, func(p podwatch.RouteParent) bool {
		return p.Namespace == svc.Namespace && p.Name == svc.Name &&
			(p.Port == 0 || p.Port == sp.Port) &&
			(p.SectionName == "" || p.SectionName == sp.Name)
	})
}

func httpRule(v view, rule podwatch.HTTPRouteRule) xds.HTTPRule {
	x := xds.HTTPRule{
		Name:            rule.Name,
		Unsupported:     rule.Unsupported,
		RequestHeaders:  headerModifier(rule.RequestHeaders),
		ResponseHeaders: headerModifier(rule.ResponseHeaders),
		RequestTimeout:  rule.RequestTimeout,
		BackendTimeout:  rule.BackendTimeout,
	}
	for _, m := range rule.Matches {
		x.Matches = append(x.Matches, httpMatch(m))
	}
	for _, b := range rule.Backends {
		x.Backends = append(x.Backends, xds.HTTPBackend{
			Ref:             xds.ServicePortRef{Namespace: b.Namespace, Name: b.Name, Port: b.Port},
			Weight:          b.Weight,
			Invalid:         b.Unsupported != "" || !resolves(v, b),
			RequestHeaders:  headerModifier(b.RequestHeaders),
			ResponseHeaders: headerModifier(b.ResponseHeaders),
		})
	}
	return x
}

// resolves says whether a backendRef leads to a port of a Service.
func resolves(v view, b podwatch.HTTPBackend) bool {
	if b.Group != "" || b.Kind != string(podwatch.KindService) {
		return false
	}
	svc, ok := get[*podwatch.Service](v, podwatch.Key{Kind: podwatch.KindService, Namespace: b.Namespace, Name: b.Name})
	return ok && svc.ExternalName == "" && slices.ContainsFunc(svc.Ports, func(sp podwatch.ServicePort) bool { return sp.Port == b.Port })
}

// matchTypes translates how the Gateway API spells them.
func matchType(t string) xds.MatchType {
	switch t {
	case podwatch.MatchPrefix:
		return xds.MatchPrefix
	case podwatch.MatchRegex:
		return xds.MatchRegex
	default:
		return xds.MatchExact
	}
}

func httpMatch(m podwatch.HTTPRouteMatch) xds.HTTPMatch {
	x := xds.HTTPMatch{Method: m.Method, Headers: namedMatches(m.Headers), Queries: namedMatches(m.Queries)}
	if m.PathType != "" {
		x.Path = &xds.StringMatch{Type: matchType(m.PathType), Value: m.Path}
	}
	return x
}

func namedMatches(in []podwatch.NamedMatch) []xds.NamedMatch {
	var out []xds.NamedMatch
	for _, m := range in {
		out = append(out, xds.NamedMatch{Name: m.Name, StringMatch: xds.StringMatch{Type: matchType(m.Type), Value: m.Value}})
	}
	return out
}

func headerModifier(m podwatch.HeaderModifier) xds.HeaderModifier {
	return xds.HeaderModifier{Set: headers(m.Set), Add: headers(m.Add), Remove: m.Remove}
}

func headers(in []podwatch.Header) []xds.Header {
	var out []xds.Header
	for _, h := range in {
		out = append(out, xds.Header(h))
	}
	return out
}

// feeds returns the services whose sidecar configuration depends on the object
// as it is now. What it fed before it changed or went, the caller remembers.
func feeds(v view, key podwatch.Key) []podwatch.Key {
	switch key.Kind {
	case podwatch.KindService:
		keys := []podwatch.Key{key}
		for _, r := range v.RoutesReferring(key.Namespace, key.Name) {
			keys = append(keys, parentServices(r)...)
		}
		return keys
	case podwatch.KindNode: // the endpoints near it are others when its zone changes
		var keys []podwatch.Key
		for _, svc := range v.Services() {
			keys = append(keys, svc.Key())
		}
		return keys
	case podwatch.KindEndpointSlice:
		if s, ok := get[*podwatch.EndpointSlice](v, key); ok && s.Service != "" {
			return []podwatch.Key{{Kind: podwatch.KindService, Namespace: s.Namespace, Name: s.Service}}
		}
	case podwatch.KindHTTPRoute:
		if r, ok := get[*podwatch.HTTPRoute](v, key); ok {
			return parentServices(r)
		}
	}
	return nil
}

func parentServices(r *podwatch.HTTPRoute) []podwatch.Key {
	keys := make([]podwatch.Key, len(r.Parents))
	for i, p := range r.Parents {
		keys[i] = podwatch.Key{Kind: podwatch.KindService, Namespace: p.Namespace, Name: p.Name}
	}
	return keys
}

func get[T podwatch.Object](v view, k podwatch.Key) (T, bool) {
	o, ok := v.Get(k)
	if !ok {
		var zero T
		return zero, false
	}
	t, ok := o.(T)
	return t, ok
}
