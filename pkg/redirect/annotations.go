package redirect

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Prefixes of the annotations that ParsePolicy reads.
const (
	AnnotationPrefix      = "sluice.dev/"
	IstioAnnotationPrefix = "traffic.sidecar.istio.io/"
)

// RedirectKey is the label of a pod or its namespace, or the annotation of a
// pod, that says whether the pod is redirected; its values are RedirectEnabled
// and RedirectDisabled.
const (
	RedirectKey      = AnnotationPrefix + "redirect"
	RedirectEnabled  = "enabled"
	RedirectDisabled = "disabled"
)

// An AnnotationError is one annotation or label that is refused.
type AnnotationError struct {
	// Key is the whole key, prefix included.
	Key string
	// Token is the part of the value that is wrong, without the space around
	// it. Empty if the value as a whole or the key itself is wrong.
	Token string
	// Reason says what is wrong and what is allowed.
	Reason string
}

// Error returns key, token and reason in one line.
func (e *AnnotationError) Error() string {
	if e.Token == "" {
		return e.Key + ": " + e.Reason
	}
	return fmt.Sprintf("%s: %q: %s", e.Key, e.Token, e.Reason)
}

// AnnotationErrors are all annotations of a pod that are refused, sorted by key.
type AnnotationErrors []*AnnotationError

// Error returns all of them in one line.
func (e AnnotationErrors) Error() string {
	s := make([]string, len(e))
	for i, err := range e {
		s[i] = err.Error()
	}
	return strings.Join(s, "; ")
}

// Unwrap returns them one by one, for errors.As.
func (e AnnotationErrors) Unwrap() []error {
	errs := make([]error, len(e))
	for i, err := range e {
		errs[i] = err
	}
	return errs
}

// An annotation is one thing that annotations may say of a Policy.
type annotation struct {
	// name follows AnnotationPrefix, istio follows IstioAnnotationPrefix. istio
	// is empty where Istio has no such annotation.
	name, istio string
	// set parses value into p, or returns what is wrong with it.
	set func(p *Policy, value string) []tokenError
}

// A tokenError is a wrong token and the reason; see AnnotationError.
type tokenError struct{ token, reason string }

// annotations is the table of docs/annotations.md.
func annotations() []annotation {
	return []annotation{
		{"include-inbound-ports", "includeInboundPorts", func(p *Policy, v string) []tokenError { return p.Inbound.IncludePorts.parse(v, true) }},
		{"exclude-inbound-ports", "excludeInboundPorts", func(p *Policy, v string) []tokenError { return p.Inbound.ExcludePorts.parse(v, false) }},
		{"include-outbound-ports", "includeOutboundPorts", func(p *Policy, v string) []tokenError { return p.Outbound.IncludePorts.parse(v, true) }},
		{"exclude-outbound-ports", "excludeOutboundPorts", func(p *Policy, v string) []tokenError { return p.Outbound.ExcludePorts.parse(v, false) }},
		{"include-outbound-cidrs", "includeOutboundIPRanges", func(p *Policy, v string) []tokenError { return p.Outbound.IncludeCIDRs.parse(v, true) }},
		{"exclude-outbound-cidrs", "excludeOutboundIPRanges", func(p *Policy, v string) []tokenError { return p.Outbound.ExcludeCIDRs.parse(v, false) }},
		{"exclude-interfaces", "excludeInterfaces", parseInterfaces},
		{"accelerate", "", parseAccelerate},
		{"backend", "", parseBackend},
		{"proxy-uid", "", parseProxyUID},
	}
}

// foreignAnnotations are names under AnnotationPrefix that are not of a Policy.
func foreignAnnotations() []string {
	return []string{
		"inject", "injected", "outbound-policy", "proxy-cpu", "proxy-cpu-limit", "proxy-image",
		"proxy-log-level", "proxy-memory", "proxy-memory-limit", "redirect", "status",
	}
}

