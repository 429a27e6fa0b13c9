package iptables

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/sluicemesh/sluice/pkg/redirect"
)

const (
	// chainPrefix begins the names of all chains of this package, and of
	// nothing else.
	chainPrefix = "SLUICE_"

	// agentMark is the socket mark that lets the agent reach Envoy's admin port.
	agentMark = 0x51ce

	// multiportSlots is how many ports one rule can name; a range takes two.
	multiportSlots = 15
	// leafRules is how many rules of one set are walked one by one. Longer sets
	// become a tree with that many branches at each node.
	leafRules = 8
	// branchBits is how many address bits one node of a tree decides.
	branchBits = 3
)

// syn matches what begins a connection. nat chains see the first packet of
// everything that conntrack did not know, also the middle of a connection that
// was there before the rules: that must pass.
const syn = "-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN"

// A chain is a name and the rules in it, as iptables-save prints them without
// "-A name".
type chain struct {
	name  string
	rules []string
}

// A jump is a rule of a built-in chain that leads to a chain of ours.
type jump struct{ builtin, rule string }

// A table is what this package has in one table of one family.
type table struct {
	name  string
	jumps []jump
	// walk are the chains that follow from the workload.
	walk []chain
	// verdicts are the chains in which every walk ends: one rule each, the same
	// for all workloads. A policy that changes leaves them alone, so their
	// counters go on.
	verdicts []chain
}

// A verdict is the meaning of a verdict chain's packet counter.
type verdict struct {
	table, chain string
	direction    redirect.Direction
	verdict      string
	reason       string
	rule         string
	// minus is the chain whose connections are to be counted there and not here.
	minus string
}

const (
	redirected = "redirected"
	bypassed   = "bypassed"
	denied     = "denied"
)

// verdicts returns all ends of a walk. RETURN leads back to the built-in chain,
// so rules of others behind ours still apply.
func verdicts() []verdict {
	toOutbound := fmt.Sprintf("-p tcp -j REDIRECT --to-ports %d", redirect.OutboundPort)
	toInbound := fmt.Sprintf("-p tcp -j REDIRECT --to-ports %d", redirect.InboundPort)
	pass := "-j RETURN"
	return []verdict{
		{"nat", "SLUICE_OUT_CAPTURED", redirect.Outbound, redirected, "captured", toOutbound, "SLUICE_OUT_DOWN"},
		{"nat", "SLUICE_OUT_SELF", redirect.Outbound, redirected, "self_call", toInbound, "SLUICE_SELF_DOWN"},
		{"nat", "SLUICE_OUT_PROXY", redirect.Outbound, bypassed, "proxy", pass, ""},
		{"nat", "SLUICE_OUT_LOOPBACK", redirect.Outbound, bypassed, "loopback", pass, ""},
		{"nat", "SLUICE_OUT_OWN", redirect.Outbound, bypassed, "own_address", pass, ""},
		{"nat", "SLUICE_OUT_X_IF", redirect.Outbound, bypassed, "excluded_interface", pass, ""},
		{"nat", "SLUICE_OUT_X_PORT", redirect.Outbound, bypassed, "excluded_port", pass, ""},
		{"nat", "SLUICE_OUT_X_CIDR", redirect.Outbound, bypassed, "excluded_cidr", pass, ""},
		{"nat", "SLUICE_OUT_OTHER", redirect.Outbound, bypassed, "not_included", pass, ""},
		{"nat", "SLUICE_IN_CAPTURED", redirect.Inbound, redirected, "captured", toInbound, "SLUICE_IN_DOWN"},
		{"nat", "SLUICE_IN_PROXYPORT", redirect.Inbound, bypassed, "proxy_port", pass, ""},
		{"nat", "SLUICE_IN_PROBE", redirect.Inbound, bypassed, "host_probe", pass, ""},
		{"nat", "SLUICE_IN_HEALTH", redirect.Inbound, bypassed, "health_port", pass, ""},
		{"nat", "SLUICE_IN_X_IF", redirect.Inbound, bypassed, "excluded_interface", pass, ""},
		{"nat", "SLUICE_IN_X_PORT", redirect.Inbound, bypassed, "excluded_port", pass, ""},
		{"nat", "SLUICE_IN_OTHER", redirect.Inbound, bypassed, "not_included", pass, ""},
		{"filter", "SLUICE_ADMIN", redirect.Outbound, denied, "admin_port", "-p tcp -j REJECT --reject-with tcp-reset", ""},
		{"filter", "SLUICE_OUT_DOWN", redirect.Outbound, denied, "proxy_down", pass, ""},
		{"filter", "SLUICE_SELF_DOWN", redirect.Outbound, denied, "proxy_down", pass, ""},
		{"filter", "SLUICE_IN_DOWN", redirect.Inbound, denied, "proxy_down", pass, ""},
	}
}

