package need

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// Root demands UID 0, which is what network namespaces, mounts and eBPF need
// in a test.
func Root(tb testing.TB) {
	tb.Helper()
	if os.Geteuid() != 0 {
		Missing(tb, "root: run the test as UID 0")
	}
}

// EBPF demands root and a cgroup v2 hierarchy, which the eBPF backend attaches to.
func EBPF(tb testing.TB) {
	tb.Helper()
	Root(tb)
	b, err := os.ReadFile("/proc/filesystems")
	if err != nil {
		tb.Fatalf("read filesystems of the kernel: %v", err)
	}
	for _, fs := range []string{"cgroup2", "bpf"} {
		if !slices.Contains(strings.Fields(string(b)), fs) {
			Missing(tb, "a kernel with the file system "+fs)
		}
	}
}

// Tool demands the named program and returns its path. Directories that only
// root has in PATH are searched too.
func Tool(tb testing.TB, name string) string {
	tb.Helper()
	if p, err := exec.LookPath(name); err == nil {
		return p
	}
	for _, dir := range []string{"/usr/local/sbin", "/usr/sbin", "/sbin"} {
		if p := filepath.Join(dir, name); executable(p) {
			return p
		}
	}
	Missing(tb, "the program "+name)
	return ""
}

// Envoy demands the real Envoy and returns its path: SLUICE_ENVOY if set, else
// what "make tools" fetched.
func Envoy(tb testing.TB) string {
	tb.Helper()
	p := os.Getenv("SLUICE_ENVOY")
	if p == "" {
		p = filepath.Join(Repo(tb), ".tools", "envoy", "envoy")
	}
	if !executable(p) {
		Missing(tb, "Envoy at "+p)
	}
	return p
}

// CNIPlugins demands the CNI reference plugins bridge, host-local and loopback
// and returns their directory.
func CNIPlugins(tb testing.TB) string {
	tb.Helper()
	dir := filepath.Join(Repo(tb), ".tools", "cni")
	for _, name := range []string{"bridge", "host-local", "loopback"} {
		if p := filepath.Join(dir, name); !executable(p) {
			Missing(tb, "the CNI plugin "+p)
		}
	}
	return dir
}

// Repo returns the root of the repository: the nearest directory with a go.mod,
// upwards from the working directory of the test.
func Repo(tb testing.TB) string {
	tb.Helper()
	dir, err := os.Getwd()
	if err != nil {
		tb.Fatalf("find working directory: %v", err)
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			tb.Fatal("find go.mod: there is none above the working directory")
		}
		dir = parent
	}
}

// Missing ends the test for want of something that it has looked for itself: it
// skips, or fails where nothing may be skipped. "go test" shows skips only with
// -v, so what was missing is also added as a line to the file that
// SLUICE_TEST_MISSING names, if it does.
func Missing(tb testing.TB, what string) {
	tb.Helper()
	if os.Getenv("CI") != "" {
		tb.Fatalf("needs %s (skipped where CI is not set)", what)
	}
	if path := os.Getenv("SLUICE_TEST_MISSING"); path != "" {
		if err := note(path, what); err != nil {
			tb.Errorf("note what is missing: %v", err)
		}
	}
	tb.Skipf("needs %s", what)
}

func note(path, what string) error {
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(strings.ReplaceAll(what, "\n", "; ") + "\n")
	return errors.Join(err, f.Close())
}

func executable(path string) bool {
	fi, err := os.Stat(path)
	return err == nil && fi.Mode().IsRegular() && fi.Mode()&0o111 != 0
}
