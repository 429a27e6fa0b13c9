package main

import (
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/sluicemesh/sluice/tests/need"
)

var renew = flag.Bool("update", false, "renew the tables in docs/kernels.md")

// TestDocument compares the tables of docs/kernels.md with the committed ones.
func TestDocument(t *testing.T) {
	repo := need.Repo(t)
	table, counted, err := readTable(repo)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(repo, "docs", "kernels.md")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	want := string(b)
	for name, content := range map[string]string{"support": renderSupport(table, counted), "instructions": renderCounts(table, counted)} {
		begin, end := "<!-- "+name+" -->\n", "<!-- end of "+name+" -->\n"
		before, rest, ok := strings.Cut(want, begin)
		_, after, ok2 := strings.Cut(rest, end)
		if !ok || !ok2 {
			t.Fatalf("%s has no %q with %q after it", path, begin, end)
		}
		want = before + begin + content + end + after
	}
	if *renew {
		if err := os.WriteFile(path, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if diff := cmp.Diff(want, string(b)); diff != "" {
		t.Errorf("docs/kernels.md is old, renew it: go test ./tests/kernels -update (-want +got):\n%s", diff)
	}
}

// TestTablesKnowTheSameKernels: a kernel without counts would not be compared.
func TestTablesKnowTheSameKernels(t *testing.T) {
	table, counted, err := readTable(need.Repo(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range table {
		if counted[s.Name].version == "" {
			t.Errorf("kernel %s has no counts", s.Name)
		}
	}
	if len(table) != len(counted) {
		t.Errorf("%d kernels in %s, %d in %s", len(table), supportFile, len(counted), countsFile)
	}
}
