package translate

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"net/http"
	"regexp/syntax"
	"slices"
	"strconv"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"golang.org/x/net/http/httpguts"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/sluicemesh/sluice/pkg/xds"
)

// maxRegexProgram bounds a regular expression, in instructions of Go's RE2.
// Envoy counts its own and refuses, with the whole table, what exceeds the
// 32768 of the bootstrap.
const maxRegexProgram = 8192

// routes merges all routes of one service port into one table, in the order of
// precedence that the Gateway API demands. Without routes everything goes to
// the cluster name. Errors name the route and rule; the table is good all the
// same.
func (t *Translator) routes(name string, routes []xds.HTTPRoute) (*routev3.RouteConfiguration, error) {
	host := &routev3.VirtualHost{
		Name:                    name,
		Domains:                 []string{"*"},
		ResponseHeadersToRemove: []string{repeatableHeader},
	}
	table := &routev3.RouteConfiguration{
		Name:         name,
		VirtualHosts: []*routev3.VirtualHost{host},
		// A backend's cluster may come later, or go earlier, than the routes.
		ValidateClusters: wrapperspb.Bool(false),
	}
	if len(routes) == 0 {
		action := t.action(xds.HTTPRule{})
		action.ClusterSpecifier = &routev3.RouteAction_Cluster{Cluster: name}
		host.Routes = []*routev3.Route{{
			Name:   "default",
			Match:  &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: "/"}},
			Action: &routev3.Route_Route{Route: action},
		}}
		return table, nil
	}

	var errs []error
	var entries []entry
	for i := range routes {
		e, err := t.entries(&routes[i])
		entries = append(entries, e...)
		if err != nil {
			errs = append(errs, fmt.Errorf("translate HTTPRoute %s/%s for %s: %w", routes[i].Namespace, routes[i].Name, name, err))
		}
	}
	slices.SortStableFunc(entries, entry.compare)
	for _, e := range entries {
		host.Routes = append(host.Routes, e.route)
	}
	return table, errors.Join(errs...)
}

// An entry is one match of one rule with what its precedence depends on.
type entry struct {
	route      *routev3.Route
	match      xds.HTTPMatch
	from       *xds.HTTPRoute
	rule, indx int
}

// compare puts first what wins: exact paths, then regular expressions, then
// the longest prefix; then a method, more headers, more query parameters; then
// the older route, then the one whose namespace and name come first, then the
// order within the route.
func (e entry) compare(o entry) int {
	ek, el := pathRank(e.match.Path)
	ok, ol := pathRank(o.match.Path)
	return cmp.Or(
		cmp.Compare(ok, ek),
		cmp.Compare(ol, el),
		cmp.Compare(min(len(o.match.Method), 1), min(len(e.match.Method), 1)),
		cmp.Compare(len(o.match.Headers), len(e.match.Headers)),
		cmp.Compare(len(o.match.Queries), len(e.match.Queries)),
		e.from.Created.Compare(o.from.Created),
		cmp.Compare(e.from.Namespace, o.from.Namespace),
		cmp.Compare(e.from.Name, o.from.Name),
		cmp.Compare(e.rule, o.rule),
		cmp.Compare(e.indx, o.indx),
	)
}

func pathRank(p *xds.StringMatch) (kind, length int) {
	if p == nil {
		return 0, len("/")
	}
	switch p.Type {
	case xds.MatchExact:
		return 2, len(p.Value)
	case xds.MatchRegex:
		return 1, len(p.Value)
	}
	return 0, len(prefix(p.Value))
}

// prefix leaves out the trailing slash, which means nothing in a prefix by
// segments.
func prefix(value string) string {
	if value = strings.TrimRight(value, "/"); value == "" {
		return "/"
	}
	return value
}

// entries translates the rules of one route. A match that cannot be expressed
// is left out; a rule whose action cannot be expressed answers 500.
func (t *Translator) entries(r *xds.HTTPRoute) ([]entry, error) {
	var out []entry
	var errs []error
	for i, rule := range r.Rules {
		ruleName := cmp.Or(rule.Name, strconv.Itoa(i))
		matches := rule.Matches
		if len(matches) == 0 {
			matches = []xds.HTTPMatch{{}}
		}
		var ruleErr error
		for j, m := range matches {
			match, err := routeMatch(m)
			if err != nil {
				errs = append(errs, fmt.Errorf("rule %s, match %d: %w", ruleName, j, err))
				continue
			}
			route := &routev3.Route{
				Name:     fmt.Sprintf("httproute/%s/%s/%s/%d", r.Namespace, r.Name, ruleName, j),
				Match:    match,
				Metadata: metadata("HTTPRoute", r.Namespace, r.Name),
			}
			if ruleErr = t.fill(route, rule); ruleErr != nil {
				answer500(route, "the rule cannot be served")
			}
			if err := route.ValidateAll(); err != nil {
				errs = append(errs, fmt.Errorf("rule %s, match %d: %w", ruleName, j, err))
				continue
			}
			out = append(out, entry{route: route, match: m, from: r, rule: i, indx: j})
		}
		if ruleErr != nil {
			errs = append(errs, fmt.Errorf("rule %s: %w", ruleName, ruleErr))
		}
	}
	return out, errors.Join(errs...)
}

