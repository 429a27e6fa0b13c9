package podwatch

import (
	"net/http"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/validate/content"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/validation/field"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
)

// The validate functions check what an API server would have refused and what
// the rest of Sluice relies on. They name the field of each error.

// A check collects errors.
type check struct{ errs field.ErrorList }

// all adds one error for each message.
func (c *check) all(at *field.Path, value any, messages []string) {
	for _, m := range messages {
		c.errs = append(c.errs, field.Invalid(at, value, m))
	}
}

func (c *check) invalid(at *field.Path, value any, message string) {
	c.errs = append(c.errs, field.Invalid(at, value, message))
}

func (c *check) required(at *field.Path, missing bool) bool {
	if missing {
		c.errs = append(c.errs, field.Required(at, ""))
	}
	return !missing
}

func (c *check) port(at *field.Path, n int32) { c.all(at, n, validation.IsValidPortNum(int(n))) }

func (c *check) ip(at *field.Path, s string) {
	if a, err := netip.ParseAddr(s); err != nil || a.Zone() != "" {
		c.invalid(at, s, "must be an IPv4 or IPv6 address")
	}
}

// oneOf accepts the empty value: the default.
func oneOf[T ~string](c *check, at *field.Path, value T, valid ...T) {
	if value != "" && !slices.Contains(valid, value) {
		c.errs = append(c.errs, field.NotSupported(at, value, valid))
	}
}

func (c *check) protocol(at *field.Path, p corev1.Protocol) {
	oneOf(c, at, p, corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP)
}

func (c *check) labels(at *field.Path, labels map[string]string) {
	for k, v := range labels {
		c.all(at.Key(k), k, content.IsLabelKey(k))
		c.all(at.Key(k), v, content.IsLabelValue(v))
	}
}

// meta checks the metadata; name is the rule for the name of the kind.
func (c *check) meta(m *metav1.ObjectMeta, namespaced bool, name func(string) []string) {
	at := field.NewPath("metadata")
	if c.required(at.Child("name"), m.Name == "") {
		c.all(at.Child("name"), m.Name, name(m.Name))
	}
	if namespaced {
		c.all(at.Child("namespace"), m.Namespace, validation.IsDNS1123Label(m.Namespace))
	} else if m.Namespace != "" {
		c.errs = append(c.errs, field.Forbidden(at.Child("namespace"), "the kind has no namespace"))
	}
	c.labels(at.Child("labels"), m.Labels)
	for k := range m.Annotations {
		c.all(at.Child("annotations").Key(k), k, content.IsLabelKey(strings.ToLower(k)))
	}
}

func validateNode(in *corev1.Node) field.ErrorList {
	var c check
	c.meta(&in.ObjectMeta, false, validation.IsDNS1123Subdomain)
	return c.errs
}

func validateNamespace(in *corev1.Namespace) field.ErrorList {
	var c check
	c.meta(&in.ObjectMeta, false, validation.IsDNS1123Label)
	return c.errs
}

func validatePod(in *corev1.Pod) field.ErrorList {
	var c check
	c.meta(&in.ObjectMeta, true, validation.IsDNS1123Subdomain)
	spec := field.NewPath("spec")
	c.required(spec.Child("containers"), len(in.Spec.Containers) == 0)
	names := map[string]bool{}
	c.containers(spec.Child("initContainers"), in.Spec.InitContainers, names)
	c.containers(spec.Child("containers"), in.Spec.Containers, names)
	status := field.NewPath("status")
	for i, ip := range in.Status.PodIPs {
		c.ip(status.Child("podIPs").Index(i).Child("ip"), ip.IP)
	}
	if in.Status.PodIP != "" {
		c.ip(status.Child("podIP"), in.Status.PodIP)
	}
	oneOf(&c, status.Child("phase"), in.Status.Phase,
		corev1.PodPending, corev1.PodRunning, corev1.PodSucceeded, corev1.PodFailed, corev1.PodUnknown)
	return c.errs
}

