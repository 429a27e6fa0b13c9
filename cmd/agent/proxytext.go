package main

import (
	"bufio"
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// The text format of Prometheus, as sidecars write it and /metrics/proxies
// passes it on. Sidecars belong to the pods' owners and are not trusted: every
// line is taken apart and written anew.

// maxLine is the longest line of a sidecar, in bytes.
const maxLine = 64 << 10

// proxyStats are samples of one sidecar by family.
type proxyStats struct {
	families map[string]*proxyFamily
	samples  int
	bytes    int64 // as passed to keep
}

// add takes in further statistics, of other families.
func (s *proxyStats) add(more proxyStats) {
	maps.Copy(s.families, more.families)
	s.samples += more.samples
	s.bytes += more.bytes
}

// A proxyFamily has samples as lines that are complete but for the pod's
// labels: `name,label="value"} 1`. The name ends at the first comma or brace.
type proxyFamily struct {
	kind  string // counter, gauge, histogram, summary or untyped
	lines []byte
}

// parseProxyStats reads what one sidecar sends. What is not chosen or
// not Envoy's is passed over, as is a series' second sample. keep is told how many bytes
// more are in memory and may refuse. What is no text format is an error that
// wraps errBadText.
func parseProxyStats(r io.Reader, choice proxyChoice, keep func(bytes int) error) (proxyStats, error) {
	p := proxyParser{
		choice: choice,
		stats:  proxyStats{families: map[string]*proxyFamily{}},
		kinds:  map[string]string{}, seen: map[uint64]struct{}{}, seed: maphash.MakeSeed(),
	}
	lines := bufio.NewReaderSize(r, maxLine)
	for n := 1; ; n++ {
		line, err := lines.ReadSlice('\n')
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
			return p.stats, fmt.Errorf("%w: line %d is longer than %d bytes", errBadText, n, maxLine)
		case errors.Is(err, io.EOF) && len(line) == 0:
			return p.stats, nil
		case err != nil && !errors.Is(err, io.EOF):
			return p.stats, err
		case err != nil:
			return p.stats, fmt.Errorf("%w: line %d has no end", errBadText, n)
		}
		added, err := p.line(bytes.TrimRight(line, "\r\n"))
		if err != nil {
			return p.stats, fmt.Errorf("%w: line %d: %w", errBadText, n, err)
		}
		if added > 0 {
			p.stats.samples++
			p.stats.bytes += int64(added)
			if err := keep(added); err != nil {
				return p.stats, err
			}
		}
	}
}

type proxyParser struct {
	choice proxyChoice
	stats  proxyStats
	kinds  map[string]string // by family
	family string            // of the last TYPE line
	wanted bool
	seen   map[uint64]struct{} // hashes of series
	seed   maphash.Seed
	labels []proxyLabel // reused
}

// A proxyLabel has its value as it stands between the quotes.
type proxyLabel struct{ name, value []byte }

// line takes in one line and returns how many bytes it added.
func (p *proxyParser) line(line []byte) (int, error) {
	if len(line) == 0 {
		return 0, nil
	}
	if !utf8.Valid(line) {
		return 0, errors.New("not UTF-8")
	}
	if line[0] == '#' {
		return 0, p.comment(line)
	}
	end := 0
	for end < len(line) && nameByte(line[end], end == 0, true) {
		end++
	}
	name, rest := line[:end], line[end:]
	if len(name) == 0 {
		return 0, errors.New("no metric name")
	}
	if !p.belongs(name) {
		// Envoy gives every sample its TYPE line.
		return 0, fmt.Errorf("sample %.100q is not of the family above it", name)
	}
	var err error
	p.labels = p.labels[:0]
	if len(rest) > 0 && rest[0] == '{' {
		if p.labels, rest, err = parseLabels(p.labels, rest[1:]); err != nil {
			return 0, err
		}
	}
	value := bytes.Trim(rest, " \t")
	if len(value) == len(rest) || len(value) == 0 {
		return 0, errors.New("no value")
	}
	// Neither a time nor an exemplar follows: Envoy sends none.
	if !isNumber(value) {
		return 0, fmt.Errorf("value %.100q is no number", value)
	}
	for _, l := range p.labels {
		// Parsers read these two as numbers, and refuse the whole scrape for one that is none.
		if string(l.name) == boundLabels[p.kinds[p.family]] && !isNumber(l.value) {
			return 0, fmt.Errorf("label %s: %.100q is no number", l.name, l.value)
		}
	}
	if !p.wanted || !p.choice.concerns(p.labels) || p.again(name) {
		return 0, nil
	}
	f := p.stats.families[p.family]
	if f == nil {
		f = &proxyFamily{kind: p.kinds[p.family]}
		p.stats.families[strings.Clone(p.family)] = f
	}
	before := len(f.lines)
	f.lines = append(f.lines, name...)
	for _, l := range p.labels {
		f.lines = append(f.lines, ',')
		// Whatever does not come from Envoy itself could pass for a label of ours or
		// of the scraping Prometheus.
		if !bytes.HasPrefix(l.name, []byte("envoy_")) && string(l.name) != "le" && string(l.name) != "quantile" {
			f.lines = append(f.lines, "exported_"...)
		}
		f.lines = append(f.lines, l.name...)
		f.lines = append(f.lines, '=', '"')
		f.lines = append(f.lines, l.value...)
		f.lines = append(f.lines, '"')
	}
	f.lines = append(f.lines, "} "...)
	f.lines = append(f.lines, value...)
	f.lines = append(f.lines, '\n')
	return len(f.lines) - before, nil
}

