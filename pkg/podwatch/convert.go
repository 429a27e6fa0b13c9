package podwatch

import (
	"cmp"
	"crypto/sha256"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
)

// The functions of this file take objects that are valid, because an API
// server or validate.go checked them, and are total: what cannot be expressed
// is left out, never guessed.

// configHashAnnotation is where kubelet writes the UID of a static pod.
const configHashAnnotation = "kubernetes.io/config.hash"

func convertMeta(kind Kind, m *metav1.ObjectMeta) Meta {
	out := Meta{
		Namespace: m.Namespace, Name: m.Name, UID: string(m.UID),
		Labels: m.Labels, Annotations: m.Annotations,
		Terminating: m.DeletionTimestamp != nil,
	}
	if !m.CreationTimestamp.IsZero() {
		out.Created = m.CreationTimestamp.UTC()
	}
	if out.UID == "" {
		out.UID = derivedUID(Key{kind, m.Namespace, m.Name})
	}
	return out
}

// derivedUID makes a UID for an object that has none: always the same one, so
// that a restarted agent still knows its pods. The form is that of a UUID
// version 8 (RFC 9562 section 5.8).
func derivedUID(k Key) string {
	h := sha256.Sum256([]byte(string(k.Kind) + "/" + k.Namespace + "/" + k.Name))
	h[6] = h[6]&0x0f | 0x80
	h[8] = h[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", h[0:4], h[4:6], h[6:8], h[8:10], h[10:16])
}

func convertNode(in *corev1.Node) *Node {
	return &Node{Meta: convertMeta(KindNode, &in.ObjectMeta), Zone: in.Labels[corev1.LabelTopologyZone]}
}

func convertNamespace(in *corev1.Namespace) *Namespace {
	return &Namespace{Meta: convertMeta(KindNamespace, &in.ObjectMeta)}
}

func convertPod(in *corev1.Pod) *Pod {
	out := &Pod{
		Meta:           convertMeta(KindPod, &in.ObjectMeta),
		Node:           in.Spec.NodeName,
		HostNetwork:    in.Spec.HostNetwork,
		ServiceAccount: in.Spec.ServiceAccountName,
		Workload:       workloadOf(in),
		Finished:       in.Status.Phase == corev1.PodSucceeded || in.Status.Phase == corev1.PodFailed,
	}
	out.RuntimeUID = out.UID
	if _, mirror := in.Annotations[corev1.MirrorPodAnnotationKey]; mirror {
		// What the API server has of a static pod is a copy with a UID of its own.
		out.RuntimeUID = cmp.Or(in.Annotations[configHashAnnotation], out.UID)
	}
	if out.ServiceAccount == "" {
		out.ServiceAccount = "default" // as the API server's admission sets it
	}
	for i := range in.Spec.InitContainers {
		c := &in.Spec.InitContainers[i]
		if c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			out.Containers = append(out.Containers, convertContainer(&in.Spec, c))
		}
	}
	for i := range in.Spec.Containers {
		out.Containers = append(out.Containers, convertContainer(&in.Spec, &in.Spec.Containers[i]))
	}
	for _, s := range slices.Concat(in.Status.InitContainerStatuses, in.Status.ContainerStatuses) {
		if i := slices.IndexFunc(out.Containers, func(c Container) bool { return c.Name == s.Name }); i >= 0 && s.State.Running != nil {
			_, out.Containers[i].RuntimeID, _ = strings.Cut(s.ContainerID, "://")
		}
	}
	for _, ip := range in.Status.PodIPs {
		out.Addrs = appendAddr(out.Addrs, ip.IP)
	}
	if len(out.Addrs) == 0 {
		out.Addrs = appendAddr(nil, in.Status.PodIP)
	}
	if c := readyCondition(in); c != nil {
		out.Ready = c.Status == corev1.ConditionTrue
	}
	return out
}

// readyCondition is nil as long as nobody has judged the pod.
func readyCondition(p *corev1.Pod) *corev1.PodCondition {
	for i := range p.Status.Conditions {
		if p.Status.Conditions[i].Type == corev1.PodReady {
			return &p.Status.Conditions[i]
		}
	}
	return nil
}

func convertContainer(pod *corev1.PodSpec, in *corev1.Container) Container {
	out := Container{Name: in.Name}
	switch c, p := in.SecurityContext, pod.SecurityContext; {
	case c != nil && c.RunAsUser != nil:
		out.User = *c.RunAsUser
	case p != nil && p.RunAsUser != nil:
		out.User = *p.RunAsUser
	}
	for _, p := range in.Ports {
		if isTCP(p.Protocol) {
			out.Ports = append(out.Ports, ContainerPort{Name: p.Name, Port: port(p.ContainerPort)})
		}
	}
	return out
}