func (c *check) containers(at *field.Path, containers []corev1.Container, names map[string]bool) {
	for i := range containers {
		in, at := &containers[i], at.Index(i)
		if c.required(at.Child("name"), in.Name == "") {
			c.all(at.Child("name"), in.Name, validation.IsDNS1123Label(in.Name))
			if names[in.Name] {
				c.errs = append(c.errs, field.Duplicate(at.Child("name"), in.Name))
			}
			names[in.Name] = true
		}
		portNames := map[string]bool{}
		for j, p := range in.Ports {
			at := at.Child("ports").Index(j)
			c.port(at.Child("containerPort"), p.ContainerPort)
			c.protocol(at.Child("protocol"), p.Protocol)
			if p.Name == "" {
				continue
			}
			c.all(at.Child("name"), p.Name, validation.IsValidPortName(p.Name))
			if portNames[p.Name] {
				c.errs = append(c.errs, field.Duplicate(at.Child("name"), p.Name))
			}
			portNames[p.Name] = true
		}
	}
}

func validateService(in *corev1.Service) field.ErrorList {
	var c check
	c.meta(&in.ObjectMeta, true, validation.IsDNS1123Label)
	spec := field.NewPath("spec")
	c.labels(spec.Child("selector"), in.Spec.Selector)
	oneOf(&c, spec.Child("type"), in.Spec.Type, corev1.ServiceTypeClusterIP, corev1.ServiceTypeNodePort,
		corev1.ServiceTypeLoadBalancer, corev1.ServiceTypeExternalName)
	external := in.Spec.Type == corev1.ServiceTypeExternalName
	if external {
		c.required(spec.Child("externalName"), in.Spec.ExternalName == "")
	}
	ips := clusterIPs(in)
	at := spec.Child("clusterIP")
	for i, ip := range ips {
		if len(in.Spec.ClusterIPs) > 0 {
			at = spec.Child("clusterIPs").Index(i)
		}
		if ip != corev1.ClusterIPNone {
			c.ip(at, ip)
		} else if len(ips) > 1 {
			c.invalid(at, ip, "must be the only one")
		}
	}
	if len(in.Spec.ClusterIPs) > 0 && in.Spec.ClusterIP != "" && in.Spec.ClusterIPs[0] != in.Spec.ClusterIP {
		c.invalid(spec.Child("clusterIP"), in.Spec.ClusterIP, "must be the first of clusterIPs")
	}
	if p := in.Spec.InternalTrafficPolicy; p != nil {
		oneOf(&c, spec.Child("internalTrafficPolicy"), *p,
			corev1.ServiceInternalTrafficPolicyCluster, corev1.ServiceInternalTrafficPolicyLocal)
	}
	headless := slices.Contains(ips, corev1.ClusterIPNone)
	c.required(spec.Child("ports"), len(in.Spec.Ports) == 0 && !external && !headless)
	c.servicePorts(spec.Child("ports"), in.Spec.Ports)
	return c.errs
}

func (c *check) servicePorts(at *field.Path, ports []corev1.ServicePort) {
	type number struct {
		port     int32
		protocol corev1.Protocol
	}
	names, numbers := map[string]bool{}, map[number]bool{}
	for i, p := range ports {
		at := at.Index(i)
		if p.Name != "" || len(ports) > 1 {
			if c.required(at.Child("name"), p.Name == "") {
				c.all(at.Child("name"), p.Name, validation.IsDNS1123Label(p.Name))
			}
			if p.Name != "" && names[p.Name] {
				c.errs = append(c.errs, field.Duplicate(at.Child("name"), p.Name))
			}
			names[p.Name] = true
		}
		c.port(at.Child("port"), p.Port)
		c.protocol(at.Child("protocol"), p.Protocol)
		n := number{p.Port, p.Protocol}
		if n.protocol == "" {
			n.protocol = corev1.ProtocolTCP
		}
		if numbers[n] {
			c.errs = append(c.errs, field.Duplicate(at.Child("port"), p.Port))
		}
		numbers[n] = true
		switch t := p.TargetPort; {
		case t.Type == intstr.String:
			c.all(at.Child("targetPort"), t.StrVal, validation.IsValidPortName(t.StrVal))
		case t.IntVal != 0:
			c.port(at.Child("targetPort"), t.IntVal)
		}
	}
}