// tables returns what the workload needs for the family of addr, its address.
// Connections from source are of the node itself and pass; none do if it is zero.
// filter comes first: traffic is steered from the nat table on.
func tables(w redirect.Workload, addr, source netip.Addr) []table {
	filter := table{
		name: "filter",
		// Every packet of the pod passes this rule, so it is a single one: only
		// a SYN or RST goes further.
		jumps: []jump{{"OUTPUT", "-p tcp -m tcp ! --tcp-flags SYN,RST NONE -j SLUICE_FILTER"}},
		walk:  []chain{filterChain(w)},
	}
	nat := table{
		name: "nat",
		jumps: []jump{
			{"PREROUTING", syn + " -j SLUICE_INBOUND"},
			{"OUTPUT", syn + " -j SLUICE_OUTPUT"},
		},
	}
	b := &builder{v4: addr.Is4(), chains: make(map[string]*chain)}
	b.inbound(w, addr, source)
	b.outbound(w, addr)
	for _, name := range b.order {
		nat.walk = append(nat.walk, *b.chains[name])
	}
	for _, v := range verdicts() {
		t := &nat
		if v.table == filter.name {
			t = &filter
		}
		t.verdicts = append(t.verdicts, chain{v.chain, []string{v.rule}})
	}
	return []table{filter, nat}
}

// filterChain refuses the admin port to all but the proxy and the agent, and
// counts the redirected connections that no proxy was there for: the kernel
// answers their SYN with a RST, so conntrack never sees them assured.
func filterChain(w redirect.Workload) chain {
	others := []string{fmt.Sprintf("-m owner ! --uid-owner %d", w.Policy.ProxyUID)}
	if w.ProxyCgroup != "" {
		others = append(others, "-m cgroup ! --path "+quote(w.ProxyCgroup))
	}
	var rules []string
	for _, match := range others {
		rules = append(rules, fmt.Sprintf("-o lo -p tcp -m tcp --dport %d --tcp-flags FIN,SYN,RST,ACK SYN -m mark ! --mark %#x %s -g SLUICE_ADMIN",
			redirect.AdminPort, agentMark, match))
	}
	down := " -m tcp --sport %d --tcp-flags SYN,RST RST -m conntrack --ctstate DNAT ! --ctstatus ASSURED -g %s"
	return chain{"SLUICE_FILTER", append(rules,
		fmt.Sprintf("-o lo -p tcp"+down, redirect.OutboundPort, "SLUICE_OUT_DOWN"),
		fmt.Sprintf("-o lo -p tcp"+down, redirect.InboundPort, "SLUICE_SELF_DOWN"),
		fmt.Sprintf("! -o lo -p tcp"+down, redirect.InboundPort, "SLUICE_IN_DOWN"),
	)}
}

// A builder writes chains one after the other. Chains lead on by goto only, so
// the way back from any verdict is to the built-in chain.
type builder struct {
	v4     bool
	chains map[string]*chain
	order  []string
	cur    *chain
}

// begin makes name the chain that rules go to.
func (b *builder) begin(name string) {
	b.chains[name] = &chain{name: name}
	b.order = append(b.order, name)
	b.cur = b.chains[name]
}

func (b *builder) rule(format string, args ...any) {
	b.cur.rules = append(b.cur.rules, fmt.Sprintf(format, args...))
}