func convertService(in *corev1.Service) *Service {
	out := &Service{
		Meta:                     convertMeta(KindService, &in.ObjectMeta),
		Selector:                 in.Spec.Selector,
		PublishNotReadyAddresses: in.Spec.PublishNotReadyAddresses,
	}
	if in.Spec.Type == corev1.ServiceTypeExternalName {
		// Selector and addresses of such a service mean nothing.
		out.ExternalName, out.Selector = in.Spec.ExternalName, nil
	} else {
		for _, ip := range clusterIPs(in) {
			out.Headless = out.Headless || ip == corev1.ClusterIPNone
			out.ClusterIPs = appendAddr(out.ClusterIPs, ip)
		}
	}
	if p := in.Spec.InternalTrafficPolicy; p != nil {
		out.InternalTrafficLocal = *p == corev1.ServiceInternalTrafficPolicyLocal
	}
	for _, p := range in.Spec.Ports {
		if !isTCP(p.Protocol) {
			continue
		}
		sp := ServicePort{Name: p.Name, Port: port(p.Port), TargetPort: port(p.TargetPort.IntVal), AppProtocol: deref(p.AppProtocol, "")}
		switch {
		case p.TargetPort.Type == intstr.String && p.TargetPort.StrVal != "":
			sp.TargetPort, sp.TargetName = 0, p.TargetPort.StrVal
		case sp.TargetPort == 0:
			sp.TargetPort = sp.Port
		}
		out.Ports = append(out.Ports, sp)
	}
	return out
}

// clusterIPs are the service's addresses as written, "None" included.
func clusterIPs(s *corev1.Service) []string {
	if len(s.Spec.ClusterIPs) > 0 {
		return s.Spec.ClusterIPs
	}
	if s.Spec.ClusterIP != "" {
		return []string{s.Spec.ClusterIP}
	}
	return nil
}

func convertSlice(in *discoveryv1.EndpointSlice) *EndpointSlice {
	out := &EndpointSlice{
		Meta:    convertMeta(KindEndpointSlice, &in.ObjectMeta),
		Service: in.Labels[discoveryv1.LabelServiceName],
	}
	for _, p := range in.Ports {
		if p.Port != nil && isTCP(deref(p.Protocol, corev1.ProtocolTCP)) {
			out.Ports = append(out.Ports, EndpointPort{
				Name: deref(p.Name, ""), Port: port(*p.Port), AppProtocol: deref(p.AppProtocol, ""),
			})
		}
	}
	for i := range in.Endpoints {
		e := &in.Endpoints[i]
		ready := deref(e.Conditions.Ready, true)
		ep := Endpoint{
			Ready:       ready,
			Serving:     deref(e.Conditions.Serving, ready),
			Terminating: deref(e.Conditions.Terminating, false),
			Node:        deref(e.NodeName, ""),
			Zone:        deref(e.Zone, ""),
		}
		for _, a := range e.Addresses {
			ep.Addrs = appendAddr(ep.Addrs, a)
		}
		if r := e.TargetRef; r != nil && r.Kind == string(KindPod) && (r.Namespace == "" || r.Namespace == in.Namespace) {
			ep.Pod = r.Name
		}
		if h := e.Hints; h != nil {
			for _, z := range h.ForZones {
				ep.ForZones = append(ep.ForZones, z.Name)
			}
			for _, n := range h.ForNodes {
				ep.ForNodes = append(ep.ForNodes, n.Name)
			}
		}
		if len(ep.Addrs) > 0 {
			out.Endpoints = append(out.Endpoints, ep)
		}
	}
	return out
}

func convertRoute(in *gatewayv1.HTTPRoute) *HTTPRoute {
	out := &HTTPRoute{Meta: convertMeta(KindHTTPRoute, &in.ObjectMeta)}
	for _, p := range in.Spec.ParentRefs {
		if isServiceParent(p) {
			out.Parents = append(out.Parents, RouteParent{
				Namespace:   string(deref(p.Namespace, gatewayv1.Namespace(in.Namespace))),
				Name:        string(p.Name),
				Port:        port(deref(p.Port, 0)),
				SectionName: string(deref(p.SectionName, "")),
			})
		}
	}
	for i := range in.Spec.Rules {
		out.Rules = append(out.Rules, convertRule(in.Namespace, &in.Spec.Rules[i]))
	}
	return out
}

// isServiceParent says whether a parent is a Service: the others, gateways for
// example, are for other controllers.
func isServiceParent(p gatewayv1.ParentReference) bool {
	return deref(p.Group, gatewayv1.GroupName) == "" && deref(p.Kind, "Gateway") == gatewayv1.Kind(KindService)
}

