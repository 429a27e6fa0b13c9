package kube

import (
	"slices"
	"strings"
	"testing"
	"time"
)

func TestParseSamples(t *testing.T) {
	all, err := parseSamples(strings.Join([]string{
		"# HELP a what",
		`a{pod="x",reason="a \"b\", {c}"} 3`,
		`a{pod="x",reason="other"} 4`,
		`a{pod="y",reason="other"} 5`,
		"b 1.5e+03",
		`h_bucket{verb="add",le="0.002"} 4`,
		`h_bucket{verb="add",le="0.005"} 9`,
		`h_bucket{verb="add",le="+Inf"} 10`,
	}, "\n"))
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name   string
		labels []string
		want   float64
	}{
		{"a", nil, 12},
		{"a", []string{"pod=x"}, 7},
		{"a", []string{"pod=x", `reason=a "b", {c}`}, 3},
		{"a", []string{"pod=z"}, 0},
		{"b", nil, 1500},
	} {
		if got := all.sum(tc.name, tc.labels...); got != tc.want {
			t.Errorf("sum of %s %v: %g, want %g", tc.name, tc.labels, got, tc.want)
		}
	}
	if got := all.labels("a", "pod"); !slices.Equal(got, []string{"x", "y"}) {
		t.Errorf("labels: %v", got)
	}
	for q, want := range map[float64]string{0.4: "<= 2 ms", 0.5: "<= 5 ms", 0.9: "<= 5 ms", 0.99: "<= +Inf ms"} {
		if got := all.quantile("h", q, "verb=add"); got != want {
			t.Errorf("quantile %g: %s, want %s", q, got, want)
		}
	}
	if _, err := parseSamples("a{b} x"); err == nil {
		t.Error("nonsense was taken")
	}
}

func TestWhichLoadsAreHarmed(t *testing.T) {
	for load, want := range map[string]struct{ withoutB, notToB bool }{
		"load-a/stream-a@1": {true, true},
		"load-a/stream-b@1": {false, false},
		"load-b/stream-a@1": {false, true},
		"load-b/stream-b@1": {false, false},
	} {
		if without("b")(load) != want.withoutB || notTo("b")(load) != want.notToB {
			t.Errorf("%s: without %t, notTo %t", load, without("b")(load), notTo("b")(load))
		}
	}
}

func TestDifference(t *testing.T) {
	got := difference([]string{"a", "b"}, []string{"b", "c"})
	if !slices.Equal(got, []string{"- a", "+ c"}) {
		t.Errorf("got %q", got)
	}
}

func TestTable(t *testing.T) {
	rows := &table{}
	rows.add(row{scenario: "calls", backend: "ebpf", ran: "ok", requests: 60, took: 2 * time.Second, note: "fast"})
	if text := rows.String(); !strings.Contains(text, "calls") || !strings.Contains(text, "60") || !strings.Contains(text, "fast") {
		t.Errorf("table:\n%s", text)
	}
}