func answer500(r *routev3.Route, why string) {
	r.Action = &routev3.Route_DirectResponse{DirectResponse: &routev3.DirectResponseAction{
		Status: http.StatusInternalServerError,
		Body: &corev3.DataSource{Specifier: &corev3.DataSource_InlineString{
			InlineString: "sluice: " + why + "\n",
		}},
	}}
	r.RequestHeadersToAdd, r.RequestHeadersToRemove = nil, nil
	r.ResponseHeadersToAdd, r.ResponseHeadersToRemove = nil, nil
}

// routeMatch translates one match.
func routeMatch(m xds.HTTPMatch) (*routev3.RouteMatch, error) {
	out := &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: "/"}}
	if m.Path != nil {
		switch m.Path.Type {
		case xds.MatchExact:
			out.PathSpecifier = &routev3.RouteMatch_Path{Path: m.Path.Value}
		case xds.MatchPrefix:
			if p := prefix(m.Path.Value); p != "/" {
				out.PathSpecifier = &routev3.RouteMatch_PathSeparatedPrefix{PathSeparatedPrefix: p}
			}
		case xds.MatchRegex:
			re, err := regex(m.Path.Value)
			if err != nil {
				return nil, fmt.Errorf("path: %w", err)
			}
			out.PathSpecifier = &routev3.RouteMatch_SafeRegex{SafeRegex: re}
		default:
			return nil, fmt.Errorf("path: there is no match type %q", m.Path.Type)
		}
	}
	if m.Method != "" {
		out.Headers = append(out.Headers, &routev3.HeaderMatcher{
			Name: ":method",
			HeaderMatchSpecifier: &routev3.HeaderMatcher_StringMatch{StringMatch: &matcherv3.StringMatcher{
				MatchPattern: &matcherv3.StringMatcher_Exact{Exact: m.Method},
			}},
		})
	}
	for _, h := range m.Headers {
		s, err := stringMatcher(h.StringMatch)
		if err == nil && !httpguts.ValidHeaderFieldName(h.Name) {
			err = errors.New("the name is not a header's")
		}
		if err != nil {
			return nil, fmt.Errorf("header %q: %w", h.Name, err)
		}
		out.Headers = append(out.Headers, &routev3.HeaderMatcher{
			Name:                 h.Name,
			HeaderMatchSpecifier: &routev3.HeaderMatcher_StringMatch{StringMatch: s},
		})
	}
	for _, q := range m.Queries {
		s, err := stringMatcher(q.StringMatch)
		if err != nil {
			return nil, fmt.Errorf("query parameter %q: %w", q.Name, err)
		}
		out.QueryParameters = append(out.QueryParameters, &routev3.QueryParameterMatcher{
			Name:                         q.Name,
			QueryParameterMatchSpecifier: &routev3.QueryParameterMatcher_StringMatch{StringMatch: s},
		})
	}
	return out, nil
}

func stringMatcher(m xds.StringMatch) (*matcherv3.StringMatcher, error) {
	switch m.Type {
	case xds.MatchExact:
		return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: m.Value}}, nil
	case xds.MatchRegex:
		re, err := regex(m.Value)
		if err != nil {
			return nil, err
		}
		return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_SafeRegex{SafeRegex: re}}, nil
	}
	return nil, fmt.Errorf("there is no match type %q", m.Type)
}

// regex refuses what Envoy would refuse, because Envoy would refuse the whole
// table with it. Go's regular expressions are RE2's, as Envoy's are.
func regex(value string) (*matcherv3.RegexMatcher, error) {
	re, err := syntax.Parse(value, syntax.Perl)
	if err != nil {
		return nil, fmt.Errorf("regular expression %q: %w", value, err)
	}
	prog, err := syntax.Compile(re.Simplify())
	if err != nil {
		return nil, fmt.Errorf("regular expression %q: %w", value, err)
	}
	if len(prog.Inst) > maxRegexProgram {
		return nil, fmt.Errorf("regular expression of %d bytes: too large", len(value))
	}
	return &matcherv3.RegexMatcher{Regex: value}, nil
}

