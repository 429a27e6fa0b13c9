package chart

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/sluicemesh/sluice/tests/need"
)

var update = flag.Bool("update", false, "write deploy/manifests/sluice.yaml and the chart's README.md anew")

// namespace and release are those of the documents.
const (
	namespace = "sluice-system"
	release   = "sluice"
)

func chartDir(tb testing.TB) string {
	return filepath.Join(need.Repo(tb), "deploy", "helm", "sluice")
}

// helm demands Helm and returns its path: what "make manifest" built, else what
// is in PATH.
func helm(tb testing.TB) string {
	tb.Helper()
	p := filepath.Join(need.Repo(tb), ".tools", "bin", "helm")
	if st, err := os.Stat(p); err == nil && st.Mode().IsRegular() {
		return p
	}
	return need.Tool(tb, "helm")
}

// command runs a program and returns what it prints, and on failure stderr as
// the error's text.
func command(tb testing.TB, name string, args ...string) (string, error) {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), commandError{err, strings.TrimSpace(stderr.String())}
	}
	return stdout.String(), nil
}

type commandError struct {
	error
	stderr string
}

func (e commandError) Error() string { return e.error.Error() + ": " + e.stderr }

// render returns what the chart becomes with the values that args set.
func render(tb testing.TB, args ...string) (string, error) {
	tb.Helper()
	return command(tb, helm(tb), append([]string{"template", release, chartDir(tb), "--namespace", namespace}, args...)...)
}

func mustRender(tb testing.TB, args ...string) string {
	tb.Helper()
	out, err := render(tb, args...)
	if err != nil {
		tb.Fatal(err)
	}
	return out
}

// An object is one of Kubernetes, as YAML has it.
type object = map[string]any

func objects(tb testing.TB, text string) []object {
	tb.Helper()
	var all []object
	for d := yaml.NewDecoder(strings.NewReader(text)); ; {
		var o object
		err := d.Decode(&o)
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			tb.Fatalf("read rendered chart: %v", err)
		}
		if o != nil {
			all = append(all, o)
		}
	}
}

// at returns what is at a path of keys and list indexes, nil if there is nothing.
func at(v any, path ...any) any {
	for _, p := range path {
		switch p := p.(type) {
		case string:
			m, ok := v.(object)
			if !ok {
				return nil
			}
			v = m[p]
		case int:
			l, ok := v.([]any)
			if !ok || p >= len(l) {
				return nil
			}
			v = l[p]
		}
	}
	return v
}

func str(v any) string {
	s, _ := v.(string)
	return s
}

func find(tb testing.TB, all []object, kind string) object {
	tb.Helper()
	for _, o := range all {
		if o["kind"] == kind {
			return o
		}
	}
	tb.Fatalf("no %s in the rendered chart", kind)
	return nil
}