func validateSlice(in *discoveryv1.EndpointSlice) field.ErrorList {
	var c check
	c.meta(&in.ObjectMeta, true, validation.IsDNS1123Subdomain)
	if strings.Contains(in.Name, derivedInfix) {
		c.invalid(field.NewPath("metadata", "name"), in.Name, "must not contain "+derivedInfix+", as the names of derived slices do")
	}
	if c.required(field.NewPath("addressType"), in.AddressType == "") {
		oneOf(&c, field.NewPath("addressType"), in.AddressType, discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6)
	}
	for i, p := range in.Ports {
		at := field.NewPath("ports").Index(i)
		if p.Port != nil {
			c.port(at.Child("port"), *p.Port)
		}
		c.protocol(at.Child("protocol"), deref(p.Protocol, ""))
	}
	for i, e := range in.Endpoints {
		c.hints(field.NewPath("endpoints").Index(i).Child("hints"), e.Hints)
		at := field.NewPath("endpoints").Index(i).Child("addresses")
		c.required(at, len(e.Addresses) == 0)
		for j, s := range e.Addresses {
			a, err := netip.ParseAddr(s)
			switch {
			case err != nil || a.Zone() != "":
				c.ip(at.Index(j), s)
			case in.AddressType == discoveryv1.AddressTypeIPv4 && !a.Is4(),
				in.AddressType == discoveryv1.AddressTypeIPv6 && !a.Is6():
				c.invalid(at.Index(j), s, "must be of addressType "+string(in.AddressType))
			}
		}
	}
	return c.errs
}

// maxHints is how many hints of one sort the API server lets an endpoint have.
const maxHints = 8

func (c *check) hints(at *field.Path, h *discoveryv1.EndpointHints) {
	if h == nil {
		return
	}
	zones, nodes := at.Child("forZones"), at.Child("forNodes")
	if len(h.ForZones) > maxHints {
		c.errs = append(c.errs, field.TooMany(zones, len(h.ForZones), maxHints))
	}
	if len(h.ForNodes) > maxHints {
		c.errs = append(c.errs, field.TooMany(nodes, len(h.ForNodes), maxHints))
	}
	for i, z := range h.ForZones {
		if at := zones.Index(i).Child("name"); c.required(at, z.Name == "") {
			c.all(at, z.Name, content.IsLabelValue(z.Name))
		}
	}
	for i, n := range h.ForNodes {
		if at := nodes.Index(i).Child("name"); c.required(at, n.Name == "") {
			c.all(at, n.Name, validation.IsDNS1123Subdomain(n.Name))
		}
	}
}

func validateRoute(in *gatewayv1.HTTPRoute) field.ErrorList {
	var c check
	c.meta(&in.ObjectMeta, true, validation.IsDNS1123Subdomain)
	spec := field.NewPath("spec")
	for i, p := range in.Spec.ParentRefs {
		at := spec.Child("parentRefs").Index(i)
		c.required(at.Child("name"), p.Name == "")
		if p.Port != nil {
			c.port(at.Child("port"), *p.Port)
		}
	}
	names := map[gatewayv1.SectionName]bool{}
	for i := range in.Spec.Rules {
		r, at := &in.Spec.Rules[i], spec.Child("rules").Index(i)
		if r.Name != nil {
			c.all(at.Child("name"), *r.Name, validation.IsDNS1123Subdomain(string(*r.Name)))
			if names[*r.Name] {
				c.errs = append(c.errs, field.Duplicate(at.Child("name"), *r.Name))
			}
			names[*r.Name] = true
		}
		for j := range r.Matches {
			c.match(at.Child("matches").Index(j), &r.Matches[j])
		}
		c.filters(at.Child("filters"), r.Filters)
		for j := range r.BackendRefs {
			c.backend(at.Child("backendRefs").Index(j), &r.BackendRefs[j])
		}
		if t := r.Timeouts; t != nil {
			at := at.Child("timeouts")
			c.duration(at.Child("request"), t.Request)
			c.duration(at.Child("backendRequest"), t.BackendRequest)
			if whole := duration(t.Request); whole > 0 && duration(t.BackendRequest) > whole {
				c.invalid(at.Child("backendRequest"), *t.BackendRequest, "must not be longer than request")
			}
		}
	}
	return c.errs
}