func convertRule(namespace string, in *gatewayv1.HTTPRouteRule) HTTPRouteRule {
	out := HTTPRouteRule{Name: string(deref(in.Name, ""))}
	for i := range in.Matches {
		out.Matches = append(out.Matches, convertMatch(&in.Matches[i]))
	}
	if len(out.Matches) == 0 {
		out.Matches = []HTTPRouteMatch{convertMatch(&gatewayv1.HTTPRouteMatch{})}
	}
	out.RequestHeaders, out.ResponseHeaders, out.Unsupported = convertFilters(in.Filters)
	for i := range in.BackendRefs {
		b := &in.BackendRefs[i]
		backend := HTTPBackend{
			Group:     string(deref(b.Group, "")),
			Kind:      string(deref(b.Kind, gatewayv1.Kind(KindService))),
			Namespace: string(deref(b.Namespace, gatewayv1.Namespace(namespace))),
			Name:      string(b.Name),
			Port:      port(deref(b.Port, 0)),
			Weight:    uint32(max(0, deref(b.Weight, 1))),
		}
		backend.RequestHeaders, backend.ResponseHeaders, backend.Unsupported = convertFilters(b.Filters)
		out.Backends = append(out.Backends, backend)
	}
	if t := in.Timeouts; t != nil {
		out.RequestTimeout = duration(t.Request)
		out.BackendTimeout = duration(t.BackendRequest)
	}
	return out
}

func convertMatch(in *gatewayv1.HTTPRouteMatch) HTTPRouteMatch {
	out := HTTPRouteMatch{PathType: MatchPrefix, Path: "/", Method: string(deref(in.Method, ""))}
	if in.Path != nil {
		out.PathType = string(deref(in.Path.Type, gatewayv1.PathMatchPathPrefix))
		out.Path = deref(in.Path.Value, "/")
	}
	for _, h := range in.Headers {
		name := strings.ToLower(string(h.Name))
		// The Gateway API lets the first of several entries for one header count.
		if !slices.ContainsFunc(out.Headers, func(m NamedMatch) bool { return m.Name == name }) {
			out.Headers = append(out.Headers, NamedMatch{string(deref(h.Type, gatewayv1.HeaderMatchExact)), name, h.Value})
		}
	}
	for _, q := range in.QueryParams {
		name := string(q.Name)
		if !slices.ContainsFunc(out.Queries, func(m NamedMatch) bool { return m.Name == name }) {
			out.Queries = append(out.Queries, NamedMatch{string(deref(q.Type, gatewayv1.QueryParamMatchExact)), name, q.Value})
		}
	}
	return out
}

// convertFilters returns the header modifiers and names the first filter that
// is none.
func convertFilters(in []gatewayv1.HTTPRouteFilter) (request, response HeaderModifier, unsupported string) {
	for i, f := range in {
		switch {
		case f.Type == gatewayv1.HTTPRouteFilterRequestHeaderModifier && f.RequestHeaderModifier != nil:
			request = convertModifier(f.RequestHeaderModifier)
		case f.Type == gatewayv1.HTTPRouteFilterResponseHeaderModifier && f.ResponseHeaderModifier != nil:
			response = convertModifier(f.ResponseHeaderModifier)
		case unsupported == "":
			unsupported = fmt.Sprintf("filters[%d]: %s", i, f.Type)
		}
	}
	return request, response, unsupported
}

func convertModifier(in *gatewayv1.HTTPHeaderFilter) HeaderModifier {
	return HeaderModifier{Set: convertHeaders(in.Set), Add: convertHeaders(in.Add), Remove: in.Remove}
}

func convertHeaders(in []gatewayv1.HTTPHeader) []Header {
	var out []Header
	for _, h := range in {
		out = append(out, Header{string(h.Name), h.Value})
	}
	return out
}

// duration is 0, no bound, for nil and for "0s", as the Gateway API has it.
func duration(d *gatewayv1.Duration) time.Duration {
	if d == nil {
		return 0
	}
	v, err := time.ParseDuration(string(*d))
	if err != nil {
		return 0 // not valid, see the comment at the top
	}
	return v
}

// appendAddr appends an address if s is one.
func appendAddr(addrs []netip.Addr, s string) []netip.Addr {
	a, err := netip.ParseAddr(s)
	if err != nil || a.Zone() != "" {
		return addrs
	}
	return append(addrs, a.Unmap())
}

func isTCP(p corev1.Protocol) bool { return p == "" || p == corev1.ProtocolTCP }

// port returns 0 for what is no port.
func port(n int32) uint16 {
	if n < 0 || n > 65535 {
		return 0
	}
	return uint16(n)
}

func deref[T any](p *T, otherwise T) T {
	if p == nil {
		return otherwise
	}
	return *p
}
