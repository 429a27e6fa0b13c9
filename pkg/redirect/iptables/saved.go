package iptables

import (
	"fmt"
	"hash/fnv"
	"maps"
	"slices"
	"strings"
)

// saved is what of this package iptables-save printed, by table.
type saved map[string]savedTable

// A savedTable holds our chains, and the rules of built-in chains that lead to
// them.
type savedTable struct {
	jumps []jump
	// late are those of jumps behind rules of others that end the walk.
	late   []jump
	chains map[string]savedChain
}

type savedChain struct{ rules []savedRule }

// A savedRule is a rule as iptables-save prints it, without "-A chain".
type savedRule struct {
	text           string
	packets, bytes uint64
}

func (r savedRule) is(text string) bool { return r.text == text }

// parseSaved reads the output of iptables-save --counters. Rules of others are
// left out. foreign says whether there is any.
func parseSaved(out string) (s saved, foreign bool, err error) {
	s = make(saved)
	var name string
	var ended []string // built-in chains in which a rule of others ends the walk
	for line := range strings.Lines(out) {
		line = strings.TrimSpace(line)
		switch {
		case line == "" || line[0] == '#' || line == "COMMIT":
		case line[0] == '*':
			name, ended = line[1:], nil
			s[name] = savedTable{chains: make(map[string]savedChain)}
		case line[0] == ':':
			c, _, _ := strings.Cut(line[1:], " ")
			if strings.HasPrefix(c, chainPrefix) {
				s[name].chains[c] = savedChain{}
			}
		default:
			var r savedRule
			if _, err := fmt.Sscanf(line, "[%d:%d]", &r.packets, &r.bytes); err != nil {
				return nil, false, fmt.Errorf("parse counters of rule %q: %w", line, err)
			}
			_, rule, ok := strings.Cut(line, "] -A ")
			if !ok {
				return nil, false, fmt.Errorf("parse rule %q: it appends to no chain", line)
			}
			c, text, _ := strings.Cut(rule, " ")
			r.text = text
			t := s[name]
			switch {
			case strings.HasPrefix(c, chainPrefix):
				t.chains[c] = savedChain{append(t.chains[c].rules, r)}
			case strings.Contains(text, "-j "+chainPrefix):
				t.jumps = append(t.jumps, jump{c, text})
				if slices.Contains(ended, c) {
					t.late = append(t.late, jump{c, text})
				}
				s[name] = t
			default:
				foreign = true
				if endsWalk(text) {
					ended = append(ended, c)
				}
			}
		}
	}
	for name, t := range s {
		if len(t.jumps) == 0 && len(t.chains) == 0 {
			delete(s, name)
		}
	}
	return s, foreign, nil
}

// endsWalk says whether a rule of others decides over what it matches. One that
// leads to a chain of theirs does not: it is for what is theirs.
func endsWalk(rule string) bool {
	_, target, _ := strings.Cut(rule, "-j ")
	target, _, _ = strings.Cut(target, " ")
	return slices.Contains([]string{"ACCEPT", "DROP", "RETURN", "REJECT", "SNAT", "MASQUERADE", "DNAT", "REDIRECT", "NETMAP"}, target)
}

// hash changes with every change of a rule, chain or jump, and with no counter.
func (s saved) hash() uint64 {
	h := fnv.New64a()
	for _, name := range slices.Sorted(maps.Keys(s)) {
		t := s[name]
		_, _ = fmt.Fprintf(h, "*%s %q\n", name, t.jumps) // a hash takes everything
		for _, c := range slices.Sorted(maps.Keys(t.chains)) {
			_, _ = fmt.Fprintf(h, ":%s\n", c)
			for _, r := range t.chains[c].rules {
				_, _ = fmt.Fprintln(h, r.text)
			}
		}
	}
	return h.Sum64()
}

// packets returns the counter of a chain with a single rule.
func (s saved) packets(table, chain string) uint64 {
	rules := s[table].chains[chain].rules
	if len(rules) != 1 {
		return 0
	}
	return rules[0].packets
}