// fill gives the route its action and header changes.
func (t *Translator) fill(r *routev3.Route, rule xds.HTTPRule) error {
	if rule.Unsupported != "" {
		return errors.New(rule.Unsupported)
	}
	action := t.action(rule)
	request, host, err := headers(rule.RequestHeaders, true)
	if err != nil {
		return fmt.Errorf("request headers: %w", err)
	}
	response, _, err := headers(rule.ResponseHeaders, false)
	if err != nil {
		return fmt.Errorf("response headers: %w", err)
	}
	if host != "" {
		action.HostRewriteSpecifier = &routev3.RouteAction_HostRewriteLiteral{HostRewriteLiteral: host}
	}
	backends := slices.DeleteFunc(slices.Clone(rule.Backends), func(b xds.HTTPBackend) bool { return b.Weight == 0 })
	switch {
	case len(backends) == 0:
		answer500(r, "the rule has no backend with a weight")
		return nil
	case len(backends) == 1 && plain(backends[0]):
		action.ClusterSpecifier = &routev3.RouteAction_Cluster{Cluster: backendCluster(backends[0])}
	default:
		weighted := &routev3.WeightedCluster{}
		var sum uint64
		for i, b := range backends {
			if sum += uint64(b.Weight); sum > math.MaxUint32 {
				return errors.New("the sum of the weights is too large")
			}
			w, err := clusterWeight(b)
			if err != nil {
				return fmt.Errorf("backend %d: %w", i, err)
			}
			weighted.Clusters = append(weighted.Clusters, w)
		}
		action.ClusterSpecifier = &routev3.RouteAction_WeightedClusters{WeightedClusters: weighted}
	}
	r.Action = &routev3.Route_Route{Route: action}
	r.RequestHeadersToAdd, r.RequestHeadersToRemove = request.add, request.remove
	r.ResponseHeadersToAdd, r.ResponseHeadersToRemove = response.add, response.remove
	return nil
}

// action is what all actions that forward have in common.
func (t *Translator) action(rule xds.HTTPRule) *routev3.RouteAction {
	retries := t.retries()
	if rule.BackendTimeout > 0 {
		retries.PerTryTimeout = durationpb.New(rule.BackendTimeout)
	}
	return &routev3.RouteAction{
		Timeout:                     durationpb.New(max(rule.RequestTimeout, 0)),
		RetryPolicy:                 retries,
		ClusterNotFoundResponseCode: routev3.RouteAction_INTERNAL_SERVER_ERROR,
	}
}

func backendCluster(b xds.HTTPBackend) string {
	if b.Invalid {
		return InvalidCluster
	}
	return ServiceName(b.Ref)
}

func clusterWeight(b xds.HTTPBackend) (*routev3.WeightedCluster_ClusterWeight, error) {
	request, host, err := headers(b.RequestHeaders, true)
	if err != nil {
		return nil, fmt.Errorf("request headers: %w", err)
	}
	response, _, err := headers(b.ResponseHeaders, false)
	if err != nil {
		return nil, fmt.Errorf("response headers: %w", err)
	}
	w := &routev3.WeightedCluster_ClusterWeight{
		Name:                    backendCluster(b),
		Weight:                  u32(b.Weight),
		RequestHeadersToAdd:     request.add,
		RequestHeadersToRemove:  request.remove,
		ResponseHeadersToAdd:    response.add,
		ResponseHeadersToRemove: response.remove,
	}
	if host != "" {
		w.HostRewriteSpecifier = &routev3.WeightedCluster_ClusterWeight_HostRewriteLiteral{HostRewriteLiteral: host}
	}
	return w, nil
}

// A mutation is a header modifier in Envoy's terms.
type mutation struct {
	add    []*corev3.HeaderValueOption
	remove []string
}

// headers translates a modifier. Setting Host in a request is a thing of its
// own in Envoy; that value is returned as host.
func headers(m xds.HeaderModifier, request bool) (out mutation, host string, err error) {
	for _, h := range m.Set {
		if request && strings.EqualFold(h.Name, "host") {
			host = h.Value
			continue
		}
		if err := checkHeader(h.Name, h.Value); err != nil {
			return mutation{}, "", err
		}
		out.add = append(out.add, setHeader(h.Name, h.Value))
	}
	for _, h := range m.Add {
		if err := checkHeader(h.Name, h.Value); err != nil {
			return mutation{}, "", err
		}
		o := setHeader(h.Name, h.Value)
		o.AppendAction = corev3.HeaderValueOption_APPEND_IF_EXISTS_OR_ADD
		out.add = append(out.add, o)
	}
	for _, name := range m.Remove {
		if err := checkHeader(name, ""); err != nil {
			return mutation{}, "", err
		}
		out.remove = append(out.remove, name)
	}
	return out, host, nil
}

// setHeader sets a header to exactly value: Envoy reads % as the start of a
// variable.
func setHeader(name, value string) *corev3.HeaderValueOption {
	return &corev3.HeaderValueOption{
		Header:         &corev3.HeaderValue{Key: name, Value: strings.ReplaceAll(value, "%", "%%")},
		AppendAction:   corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD,
		KeepEmptyValue: true,
	}
}

func checkHeader(name, value string) error {
	switch {
	case !httpguts.ValidHeaderFieldName(name):
		return fmt.Errorf("%q is no header name", name)
	case !httpguts.ValidHeaderFieldValue(value):
		return fmt.Errorf("header %s: the value has characters that are not allowed", name)
	case strings.EqualFold(name, "host"):
		return errors.New("header host can only be set, in requests")
	}
	return nil
}

// plain reports whether the backend changes no header.
func plain(b xds.HTTPBackend) bool {
	none := func(m xds.HeaderModifier) bool { return len(m.Set)+len(m.Add)+len(m.Remove) == 0 }
	return none(b.RequestHeaders) && none(b.ResponseHeaders)
}
