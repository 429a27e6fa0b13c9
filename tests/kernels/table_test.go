package main

import (
	"bytes"
	"cmp"
	"slices"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"

	"github.com/sluicemesh/sluice/tests/kernels/wire"
)

// whole are the facts of a kernel on which everything works.
func whole() wire.Facts {
	return wire.Facts{
		Backend:  "ebpf",
		Programs: []wire.Program{{Name: "sl_a", Instructions: 1000}, {Name: "sl_b", Instructions: 20}},
		Features: map[string]string{"mptcp": ""},
		IPTables: map[string]string{"nft": "", "legacy": ""},
	}
}

func TestSupportProblems(t *testing.T) {
	must := support{Name: "x", Backend: "ebpf", Features: []string{"mptcp"}, IPTables: []string{"nft", "legacy"}}
	for name, tc := range map[string]struct {
		must func(*support)
		is   func(*wire.Facts)
		want string // a part of the one problem; "": none
	}{
		"as it must be": {},
		"falls back although it need not": {
			is:   func(f *wire.Facts) { f.Backend, f.Reason = "iptables", "helper x" },
			want: "falls back to iptables, although this kernel can do eBPF: helper x",
		},
		"fallback that must be": {
			must: func(s *support) { s.Backend, s.Reason = "iptables", "helper x" },
			is:   func(f *wire.Facts) { f.Backend, f.Reason = "iptables", "helper x in y: not supported" },
		},
		"fallback for another reason": {
			must: func(s *support) { s.Backend, s.Reason = "iptables", "helper x" },
			is:   func(f *wire.Facts) { f.Backend, f.Reason = "iptables", "cgroup v2 mounted" },
			want: `falls back because "cgroup v2 mounted"`,
		},
		"fallback without a reason": {
			must: func(s *support) { s.Backend, s.Reason = "iptables", "helper x" },
			is:   func(f *wire.Facts) { f.Backend = "iptables" },
			want: `falls back because ""`,
		},
		"no fallback any more": {
			must: func(s *support) { s.Backend, s.Reason = "iptables", "helper x" },
			want: "takes ebpf, the table says iptables",
		},
		"feature missing": {
			is:   func(f *wire.Facts) { f.Features["mptcp"] = "no helper" },
			want: "feature mptcp does not work: no helper",
		},
		"feature unseen": {
			must: func(s *support) { s.Features = nil },
			want: "feature mptcp works, which the table does not say",
		},
		"feature unknown": {
			must: func(s *support) { s.Features = append(s.Features, "other") },
			want: "feature other is in the table",
		},
		"iptables missing": {
			is:   func(f *wire.Facts) { f.IPTables["legacy"] = "no table" },
			want: "iptables legacy does not work: no table",
		},
		"program refused": {
			is:   func(f *wire.Facts) { f.Programs[0] = wire.Program{Name: "sl_a", Refused: "R1 !read_ok"} },
			want: "program sl_a is refused: R1 !read_ok",
		},
		"program refused as it must be": {
			must: func(s *support) { s.Refused = []string{"sl_a"} },
			is:   func(f *wire.Facts) { f.Programs[0] = wire.Program{Name: "sl_a", Refused: "R1 !read_ok"} },
		},
		"program loaded": {
			must: func(s *support) { s.Refused = []string{"sl_a"} },
			want: "program sl_a is loaded",
		},
		"program unknown": {
			must: func(s *support) { s.Refused = []string{"sl_c"} },
			want: "program sl_c is in the table",
		},
	} {
		t.Run(name, func(t *testing.T) {
			s, f := must, whole()
			s.Features = slices.Clone(must.Features)
			if tc.must != nil {
				tc.must(&s)
			}
			if tc.is != nil {
				tc.is(&f)
			}
			wantProblem(t, s.problems(f), tc.want)
		})
	}
}

func wantProblem(t *testing.T, got []string, want string) {
	t.Helper()
	if want == "" && len(got) > 0 {
		t.Errorf("problems %q, want none", got)
	}
	if want != "" && (len(got) != 1 || !strings.Contains(got[0], want)) {
		t.Errorf("problems %q, want one with %q", got, want)
	}
}

