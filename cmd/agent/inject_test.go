package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// runInjectOn runs `sluice-agent inject` with something on standard input.
func runInjectOn(t *testing.T, stdin string, variables map[string]string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errOut bytes.Buffer
	code = run(t.Context(), append([]string{"inject"}, args...), env{
		stdin: strings.NewReader(stdin), stdout: &out, stderr: &errOut,
		getenv:   func(name string) string { return variables[name] },
		hostname: func() (string, error) { return "", errors.New("no name") },
	})
	return code, out.String(), errOut.String()
}

func TestInject(t *testing.T) {
	const (
		pod       = "apiVersion: v1\nkind: Pod\nmetadata:\n  name: p\nspec:\n  containers:\n  - name: a\n    image: b\n"
		configMap = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: c}\n"
		host      = "apiVersion: v1\nkind: Pod\nmetadata: {name: h}\nspec: {hostNetwork: true}"
	)
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	podFile, otherFile, hostFile := file("pod.yaml", pod), file("other.yaml", configMap), file("host.yaml", host)
	values := file("values.yaml", "proxy: {logLevel: error, image: mine:1}\n")
	bad := file("bad.yaml", "apiVersion: v1\nkind: Pod\nmetadata: {name: p, annotations: {sluice.dev/proxy-cpu: x}}\nspec: {}\n")

	for name, test := range map[string]struct {
		stdin          string
		variables      map[string]string
		args           []string
		code           int
		stdout, stderr []string // must be contained
		exactly        string   // stdout, if not empty
	}{
		"standard input":         {stdin: pod, args: []string{"-f", "-"}, stdout: []string{"  - name: sluice-proxy\n", "pipe: {path: \"@sluice/xds\"}", "image: envoyproxy/envoy:v1.40.0\n"}},
		"other kinds":            {args: []string{"-f", otherFile}, exactly: configMap},
		"hostNetwork":            {args: []string{"-f", hostFile}, exactly: host, stderr: []string{"host.yaml, document 1, Pod h: not injected: it is in the host's network (hostNetwork: true)"}},
		"several":                {stdin: configMap, args: []string{"-f", hostFile, "-f", "-", "-f", podFile}, stdout: []string{"hostNetwork: true}\n---\n" + configMap + "---\n", "sluice-proxy"}},
		"flags win over values":  {args: []string{"-f", podFile, "--values", values, "--proxy-image", "other:2"}, stdout: []string{"image: other:2\n", "- error\n"}},
		"environment":            {args: []string{"-f", podFile}, variables: map[string]string{"SLUICE_PROXY_CPU": "7m"}, stdout: []string{"cpu: 7m\n"}},
		"no file":                {code: 2, stderr: []string{"-f is missing"}},
		"file is not there":      {args: []string{"-f", "/no/such"}, code: 1, stderr: []string{"/no/such"}},
		"values are not there":   {args: []string{"-f", podFile, "--values", "/no/such"}, code: 1, stderr: []string{"read values: open /no/such"}},
		"wrong flag":             {args: []string{"-f", podFile, "--proxy-log-level", "loud"}, code: 1, stderr: []string{`proxy-log-level: "loud": want trace`}},
		"nothing beside mistake": {args: []string{"-f", podFile, "-f", bad}, code: 1, stderr: []string{`bad.yaml, document 1, Pod p: metadata.annotations[sluice.dev/proxy-cpu]: "x": want a quantity`}, exactly: "-"},
	} {
		t.Run(name, func(t *testing.T) {
			code, stdout, stderr := runInjectOn(t, test.stdin, test.variables, test.args...)
			if code != test.code {
				t.Errorf("exit code %d, want %d", code, test.code)
			}
			for _, want := range test.stdout {
				if !strings.Contains(stdout, want) {
					t.Errorf("stdout does not contain %q:\n%s", want, stdout)
				}
			}
			for _, want := range test.stderr {
				if !strings.Contains(stderr, want) {
					t.Errorf("stderr does not contain %q:\n%s", want, stderr)
				}
			}
			switch {
			case test.exactly == "-" && stdout != "":
				t.Errorf("stdout, want nothing:\n%s", stdout)
			case test.exactly != "-" && test.exactly != "" && stdout != test.exactly:
				t.Errorf("stdout %q, want %q", stdout, test.exactly)
			}
		})
	}
}
