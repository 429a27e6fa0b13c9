package need_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/sluicemesh/sluice/tests/need"
)

// recorder notes how a test would have ended instead of ending it.
type recorder struct {
	testing.TB
	ended string
}

func (r *recorder) Helper()               {}
func (r *recorder) Skipf(string, ...any)  { r.end("skip") }
func (r *recorder) Fatalf(string, ...any) { r.end("fatal") }

func (r *recorder) end(how string) {
	if r.ended == "" {
		r.ended = how
	}
}

func TestMissingToolSkipsOrFails(t *testing.T) {
	for _, tc := range []struct{ ci, want string }{{"", "skip"}, {"true", "fatal"}} {
		t.Setenv("CI", tc.ci)
		t.Setenv("SLUICE_TEST_MISSING", "")
		r := &recorder{TB: t}
		need.Tool(r, "no-such-program-of-sluice")
		if r.ended != tc.want {
			t.Errorf("CI=%q: ended with %q, want %q", tc.ci, r.ended, tc.want)
		}
	}
}

func TestMissingIsNoted(t *testing.T) {
	path := filepath.Join(t.TempDir(), "missing")
	if err := os.WriteFile(path, []byte("before\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("CI", "")
	t.Setenv("SLUICE_TEST_MISSING", path)
	need.Missing(&recorder{TB: t}, "one thing,\nand another")
	if b, err := os.ReadFile(path); err != nil || string(b) != "before\none thing,; and another\n" {
		t.Errorf("noted %q, %v", b, err)
	}
}

func TestEnvoyFromEnvironment(t *testing.T) {
	t.Setenv("CI", "")
	t.Setenv("SLUICE_TEST_MISSING", "")
	path := filepath.Join(t.TempDir(), "envoy")
	t.Setenv("SLUICE_ENVOY", path)
	r := &recorder{TB: t}
	need.Envoy(r)
	if r.ended != "skip" {
		t.Errorf("without the file: ended with %q, want skip", r.ended)
	}
	if err := os.WriteFile(path, nil, 0o755); err != nil {
		t.Fatal(err)
	}
	if got := need.Envoy(t); got != path {
		t.Errorf("Envoy() = %q, want %q", got, path)
	}
}

func TestRepo(t *testing.T) {
	if _, err := os.Stat(filepath.Join(need.Repo(t), "tests", "need", "need.go")); err != nil {
		t.Error(err)
	}
}