// ParsePolicy returns base with what the annotations say. An annotation
// replaces what base says of the same thing, it adds nothing to it. Where a
// sluice.dev annotation and Istio's speak of the same thing, the former counts;
// both must be right. Keys with other prefixes are not looked at.
//
// If anything is refused, an unknown key under one of the two prefixes
// included, the error is an AnnotationErrors with all of it and the Policy is
// base.
func ParsePolicy(base Policy, all map[string]string) (Policy, error) {
	p := base
	var refused AnnotationErrors
	parse := func(key string, a annotation) {
		value, ok := all[key]
		if !ok {
			return
		}
		for _, e := range a.set(&p, value) {
			refused = append(refused, &AnnotationError{Key: key, Token: e.token, Reason: e.reason})
		}
	}
	known := make(map[string]bool)
	for _, name := range foreignAnnotations() {
		known[AnnotationPrefix+name] = true
	}
	for _, a := range annotations() {
		if a.istio != "" { // first, so that the other one replaces it
			known[IstioAnnotationPrefix+a.istio] = true
			parse(IstioAnnotationPrefix+a.istio, a)
		}
		known[AnnotationPrefix+a.name] = true
		parse(AnnotationPrefix+a.name, a)
	}
	for key := range all {
		ours := strings.HasPrefix(key, AnnotationPrefix) || strings.HasPrefix(key, IstioAnnotationPrefix)
		if ours && !known[key] {
			refused = append(refused, &AnnotationError{Key: key, Reason: unknownReason(key)})
		}
	}
	if refused != nil {
		slices.SortStableFunc(refused, func(a, b *AnnotationError) int { return strings.Compare(a.Key, b.Key) })
		return base, refused
	}
	return p, nil
}

// CaptureEnabled says whether a pod is to be redirected. The first that there
// is of these decides: the pod's label RedirectKey, its annotation of that key,
// the namespace's label; else whether one of the pod's containers is a proxy,
// by the name sluice-proxy or istio-proxy. A value that is neither
// RedirectEnabled nor RedirectDisabled is an error wrapping an AnnotationError.
//
// Pods in the host's network namespace are never redirected; that is for the
// caller to see.
func CaptureEnabled(podLabels, podAnnotations, nsLabels map[string]string, containerNames []string) (bool, error) {
	for _, from := range []struct {
		what string
		m    map[string]string
	}{
		{"label of the pod", podLabels},
		{"annotation of the pod", podAnnotations},
		{"label of the namespace", nsLabels},
	} {
		switch v, ok := from.m[RedirectKey]; {
		case !ok:
		case v == RedirectEnabled:
			return true, nil
		case v == RedirectDisabled:
			return false, nil
		default:
			want := fmt.Sprintf("want %s or %s", RedirectEnabled, RedirectDisabled)
			if v == "" {
				want = "is empty: " + want
			}
			return false, fmt.Errorf("%s: %w", from.what, &AnnotationError{Key: RedirectKey, Token: v, Reason: want})
		}
	}
	return slices.Contains(containerNames, "sluice-proxy") || slices.Contains(containerNames, "istio-proxy"), nil
}

// parse sets s from a list. Only where a wildcard makes sense may "*" stand in
// place of one.
func (s *Ports) parse(value string, wildcard bool) []tokenError {
	if wildcard && strings.TrimSpace(value) == "*" {
		*s = Ports{All: true}
		return nil
	}
	list, errs := parseList(value, wildcard, parsePort, cmp.Compare[uint16])
	*s = Ports{List: list}
	return errs
}

func (s *CIDRs) parse(value string, wildcard bool) []tokenError {
	if wildcard && strings.TrimSpace(value) == "*" {
		*s = CIDRs{All: true}
		return nil
	}
	list, errs := parseList(value, wildcard, parseCIDR, netip.Prefix.Compare)
	*s = CIDRs{List: list}
	return errs
}

func parseInterfaces(p *Policy, value string) (errs []tokenError) {
	p.ExcludeInterfaces, errs = parseList(value, false, parseInterface, strings.Compare)
	return errs
}

func parseBackend(p *Policy, value string) []tokenError {
	v := strings.TrimSpace(value)
	switch b := Backend(v); b {
	case BackendAuto, BackendEBPF, BackendIPTables:
		p.Backend = b
		return nil
	}
	return []tokenError{{v, fmt.Sprintf("want %s, %s or %s", BackendAuto, BackendEBPF, BackendIPTables)}}
}

func parseAccelerate(p *Policy, value string) []tokenError {
	v := strings.TrimSpace(value)
	switch a := Accelerate(v); a {
	case AccelerateAuto, AccelerateOn, AccelerateOff:
		p.Accelerate = a
		return nil
	}
	return []tokenError{{v, fmt.Sprintf("want %s, %s or %s", AccelerateAuto, AccelerateOn, AccelerateOff)}}
}

// parseProxyUID refuses 0, with which every process of root would pass the
// proxy by, and the highest UID, which the kernel takes for "none".
func parseProxyUID(p *Policy, value string) []tokenError {
	v := strings.TrimSpace(value)
	uid, err := strconv.ParseUint(v, 10, 32)
	if err != nil || uid == 0 || uid == 1<<32-1 {
		return []tokenError{{v, "want a user ID from 1 to 4294967294"}}
	}
	p.ProxyUID = uint32(uid)
	return nil
}