// comment takes in a line that begins with #: only TYPE means anything.
func (p *proxyParser) comment(line []byte) error {
	fields := bytes.Fields(line)
	if len(fields) < 2 || string(fields[0]) != "#" || string(fields[1]) != "TYPE" {
		return nil
	}
	if len(fields) != 4 {
		return errors.New("TYPE needs a name and a type")
	}
	for i, b := range fields[2] {
		if !nameByte(b, i == 0, true) {
			return fmt.Errorf("%.100q is no metric name", fields[2])
		}
	}
	family, kind := string(fields[2]), string(fields[3])
	if !slices.Contains([]string{"counter", "gauge", "histogram", "summary", "untyped"}, kind) {
		return fmt.Errorf("%.100q is no type", kind)
	}
	if before, ok := p.kinds[family]; ok && before != kind {
		return fmt.Errorf("%.100q is a %s and a %s", family, before, kind)
	}
	p.kinds[family] = kind
	p.family = family
	// Other names could pass for metrics of the agent.
	p.wanted = strings.HasPrefix(family, "envoy_") && p.choice.wants(family, kind)
	return nil
}

// boundLabels names the label that says which bucket or quantile a sample of a
// family of that type is.
var boundLabels = map[string]string{"histogram": "le", "summary": "quantile"}

// isNumber says whether b is a number as the text format has them.
func isNumber(b []byte) bool {
	_, err := strconv.ParseFloat(string(b), 64)
	return err == nil && !bytes.ContainsAny(b, "xX_")
}

// belongs says whether a sample of that name is of the family above it.
func (p *proxyParser) belongs(name []byte) bool {
	suffix, ok := bytes.CutPrefix(name, []byte(p.family))
	if !ok || p.family == "" {
		return false
	}
	switch p.kinds[p.family] {
	case "histogram":
		return string(suffix) == "_bucket" || string(suffix) == "_sum" || string(suffix) == "_count"
	case "summary":
		return len(suffix) == 0 || string(suffix) == "_sum" || string(suffix) == "_count"
	default:
		return len(suffix) == 0
	}
}

// again says whether there was a sample of the same series. It sorts labels.
func (p *proxyParser) again(name []byte) bool {
	slices.SortFunc(p.labels, func(a, b proxyLabel) int {
		// The order is free but for the reader's sake: buckets of a histogram last.
		return cmp.Or(btoi(string(a.name) == "le")-btoi(string(b.name) == "le"), bytes.Compare(a.name, b.name))
	})
	var h maphash.Hash
	h.SetSeed(p.seed)
	_, _ = h.Write(name)
	for _, l := range p.labels {
		if len(l.value) == 0 {
			continue // the same as none
		}
		_, _ = h.Write([]byte{0})
		_, _ = h.Write(l.name)
		_, _ = h.Write([]byte{0})
		_, _ = h.Write(l.value)
	}
	sum := h.Sum64()
	if _, ok := p.seen[sum]; ok {
		return true
	}
	p.seen[sum] = struct{}{}
	return false
}

// nameByte says whether b may stand in the name of a metric or, without colons,
// of a label.
func nameByte(b byte, first, colon bool) bool {
	switch {
	case b >= 'a' && b <= 'z', b >= 'A' && b <= 'Z', b == '_':
		return true
	case b >= '0' && b <= '9':
		return !first
	default:
		return colon && b == ':'
	}
}

// parseLabels reads what follows the opening brace, appends it to labels and
// returns what follows the closing one.
func parseLabels(labels []proxyLabel, s []byte) ([]proxyLabel, []byte, error) {
	for {
		s = bytes.TrimLeft(s, " \t")
		if len(s) > 0 && s[0] == '}' {
			return labels, s[1:], nil
		}
		end := 0
		for end < len(s) && nameByte(s[end], end == 0, false) {
			end++
		}
		name := s[:end]
		s = bytes.TrimLeft(s[end:], " \t")
		if len(name) == 0 || len(s) == 0 || s[0] != '=' {
			return nil, nil, errors.New("a label has no name or no value")
		}
		if slices.ContainsFunc(labels, func(l proxyLabel) bool { return bytes.Equal(l.name, name) }) {
			return nil, nil, fmt.Errorf("label %.100q is there twice", name)
		}
		s = bytes.TrimLeft(s[1:], " \t")
		if len(s) == 0 || s[0] != '"' {
			return nil, nil, fmt.Errorf("the value of label %.100q is not quoted", name)
		}
		s = s[1:]
		for end = 0; end < len(s) && s[end] != '"'; end++ {
			if s[end] != '\\' {
				continue
			}
			if end++; end == len(s) || s[end] != '\\' && s[end] != '"' && s[end] != 'n' {
				return nil, nil, fmt.Errorf("the value of label %.100q has an unknown escape", name)
			}
		}
		if end == len(s) {
			return nil, nil, fmt.Errorf("the value of label %.100q has no end", name)
		}
		labels = append(labels, proxyLabel{name, s[:end]})
		s = bytes.TrimLeft(s[end+1:], " \t")
		if len(s) > 0 && s[0] == ',' {
			s = s[1:]
		} else if len(s) == 0 || s[0] != '}' {
			return nil, nil, errors.New("the labels have no end")
		}
	}
}