func (b *builder) outbound(w redirect.Workload, addr netip.Addr) {
	source, loopback := "127.0.0.6/32", "127.0.0.0/8"
	if !b.v4 {
		source, loopback = "::6/128", "::1/128"
	}
	own := netip.PrefixFrom(addr, addr.BitLen())
	proxy := fmt.Sprintf("-m owner --uid-owner %d", w.Policy.ProxyUID)
	if w.ProxyCgroup != "" {
		proxy += " -m cgroup --path " + quote(w.ProxyCgroup)
	}

	b.begin("SLUICE_OUTPUT")
	// What the proxy hands to the app must not come back to the proxy.
	b.rule("-s %s -o lo -g SLUICE_OUT_PROXY", source)
	b.rule("-d %s -g SLUICE_OUT_LOOPBACK", loopback)
	// The proxy picked its own pod as the endpoint of a service.
	b.rule("-d %s %s -g SLUICE_SELF", own, proxy)
	b.rule("%s -g SLUICE_OUT_PROXY", proxy)
	b.rule("-o lo -g SLUICE_OUT_OWN")
	for _, name := range w.Policy.ExcludeInterfaces {
		b.rule("-o %s -g SLUICE_OUT_X_IF", name)
	}
	out := w.Policy.Outbound
	b.ports("SLUICE_OUT_XP", out.ExcludePorts, "SLUICE_OUT_X_PORT")
	b.cidrs("SLUICE_OUT_XC", out.ExcludeCIDRs, "SLUICE_OUT_X_CIDR")
	b.ports("SLUICE_OUT_IP", out.IncludePorts, "SLUICE_OUT_CAPTURED")
	b.cidrs("SLUICE_OUT_IC", out.IncludeCIDRs, "SLUICE_OUT_CAPTURED")
	b.rule("-g SLUICE_OUT_OTHER")

	in := w.Policy.Inbound
	b.begin("SLUICE_SELF")
	b.rule("-p tcp -m multiport --dports %d,%d,%d,%d -g SLUICE_OUT_PROXY",
		redirect.AdminPort, redirect.OutboundPort, redirect.InboundPort, redirect.HealthPort)
	b.ports("SLUICE_SELF_XP", in.ExcludePorts, "SLUICE_OUT_PROXY")
	b.ports("SLUICE_SELF_IP", in.IncludePorts, "SLUICE_OUT_SELF")
	b.rule("-g SLUICE_OUT_PROXY")
}

func (b *builder) inbound(w redirect.Workload, addr, source netip.Addr) {
	own := netip.PrefixFrom(addr, addr.BitLen())
	b.begin("SLUICE_INBOUND")
	for _, name := range w.Policy.ExcludeInterfaces {
		b.rule("-i %s -g SLUICE_IN_X_IF", name)
	}
	for _, name := range w.Interfaces {
		b.rule("-d %s -i %s -g SLUICE_IN_PORTS", own, name)
	}

	in := w.Policy.Inbound
	b.begin("SLUICE_IN_PORTS")
	// To capture these would make the proxy call itself without end.
	b.rule("-p tcp -m multiport --dports %d,%d -g SLUICE_IN_PROXYPORT", redirect.OutboundPort, redirect.InboundPort)
	b.rule("-p tcp -m tcp --dport %d -g SLUICE_IN_HEALTH", redirect.HealthPort)
	b.ports("SLUICE_IN_XP", in.ExcludePorts, "SLUICE_IN_X_PORT")
	captured := "SLUICE_IN_CAPTURED"
	if source.IsValid() {
		captured = "SLUICE_IN_TAKE"
	}
	b.ports("SLUICE_IN_IP", in.IncludePorts, captured)
	b.rule("-g SLUICE_IN_OTHER")
	if source.IsValid() {
		b.begin(captured)
		b.rule("-s %s -g SLUICE_IN_PROBE", netip.PrefixFrom(source, source.BitLen()))
		b.rule("-g SLUICE_IN_CAPTURED")
	}
}

// A span is a run of ports.
type span struct{ first, last uint16 }

func (s span) String() string {
	if s.first == s.last {
		return fmt.Sprint(s.first)
	}
	return fmt.Sprintf("%d:%d", s.first, s.last)
}

// ports leads the ports of set to a verdict; the others go on behind it. tag
// names the chains of a tree.
func (b *builder) ports(tag string, set redirect.Ports, to string) {
	if set.All {
		b.rule("-g %s", to)
		return
	}
	groups := portGroups(set.List)
	if len(groups) <= leafRules {
		b.portRules(groups, to)
		return
	}
	next := tag + "_NEXT"
	b.portTree(&namer{tag: tag}, groups, to, next)
	b.begin(next)
}