// parseList parses a list separated by commas into sorted values without
// duplicates. An empty value is the empty list. parse returns a reason, or "".
func parseList[T comparable](value string, wildcard bool, parse func(string) (T, string), compare func(a, b T) int) ([]T, []tokenError) {
	if strings.TrimSpace(value) == "" {
		return nil, nil
	}
	var list []T
	var errs []tokenError
	for token := range strings.SplitSeq(value, ",") {
		token = strings.TrimSpace(token)
		v, reason := parse(token)
		switch {
		case token == "":
			errs = append(errs, tokenError{strings.TrimSpace(value), "there is nothing before, after or between two commas"})
		case token == "*" && wildcard:
			errs = append(errs, tokenError{token, "must stand alone"})
		case token == "*":
			errs = append(errs, tokenError{token, `is not allowed in a list of exclusions; to capture nothing, set the list of inclusions to ""`})
		case reason != "":
			errs = append(errs, tokenError{token, reason})
		default:
			list = append(list, v)
		}
	}
	slices.SortFunc(list, compare)
	return slices.Compact(list), errs
}

func parsePort(token string) (uint16, string) {
	n, err := strconv.ParseUint(token, 10, 16)
	if err != nil || n == 0 {
		reason := "want a port from 1 to 65535"
		if strings.ContainsAny(token, "-:") {
			reason += "; a range must be written port by port"
		}
		return 0, reason
	}
	return uint16(n), ""
}

// parseCIDR clears the bits behind the mask, as iptables and Istio do.
func parseCIDR(token string) (netip.Prefix, string) {
	p, err := netip.ParsePrefix(token)
	if err != nil {
		reason := "want an IPv4 or IPv6 range such as 10.0.0.0/8 or fd00::/8"
		if a, err := netip.ParseAddr(token); err == nil && a.Zone() == "" {
			reason += fmt.Sprintf("; for the one address, write %s/%d", a, a.BitLen())
		}
		return netip.Prefix{}, reason
	}
	if p.Addr().Is4In6() {
		// Shorter ones reach beyond the addresses that stand for IPv4.
		if p.Bits() < 96 {
			return netip.Prefix{}, "a range of IPv4 addresses written as IPv6 needs a length of 96 or more; write it as IPv4"
		}
		p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
	}
	return p.Masked(), ""
}

// parseInterface takes what the kernel takes as a name, less what iptables
// would read as a pattern and what nobody uses.
func parseInterface(token string) (string, string) {
	for _, c := range token {
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.ContainsRune("._-", c)) {
			return "", "want the name of an interface: letters, digits and ._- only"
		}
	}
	if len(token) > 15 || token == "." || token == ".." {
		return "", "want the name of an interface, at most 15 characters"
	}
	return token, ""
}

// unknownReason names the known key that an unknown one is most like.
func unknownReason(key string) string {
	prefix := IstioAnnotationPrefix
	if strings.HasPrefix(key, AnnotationPrefix) {
		prefix = AnnotationPrefix
	}
	name := fold(strings.TrimPrefix(key, prefix))
	best, least := "", len(name)/4+1
	consider := func(spelling, suggestion string) {
		if d := distance(name, fold(spelling)); suggestion != "" && d <= least {
			best, least = suggestion, d-1 // the first of the nearest
		}
	}
	for _, a := range annotations() {
		suggestion := a.name
		if prefix == IstioAnnotationPrefix {
			suggestion = a.istio
		}
		// Either spelling is tried: one may have been put behind the other's prefix.
		consider(a.name, suggestion)
		consider(a.istio, suggestion)
	}
	if prefix == AnnotationPrefix {
		for _, name := range foreignAnnotations() {
			consider(name, name)
		}
	}
	if best == "" {
		return "Sluice does not know this annotation"
	}
	return fmt.Sprintf("Sluice does not know this annotation; did you mean %s%s?", prefix, best)
}

// fold makes the spellings include-ports, includePorts and include_ports equal.
func fold(name string) string {
	return strings.ToLower(strings.NewReplacer("-", "", "_", "").Replace(name))
}

// distance counts the insertions, deletions and replacements between a and b
// (Levenshtein).
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			replaced := diagonal
			if a[i] != b[j] {
				replaced++
			}
			diagonal = row[j+1]
			row[j+1] = min(replaced, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