// methods are those of the Gateway API.
var methods = []gatewayv1.HTTPMethod{
	http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodDelete,
	http.MethodConnect, http.MethodOptions, http.MethodTrace, http.MethodPatch,
}

func (c *check) match(at *field.Path, m *gatewayv1.HTTPRouteMatch) {
	if m.Path != nil {
		c.path(at.Child("path"), deref(m.Path.Type, gatewayv1.PathMatchPathPrefix), deref(m.Path.Value, "/"))
	}
	if m.Method != nil {
		oneOf(c, at.Child("method"), *m.Method, methods...)
	}
	for i, h := range m.Headers {
		at := at.Child("headers").Index(i)
		c.headerName(at.Child("name"), string(h.Name))
		c.value(at, string(deref(h.Type, gatewayv1.HeaderMatchExact)), h.Value)
	}
	for i, q := range m.QueryParams {
		at := at.Child("queryParams").Index(i)
		c.required(at.Child("name"), q.Name == "")
		c.value(at, string(deref(q.Type, gatewayv1.QueryParamMatchExact)), q.Value)
	}
}

func (c *check) path(at *field.Path, kind gatewayv1.PathMatchType, value string) {
	if kind == gatewayv1.PathMatchRegularExpression {
		c.regex(at.Child("value"), value)
		return
	}
	oneOf(c, at.Child("type"), kind, gatewayv1.PathMatchExact, gatewayv1.PathMatchPathPrefix, gatewayv1.PathMatchRegularExpression)
	if !strings.HasPrefix(value, "/") {
		c.invalid(at.Child("value"), value, "must start with '/'")
	}
	for _, bad := range []string{"//", "/./", "/../", "%2f", "%2F", "#", "?"} {
		if strings.Contains(value, bad) {
			c.invalid(at.Child("value"), value, "must not contain '"+bad+"'")
		}
	}
	for _, bad := range []string{"/..", "/."} {
		if strings.HasSuffix(value, bad) {
			c.invalid(at.Child("value"), value, "must not end with '"+bad+"'")
		}
	}
}

// value checks the type and value of a header or query match.
func (c *check) value(at *field.Path, kind, value string) {
	oneOf(c, at.Child("type"), kind, MatchExact, MatchRegex)
	if kind == MatchRegex {
		c.regex(at.Child("value"), value)
	}
	c.required(at.Child("value"), value == "")
}

// regex accepts RE2, the syntax of both Go and Envoy.
func (c *check) regex(at *field.Path, expr string) {
	if _, err := regexp.Compile(expr); err != nil {
		c.invalid(at, expr, err.Error())
	}
}

func (c *check) headerName(at *field.Path, name string) {
	if !c.required(at, name == "") {
		return
	}
	for _, r := range name {
		letter := r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9'
		if !letter && !strings.ContainsRune("!#$%&'*+-.^_`|~", r) { // tchar of RFC 9110
			c.invalid(at, name, "must be the name of an HTTP header")
			return
		}
	}
}

func (c *check) filters(at *field.Path, filters []gatewayv1.HTTPRouteFilter) {
	seen := map[gatewayv1.HTTPRouteFilterType]bool{}
	for i, f := range filters {
		at := at.Index(i)
		oneOf(c, at.Child("type"), f.Type,
			gatewayv1.HTTPRouteFilterRequestHeaderModifier, gatewayv1.HTTPRouteFilterResponseHeaderModifier,
			gatewayv1.HTTPRouteFilterRequestRedirect, gatewayv1.HTTPRouteFilterURLRewrite,
			gatewayv1.HTTPRouteFilterRequestMirror, gatewayv1.HTTPRouteFilterCORS,
			gatewayv1.HTTPRouteFilterExternalAuth, gatewayv1.HTTPRouteFilterExtensionRef)
		c.required(at.Child("type"), f.Type == "")
		if f.Type == gatewayv1.HTTPRouteFilterRequestHeaderModifier {
			c.modifier(at.Child("requestHeaderModifier"), f.RequestHeaderModifier)
		}
		if f.Type == gatewayv1.HTTPRouteFilterResponseHeaderModifier {
			c.modifier(at.Child("responseHeaderModifier"), f.ResponseHeaderModifier)
		}
		if isModifier(f.Type) && seen[f.Type] {
			c.errs = append(c.errs, field.Duplicate(at.Child("type"), f.Type))
		}
		seen[f.Type] = true
	}
}

