package docs

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/sluicemesh/sluice/tests/need"
)

// files returns the repository's files with that ending; what is built or
// fetched is left out.
func files(t *testing.T, ending string) []string {
	t.Helper()
	var found []string
	err := filepath.WalkDir(need.Repo(t), func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && slices.Contains([]string{".git", ".tools", "bin"}, d.Name()) {
			return fs.SkipDir
		}
		if !d.IsDir() && strings.HasSuffix(path, ending) {
			found = append(found, path)
		}
		return nil
	})
	if err != nil || len(found) == 0 {
		t.Fatalf("find *%s: %d found, %v", ending, len(found), err)
	}
	return found
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestNamedTestsExist: a document may not lean on a test that is not there, or not
// in the package that it names.
func TestNamedTestsExist(t *testing.T) {
	var code []byte
	of := map[string][]byte{} // by directory
	for _, path := range files(t, "_test.go") {
		text := read(t, path)
		code = append(code, text...)
		of[filepath.Dir(path)] = append(of[filepath.Dir(path)], text...)
	}
	inPackage := regexp.MustCompile(`\b((?:cmd|tests|podwatch|redirect|xds|deploy)(?:/\w+)*) ((?:Test|Fuzz)[A-Z]\w*)`)
	for _, path := range files(t, ".md") {
		for _, m := range inPackage.FindAllStringSubmatch(string(read(t, path)), -1) {
			found := false
			for dir, text := range of {
				found = found || strings.HasSuffix(dir, "/"+m[1]) && bytes.Contains(text, []byte("func "+m[2]+"("))
			}
			if !found {
				t.Errorf("%s names %s of %s, which is not there", filepath.Base(path), m[2], m[1])
			}
		}
	}
	name := regexp.MustCompile(`\b(?:Test|Fuzz|Benchmark)[A-Z]\w*`)
	checked := 0
	for _, path := range files(t, ".md") {
		for _, n := range name.FindAllString(string(read(t, path)), -1) {
			checked++
			if !bytes.Contains(code, []byte("func "+n+"(")) {
				t.Errorf("%s names %s, which is nowhere", filepath.Base(path), n)
			}
		}
	}
	if checked < 50 {
		t.Errorf("%d names of tests found in the documents: the failure table has more", checked)
	}
}

// TestEachFailureIsShown: each row of the failure table names what shows it, and the
// case of a test that it names is there.
func TestEachFailureIsShown(t *testing.T) {
	var code []byte
	for _, path := range files(t, ".go") {
		code = append(code, read(t, path)...)
	}
	_, section, found := strings.Cut(string(read(t, filepath.Join(need.Repo(t), "ARCHITECTURE.md"))), "\n## When things fail\n")
	if !found {
		t.Fatal("ARCHITECTURE.md has no section \"When things fail\"")
	}
	section, _, _ = strings.Cut(section, "\n## ")
	// TestX/case, as go test prints it, and `group/case` of redirecttest; a * at the end stands for several.
	ofTest, ofSuite := regexp.MustCompile(`\bTest\w+/([\w.]+)`), regexp.MustCompile("`([a-z ]+/[a-z ]*)\\*?`")
	rows := 0
	for line := range strings.Lines(section) {
		cells := strings.Split(line, "|")
		if len(cells) < 5 || strings.HasPrefix(cells[1], "---") || strings.TrimSpace(cells[1]) == "failure" {
			continue
		}
		rows++
		shown := cells[len(cells)-2]
		var cases []string
		for _, m := range ofTest.FindAllStringSubmatch(shown, -1) {
			cases = append(cases, `"`+strings.ReplaceAll(m[1], "_", " "))
		}
		for _, m := range ofSuite.FindAllStringSubmatch(shown, -1) {
			cases = append(cases, `"`+m[1])
		}
		for _, c := range cases {
			if !bytes.Contains(code, []byte(c)) {
				t.Errorf("no case is named %s: %s", c, line)
			}
		}
		if len(cases) == 0 && !strings.Contains(shown, "Test") && !strings.Contains(shown, "Fuzz") {
			t.Errorf("no test is named: %s", line)
		}
	}
	if rows < 100 {
		t.Errorf("%d rows found in the failure table", rows)
	}
}

// TestLinksLeadSomewhere follows the relative links of all documents.
func TestLinksLeadSomewhere(t *testing.T) {
	link := regexp.MustCompile(`\]\(([^)\s]+)\)`)
	checked := 0
	for _, path := range files(t, ".md") {
		for _, m := range link.FindAllStringSubmatch(string(read(t, path)), -1) {
			target, _, _ := strings.Cut(m[1], "#")
			if target == "" || strings.Contains(target, "://") {
				continue
			}
			checked++
			if _, err := os.Stat(filepath.Join(filepath.Dir(path), target)); err != nil {
				t.Errorf("%s links to %s: %v", filepath.Base(path), m[1], err)
			}
		}
	}
	if checked < 5 {
		t.Errorf("%d links found in the documents: README alone has more", checked)
	}
}
