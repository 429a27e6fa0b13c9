package bpf

import (
	"net/netip"

	"github.com/sluicemesh/sluice/pkg/redirect"
)

// Short names for what C calls enum sl_match.
const (
	none     = redirectSlMatchSL_MATCH_NONE
	included = redirectSlMatchSL_MATCH_INCLUDED
	excluded = redirectSlMatchSL_MATCH_EXCLUDED
)

// A table is a policy in the form of the maps: what is in neither list has the
// default of its kind.
type table struct {
	outPort, outAddr4, outAddr6, inPort redirectSlMatch

	out, in map[uint16]redirectSlMatch
	cidrs   map[netip.Prefix]redirectSlMatch
}

// entries is the number of entries that the table needs in ports and cidrs.
func (t table) entries() int { return len(t.out) + len(t.in) + len(t.cidrs) }

// ports returns both lists of ports by their direction.
func (t table) ports() map[redirectSlDirection]map[uint16]redirectSlMatch {
	return map[redirectSlDirection]map[uint16]redirectSlMatch{
		redirectSlDirectionSL_OUTBOUND: t.out, redirectSlDirectionSL_INBOUND: t.in,
	}
}

// A route is one of the pod: which destinations leave over an excluded interface.
type route struct {
	to       netip.Prefix
	excluded bool
}

// compile turns a policy into a table. Each prefix carries the final answer for
// the addresses that no longer prefix covers, so that one lookup of the longest
// match decides however many prefixes there are. Routes count only where one
// leads out of an excluded interface.
func compile(p redirect.Policy, routes []route) table {
	t := table{cidrs: make(map[netip.Prefix]redirectSlMatch)}
	t.outPort, t.out = compilePorts(p.Outbound.IncludePorts, p.Outbound.ExcludePorts)
	t.inPort, t.in = compilePorts(p.Inbound.IncludePorts, p.Inbound.ExcludePorts)

	in, ex := p.Outbound.IncludeCIDRs, p.Outbound.ExcludeCIDRs
	switch {
	case ex.All:
		t.outAddr4, t.outAddr6 = excluded, excluded
		return t
	case in.All:
		t.outAddr4, t.outAddr6 = included, included
	}
	prefixes := append(append([]netip.Prefix(nil), in.List...), ex.List...)
	for _, r := range routes {
		prefixes = append(prefixes, r.to)
	}
	for _, p := range prefixes {
		switch {
		case covered(p, ex.List), leavesExcluded(p, routes):
			t.cidrs[p] = excluded
		case in.All, covered(p, in.List):
			t.cidrs[p] = included
		default:
			t.cidrs[p] = none
		}
	}
	return t
}

func compilePorts(in, ex redirect.Ports) (byDefault redirectSlMatch, list map[uint16]redirectSlMatch) {
	list = make(map[uint16]redirectSlMatch)
	switch {
	case ex.All:
		return excluded, list
	case in.All:
		byDefault = included
	}
	for _, port := range in.List {
		list[port] = included
	}
	for _, port := range ex.List {
		list[port] = excluded
	}
	return byDefault, list
}

// covered reports whether one of list contains the whole of p.
func covered(p netip.Prefix, list []netip.Prefix) bool {
	for _, q := range list {
		if contains(q, p) {
			return true
		}
	}
	return false
}

// leavesExcluded reports whether the route to p leads out of an excluded interface.
func leavesExcluded(p netip.Prefix, routes []route) bool {
	best, out := -1, false
	for _, r := range routes {
		if contains(r.to, p) && r.to.Bits() > best {
			best, out = r.to.Bits(), r.excluded
		}
	}
	return out
}

func contains(outer, inner netip.Prefix) bool {
	return outer.Bits() <= inner.Bits() && outer.Contains(inner.Addr())
}