func isModifier(t gatewayv1.HTTPRouteFilterType) bool {
	return t == gatewayv1.HTTPRouteFilterRequestHeaderModifier || t == gatewayv1.HTTPRouteFilterResponseHeaderModifier
}

func (c *check) modifier(at *field.Path, m *gatewayv1.HTTPHeaderFilter) {
	if !c.required(at, m == nil) {
		return
	}
	for i, h := range m.Set {
		c.header(at.Child("set").Index(i), h)
	}
	for i, h := range m.Add {
		c.header(at.Child("add").Index(i), h)
	}
	for i, name := range m.Remove {
		c.headerName(at.Child("remove").Index(i), name)
	}
}

func (c *check) header(at *field.Path, h gatewayv1.HTTPHeader) {
	c.headerName(at.Child("name"), string(h.Name))
	if strings.ContainsAny(h.Value, "\r\n\x00") {
		c.invalid(at.Child("value"), h.Value, "must not contain a line break or NUL")
	}
}

func (c *check) backend(at *field.Path, b *gatewayv1.HTTPBackendRef) {
	c.required(at.Child("name"), b.Name == "")
	service := deref(b.Group, "") == "" && deref(b.Kind, gatewayv1.Kind(KindService)) == gatewayv1.Kind(KindService)
	if b.Port != nil {
		c.port(at.Child("port"), *b.Port)
	} else {
		c.required(at.Child("port"), service)
	}
	if w := deref(b.Weight, 1); w < 0 || w > 1_000_000 {
		c.invalid(at.Child("weight"), w, "must be between 0 and 1000000, inclusive")
	}
	c.filters(at.Child("filters"), b.Filters)
}

// gatewayDuration is the syntax of GEP-2257.
var gatewayDuration = regexp.MustCompile(`^([0-9]{1,5}(h|m|s|ms)){1,4}$`)

func (c *check) duration(at *field.Path, d *gatewayv1.Duration) {
	if d == nil {
		return
	}
	if _, err := time.ParseDuration(string(*d)); err != nil || !gatewayDuration.MatchString(string(*d)) {
		c.invalid(at, *d, `must be a duration such as "1h", "10s" or "250ms"`)
	}
}

// notesRoute names what a valid route asks for and does not get.
func notesRoute(in *gatewayv1.HTTPRoute) field.ErrorList {
	var c check
	for i := range in.Spec.Rules {
		r, at := &in.Spec.Rules[i], field.NewPath("spec", "rules").Index(i)
		c.unsupportedFilters(at.Child("filters"), r.Filters, "the rule answers 500")
		for j := range r.BackendRefs {
			c.unsupportedFilters(at.Child("backendRefs").Index(j).Child("filters"), r.BackendRefs[j].Filters,
				"the backend's share is answered 500")
		}
		if r.Retry != nil {
			c.errs = append(c.errs, field.Forbidden(at.Child("retry"), "not supported, ignored"))
		}
		if r.SessionPersistence != nil {
			c.errs = append(c.errs, field.Forbidden(at.Child("sessionPersistence"), "not supported, ignored"))
		}
	}
	return c.errs
}

func (c *check) unsupportedFilters(at *field.Path, filters []gatewayv1.HTTPRouteFilter, effect string) {
	for i, f := range filters {
		if !isModifier(f.Type) {
			c.errs = append(c.errs, field.Forbidden(at.Index(i).Child("type"), string(f.Type)+" is not supported: "+effect))
		}
	}
}