// portTree ends the current chain with a tree over groups; what matches none of
// them goes to next.
func (b *builder) portTree(names *namer, groups [][]span, to, next string) {
	if len(groups) <= leafRules {
		b.portRules(groups, to)
		b.rule("-g %s", next)
		return
	}
	parts := split(groups, leafRules)
	branches := make([]string, len(parts))
	for i, part := range parts {
		branches[i] = names.next()
		all := span{part[0][0].first, last(last(part)).last}
		b.rule("-p tcp -m tcp --dport %s -g %s", all, branches[i])
	}
	b.rule("-g %s", next)
	for i, part := range parts {
		b.begin(branches[i])
		b.portTree(names, part, to, next)
	}
}

func (b *builder) portRules(groups [][]span, to string) {
	for _, g := range groups {
		if len(g) == 1 {
			b.rule("-p tcp -m tcp --dport %s -g %s", g[0], to)
			continue
		}
		names := make([]string, len(g))
		for i, s := range g {
			names[i] = s.String()
		}
		b.rule("-p tcp -m multiport --dports %s -g %s", strings.Join(names, ","), to)
	}
}

// portGroups packs sorted ports into what fits into one rule each.
func portGroups(ports []uint16) [][]span {
	var spans []span
	for _, p := range ports {
		if n := len(spans); n > 0 && spans[n-1].last+1 == p {
			spans[n-1].last = p
			continue
		}
		spans = append(spans, span{p, p})
	}
	var groups [][]span
	free := 0
	for _, s := range spans {
		slots := 1
		if s.first != s.last {
			slots = 2
		}
		if slots > free {
			groups = append(groups, nil)
			free = multiportSlots
		}
		g := &groups[len(groups)-1]
		*g = append(*g, s)
		free -= slots
	}
	return groups
}

// cidrs is ports for the addresses of the builder's family.
func (b *builder) cidrs(tag string, set redirect.CIDRs, to string) {
	if set.All {
		b.rule("-g %s", to)
		return
	}
	prefixes := disjoint(set.List, b.v4)
	if len(prefixes) <= leafRules {
		b.cidrRules(prefixes, to)
		return
	}
	next := tag + "_NEXT"
	b.cidrTree(&namer{tag: tag}, prefixes, to, next)
	b.begin(next)
}

func (b *builder) cidrTree(names *namer, prefixes []netip.Prefix, to, next string) {
	if len(prefixes) <= leafRules {
		b.cidrRules(prefixes, to)
		b.rule("-g %s", next)
		return
	}
	// Disjoint and sorted prefixes differ in a bit within all of them, so that
	// every branch is shorter than the whole.
	bits := commonBits(prefixes[0].Addr(), last(prefixes).Addr()) + branchBits
	type branch struct {
		name     string
		prefixes []netip.Prefix
	}
	var branches []branch
	for len(prefixes) > 0 {
		first := prefixes[0]
		all := netip.PrefixFrom(first.Addr(), min(bits, first.Bits())).Masked()
		n := 1
		for n < len(prefixes) && all.Contains(prefixes[n].Addr()) {
			n++
		}
		if n == 1 {
			b.cidrRules(prefixes[:1], to)
		} else {
			branches = append(branches, branch{names.next(), prefixes[:n]})
			b.rule("-d %s -g %s", all, last(branches).name)
		}
		prefixes = prefixes[n:]
	}
	b.rule("-g %s", next)
	for _, br := range branches {
		b.begin(br.name)
		b.cidrTree(names, br.prefixes, to, next)
	}
}

func (b *builder) cidrRules(prefixes []netip.Prefix, to string) {
	for _, p := range prefixes {
		if p.Bits() == 0 {
			b.rule("-g %s", to) // as iptables-save prints it
			continue
		}
		b.rule("-d %s -g %s", p, to)
	}
}

// disjoint returns the prefixes of a family, sorted, without those that others
// cover.
func disjoint(prefixes []netip.Prefix, v4 bool) []netip.Prefix {
	var family []netip.Prefix
	for _, p := range prefixes {
		if p.Addr().Is4() == v4 {
			family = append(family, p)
		}
	}
	slices.SortFunc(family, func(a, b netip.Prefix) int {
		return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
	})
	var kept []netip.Prefix
	for _, p := range family {
		if len(kept) == 0 || !last(kept).Contains(p.Addr()) {
			kept = append(kept, p)
		}
	}
	return kept
}

