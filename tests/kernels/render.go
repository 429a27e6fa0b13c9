package main

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// renderSupport returns support.yaml and the versions that were tried last as a
// table in Markdown: what works down, kernels across.
func renderSupport(table []support, counted map[string]recorded) string {
	rows := []struct {
		name string
		cell func(support) string
	}{
		{"", func(s support) string { return s.Name }},
		{"---", func(support) string { return "---" }},
		{"Debian", func(s support) string { return s.Debian }},
		{"tried last", func(s support) string { return counted[s.Name].version }},
		{"`auto` takes", func(s support) string { return s.Backend }},
		{"why not eBPF", func(s support) string { return s.Reason }},
		{"eBPF programs that it loads", func(s support) string {
			n := len(counted[s.Name].counts)
			return fmt.Sprintf("%d of %d", n, n+len(s.Refused))
		}},
	}
	type named struct {
		what string
		of   func(support) []string
	}
	for _, n := range []named{
		{"eBPF: ", func(s support) []string { return s.Features }},
		{"iptables: ", func(s support) []string { return s.IPTables }},
	} {
		all := map[string]bool{}
		for _, s := range table {
			for _, f := range n.of(s) {
				all[f] = true
			}
		}
		for _, f := range sortedKeys(all) {
			rows = append(rows, struct {
				name string
				cell func(support) string
			}{n.what + f, func(s support) string {
				if slices.Contains(n.of(s), f) {
					return "yes"
				}
				return "no"
			}})
		}
	}
	var b strings.Builder
	for _, r := range rows {
		cells := []string{r.name}
		for _, s := range table {
			cells = append(cells, r.cell(s))
		}
		writeRow(&b, cells)
	}
	return b.String()
}

// renderCounts returns instructions.txt as a table in Markdown.
func renderCounts(table []support, counted map[string]recorded) string {
	var b strings.Builder
	head, line := []string{"program"}, []string{"---"}
	programs := map[string]bool{}
	for _, s := range table {
		head, line = append(head, s.Name), append(line, "---:")
		for p := range counted[s.Name].counts {
			programs[p] = true
		}
	}
	writeRow(&b, head)
	writeRow(&b, line)
	for _, p := range sortedKeys(programs) {
		cells := []string{"`" + p + "`"}
		for _, s := range table {
			cell := "refused"
			if n, ok := counted[s.Name].counts[p]; ok {
				cell = strconv.Itoa(n)
			}
			cells = append(cells, cell)
		}
		writeRow(&b, cells)
	}
	return b.String()
}

func writeRow(b *strings.Builder, cells []string) {
	b.WriteString("| " + strings.Join(cells, " | ") + " |\n")
}