func TestCountProblems(t *testing.T) {
	recorded := recorded{version: "6.1.7-1", counts: counts{"sl_a": 1000, "sl_b": 20}}
	for name, tc := range map[string]struct {
		version string // 6.1.9-1 if empty
		is      func(*wire.Facts)
		want    string
	}{
		"same":             {},
		"within a tenth":   {is: func(f *wire.Facts) { f.Programs[0].Instructions = 1100 }},
		"more than that":   {is: func(f *wire.Facts) { f.Programs[0].Instructions = 1101 }, want: "sl_a: 1101 instructions are verified, on 6.1.7-1 it were 1000 (100"},
		"less than that":   {is: func(f *wire.Facts) { f.Programs[0].Instructions = 899 }, want: "sl_a: 899"},
		"small, some more": {is: func(f *wire.Facts) { f.Programs[1].Instructions = 70 }},
		"small, far more":  {is: func(f *wire.Facts) { f.Programs[1].Instructions = 71 }, want: "sl_b: 71"},
		"another series":   {version: "6.12.7-1", is: func(f *wire.Facts) { f.Programs[0].Instructions = 1500 }},
		"more than series": {version: "6.12.7-1", is: func(f *wire.Facts) { f.Programs[0].Instructions = 1501 }, want: "sl_a: 1501"},
		"new": {
			is:   func(f *wire.Facts) { f.Programs = append(f.Programs, wire.Program{Name: "sl_c", Instructions: 7}) },
			want: "sl_c: no count of verified instructions is recorded, it has 7",
		},
		"refused": {
			is:   func(f *wire.Facts) { f.Programs[0] = wire.Program{Name: "sl_a", Refused: "no"} },
			want: "sl_a: 1000 instructions are recorded, but it was not loaded",
		},
		"gone": {is: func(f *wire.Facts) { f.Programs = f.Programs[:1] }, want: "sl_b: 20 instructions are recorded"},
	} {
		t.Run(name, func(t *testing.T) {
			f := whole()
			if tc.is != nil {
				tc.is(&f)
			}
			wantProblem(t, recorded.problems(cmp.Or(tc.version, "6.1.9-1"), f), tc.want)
		})
	}
}

func TestCountsAreReadAsWritten(t *testing.T) {
	refused := whole()
	refused.Programs[1] = wire.Program{Name: "sl_b", Refused: "no"}
	all := map[string]recorded{"5.10": count("5.10.1-1", refused), "newest": count("9.9~bpo1", whole())}
	var b bytes.Buffer
	if err := writeCounts(&b, []string{"5.10", "newest"}, all); err != nil {
		t.Fatal(err)
	}
	read, err := parseCounts(b.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	if diff := gocmp.Diff(all, read, gocmp.AllowUnexported(recorded{})); diff != "" {
		t.Errorf("written and read (-written +read):\n%s\n%s", diff, b.String())
	}
	for _, bad := range []string{"kernel a b\nversion 1\n", "kernel a\nsl_a 7\n", "kernel a\nversion 1\nsl_a seven\n"} {
		if _, err := parseCounts([]byte(bad)); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}

func TestParseSupportRefusesWhatItDoesNotKnow(t *testing.T) {
	if _, err := parseSupport([]byte("- kernel: x\n  bakend: ebpf\n")); err == nil || !strings.Contains(err.Error(), "bakend") {
		t.Errorf("got %v, want an error that names the field", err)
	}
}

func TestReadOutcome(t *testing.T) {
	got := readOutcome(`=== RUN   TestA
=== RUN   TestA/one_case/v4
--- FAIL: TestA (1.50s)
    --- PASS: TestA/one_case/v4 (0.50s)
    --- SKIP: TestA/other (0.00s)
        a_test.go:1: needs a thing
--- PASS: TestB (0.00s)
FAIL
`)
	want := outcome{passed: []string{"TestA/one_case/v4", "TestB"}, failed: []string{"TestA"}, skipped: []string{"TestA/other"}}
	if diff := gocmp.Diff(want, got, gocmp.AllowUnexported(outcome{})); diff != "" {
		t.Errorf("outcome (-want +got):\n%s", diff)
	}
}