// writeProxies writes everything: how the scrape of each sidecar went, and
// their samples, each family once.
func writeProxies(w *bufio.Writer, results []proxyResult) {
	for _, r := range results {
		if r.err != nil {
			_, _ = fmt.Fprintf(w, "# %s/%s: %s\n", r.target.Namespace, r.target.Pod, oneLine(r.err.Error()))
		}
	}
	own := func(name, help string, value func(proxyResult) (labels, value string)) {
		head := fmt.Sprintf("# HELP %s %s\n# TYPE %s gauge\n", name, help, name)
		for _, r := range results {
			if labels, value := value(r); value != "" {
				_, _ = fmt.Fprintf(w, "%s%s{%s%s} %s\n", head, name, podLabels(r.target), labels, value)
				head = "" // once, and only above a sample
			}
		}
	}
	own("sluice_proxy_scrape_up", "1 if the sidecar's statistics are part of this scrape.", func(r proxyResult) (string, string) {
		return "", strconv.Itoa(btoi(r.err == nil))
	})
	own("sluice_proxy_scrape_duration_seconds", "How long the sidecar took.", func(r proxyResult) (string, string) {
		return "", strconv.FormatFloat(r.took.Seconds(), 'g', 6, 64)
	})
	own("sluice_proxy_scrape_samples", "Samples of the sidecar in this scrape.", func(r proxyResult) (string, string) {
		return "", strconv.Itoa(r.stats.samples)
	})
	own("sluice_proxy_scrape_error_info", "1, labelled with why the sidecar's statistics are missing.", func(r proxyResult) (string, string) {
		if r.err == nil {
			return "", ""
		}
		return `,reason="` + scrapeReason(r.err) + `"`, "1"
	})

	kinds := familyKinds(results)
	labels := make([]string, len(results))
	for i, r := range results {
		labels[i] = podLabels(r.target)
	}
	for _, name := range slices.Sorted(maps.Keys(kinds)) {
		_, _ = fmt.Fprintf(w, "# TYPE %s %s\n", name, kinds[name])
		for i, r := range results {
			if f := r.stats.families[name]; f != nil && f.kind == kinds[name] {
				writeSamples(w, labels[i], f.lines)
			}
		}
	}
}

// familyKinds returns the type under which each family is passed on: should
// sidecars differ, that of most. A family that could pass for a part of a
// histogram or summary is left out.
func familyKinds(results []proxyResult) map[string]string {
	votes := map[string]map[string]int{}
	for _, r := range results {
		for name, f := range r.stats.families {
			if votes[name] == nil {
				votes[name] = map[string]int{}
			}
			votes[name][f.kind]++
		}
	}
	kinds := map[string]string{}
	for name, votes := range votes {
		kinds[name] = slices.MaxFunc(slices.Sorted(maps.Keys(votes)), func(a, b string) int { return votes[a] - votes[b] })
	}
	for name, kind := range kinds {
		if kind == "histogram" || kind == "summary" {
			for _, suffix := range []string{"_bucket", "_sum", "_count"} {
				delete(kinds, name+suffix)
			}
		}
	}
	return kinds
}

// writeSamples writes lines of a proxyFamily with the pod's labels put in.
func writeSamples(w *bufio.Writer, labels string, lines []byte) {
	for len(lines) > 0 {
		name := bytes.IndexAny(lines, ",}")
		end := bytes.IndexByte(lines, '\n') + 1
		_, _ = w.Write(lines[:name])
		_ = w.WriteByte('{')
		_, _ = w.WriteString(labels)
		_, _ = w.Write(lines[name:end])
		lines = lines[end:]
	}
}

// podLabels are the labels of every sample of a pod.
func podLabels(t proxyTarget) string {
	s := fmt.Sprintf(`namespace="%s",pod="%s"`, escapeLabel(t.Namespace), escapeLabel(t.Pod))
	if t.Workload != "" {
		s += fmt.Sprintf(`,workload="%s"`, escapeLabel(t.Workload))
	}
	return s
}

func escapeLabel(s string) string {
	return strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`).Replace(strings.ToValidUTF8(s, "\uFFFD"))
}

func oneLine(s string) string {
	return strings.ToValidUTF8(strings.NewReplacer("\n", "; ", "\r", "").Replace(s), "\uFFFD")
}