// commonBits returns how many leading bits two addresses of a family share.
func commonBits(a, b netip.Addr) int {
	n := 0
	for n < a.BitLen() {
		p, err := a.Prefix(n + 1)
		if err != nil || !p.Contains(b) {
			break
		}
		n++
	}
	return n
}

// A namer counts the chains of a tree.
type namer struct {
	tag string
	n   int
}

func (n *namer) next() string {
	n.n++
	return fmt.Sprintf("%s_%d", n.tag, n.n)
}

func last[T any](s []T) T { return s[len(s)-1] }

// split cuts s into at most n parts of nearly the same length.
func split[T any](s []T, n int) [][]T {
	return slices.Collect(slices.Chunk(s, (len(s)+n-1)/n))
}

// installText returns what iptables-restore --noflush --counters turns have
// into exactly want with: one transaction a table.
func installText(want []table, have saved) string {
	var s strings.Builder
	for _, t := range want {
		old := have[t.name]
		fmt.Fprintf(&s, "*%s\n", t.name)
		var verdicts []chain
		for _, c := range t.verdicts {
			// Declaring a chain empties it and its counters.
			if o, ok := old.chains[c.name]; !ok || !slices.EqualFunc(o.rules, c.rules, savedRule.is) {
				verdicts = append(verdicts, c)
			}
		}
		for _, c := range slices.Concat(verdicts, t.walk) {
			fmt.Fprintf(&s, ":%s - [0:0]\n", c.name)
		}
		for _, c := range verdicts {
			if o := old.chains[c.name].rules; len(o) == 1 {
				fmt.Fprintf(&s, "[%d:%d] ", o[0].packets, o[0].bytes)
			}
			fmt.Fprintf(&s, "-A %s %s\n", c.name, c.rules[0])
		}
		for _, c := range t.walk {
			for _, r := range c.rules {
				fmt.Fprintf(&s, "-A %s %s\n", c.name, r)
			}
		}
		s.WriteString(jumpText(t.jumps, old))
		s.WriteString(dropText(old, t))
		s.WriteString("COMMIT\n")
	}
	return s.String()
}

// holdTables returns what keeps established connections on their way when
// nothing new is redirected: the kernel tracks connections in a namespace only
// while a rule there asks for it, so this one is never reached and still needed.
func holdTables() []table {
	return []table{
		{name: "filter"},
		{name: "nat", walk: []chain{{"SLUICE_HOLD", []string{"-m conntrack --ctstate DNAT -j RETURN"}}}},
	}
}

// removeText returns what takes everything of this package out of have, "" if
// there is nothing.
func removeText(have saved) string {
	var s strings.Builder
	for _, name := range slices.Sorted(maps.Keys(have)) {
		t := have[name]
		text := jumpText(nil, t) + dropText(t, table{})
		if text != "" {
			fmt.Fprintf(&s, "*%s\n%sCOMMIT\n", name, text)
		}
	}
	return s.String()
}

// jumpText makes want the jumps into our chains: each once, in front of all
// other rules.
func jumpText(want []jump, old savedTable) string {
	var s strings.Builder
	for _, j := range old.jumps {
		if !slices.Contains(want, j) || count(old.jumps, j) > 1 || slices.Contains(old.late, j) {
			fmt.Fprintf(&s, "-D %s %s\n", j.builtin, j.rule)
		}
	}
	for _, j := range want {
		if count(old.jumps, j) != 1 || slices.Contains(old.late, j) {
			fmt.Fprintf(&s, "-I %s 1 %s\n", j.builtin, j.rule)
		}
	}
	return s.String()
}

func count(jumps []jump, j jump) int {
	n := 0
	for _, o := range jumps {
		if o == j {
			n++
		}
	}
	return n
}

// dropText takes the chains of old away that t does not have.
func dropText(old savedTable, t table) string {
	keep := make(map[string]bool)
	for _, c := range slices.Concat(t.verdicts, t.walk) {
		keep[c.name] = true
	}
	var flush, drop strings.Builder
	for _, name := range slices.Sorted(maps.Keys(old.chains)) {
		if !keep[name] {
			fmt.Fprintf(&flush, "-F %s\n", name)
			fmt.Fprintf(&drop, "-X %s\n", name)
		}
	}
	return flush.String() + drop.String()
}
