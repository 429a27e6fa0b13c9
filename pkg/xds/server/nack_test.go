package server

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseNACK(t *testing.T) {
	known := map[string]bool{"a": true, "b": true, "out/ns/svc/80": true, "x: y": true, "in, out": true}
	tests := []struct {
		name, msg string
		want      []rejection
	}{
		{"nothing", "", nil},
		{"no name", "Proto constraint validation failed (ClusterValidationError.Name: value length must be at least 1)", nil},
		{"one listener", "Error adding/updating listener(s) a: error adding listener: no filter\n", []rejection{{"a", "error adding listener: no filter"}}},
		{"listeners", "Error adding/updating listener(s) a: one\nb: two, b: three\nc: four\n", []rejection{{"a", "one"}, {"b", "two, b: three\nc: four"}}},
		{"clusters", "Error adding/updating cluster(s) out/ns/svc/80: bad, worse, a: bad", []rejection{{"out/ns/svc/80", "bad, worse"}, {"a", "bad"}}},
		{"a name in another's text", "Error adding/updating listener(s) a: has the address of b: 1\n", []rejection{{"a", "has the address of b: 1"}}},
		{"twice", "Error adding/updating cluster(s) a: one, a: two", []rejection{{"a", "one, a: two"}}},
		{"a separator in a name", "Error adding/updating cluster(s) x: y: one, in, out: two", []rejection{{"x: y", "one"}, {"in, out", "two"}}},
		{"without the introduction", "b: text", []rejection{{"b", "text"}}},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			got := parseNACK(tc.msg, func(name string) bool { return known[name] })
			if diff := cmp.Diff(tc.want, got, cmp.AllowUnexported(rejection{})); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func FuzzParseNACK(f *testing.F) {
	f.Add("Error adding/updating listener(s) a: one\nb: two\n", "a", "b")
	f.Add("Error adding/updating cluster(s) a: b: c, in, out: two", "a: b", "in, out")
	f.Add("(s) : ", "", " ")
	f.Fuzz(func(t *testing.T, msg, one, two string) {
		seen := map[string]bool{}
		for _, r := range parseNACK(msg, func(name string) bool { return name == one || name == two }) {
			if r.name == "" || r.name != one && r.name != two {
				t.Errorf("found %q, which is not known", r.name)
			}
			if seen[r.name] {
				t.Errorf("found %q twice", r.name)
			}
			seen[r.name] = true
			if !strings.Contains(msg, r.name+": ") || !strings.Contains(msg, r.err) {
				t.Errorf("%q: %q is not in the text", r.name, r.err)
			}
		}
	})
}
