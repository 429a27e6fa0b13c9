package main

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// runMain runs the program with args and variables ("A=b") and returns what it
// printed.
func runMain(t *testing.T, variables []string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errOut bytes.Buffer
	code = run(t.Context(), args, env{
		stdout: &out, stderr: &errOut,
		getenv: func(name string) string {
			for _, v := range variables {
				if value, ok := strings.CutPrefix(v, name+"="); ok {
					return value
				}
			}
			return ""
		},
		hostname: func() (string, error) { return "", errors.New("no name") },
	})
	return code, out.String(), errOut.String()
}

func TestCommandLine(t *testing.T) {
	for name, test := range map[string]struct {
		args, variables []string
		code            int
		stdout, stderr  string // must be contained
	}{
		"help":            {args: []string{"help"}, stdout: "Usage: sluice-agent COMMAND"},
		"nothing":         {code: 2, stderr: "Usage: sluice-agent COMMAND"},
		"unknown command": {args: []string{"rum"}, code: 2, stderr: `unknown command "rum"`},
		"version":         {args: []string{"version"}, stdout: "dev\n"},
		"bootstrap":       {args: []string{"bootstrap"}, stdout: "@sluice/xds"},
		"help of run":     {args: []string{"run", "--help"}, stderr: "-exclude-namespaces"},
		"unknown flag":    {args: []string{"run", "--sauce", "x"}, code: 2, stderr: "-sauce"},
		"stray argument":  {args: []string{"version", "now"}, code: 2, stderr: `unexpected argument "now"`},
		"bad variable": {
			args: []string{"run"}, variables: []string{"SLUICE_SOURCE=http://x", "SLUICE_NODE=n"},
			code: 2, stderr: `--source "http://x": must be kubernetes or files:DIRECTORY`,
		},
		"source that is not there": {
			args: []string{"run", "--source", "files:/no/such/dir", "--node", "n"},
			code: 1, stderr: "/no/such/dir",
		},
	} {
		t.Run(name, func(t *testing.T) {
			code, stdout, stderr := runMain(t, test.variables, test.args...)
			if code != test.code || !strings.Contains(stdout, test.stdout) || !strings.Contains(stderr, test.stderr) {
				t.Errorf("exit code %d, want %d\nstdout, must contain %q:\n%s\nstderr, must contain %q:\n%s",
					code, test.code, test.stdout, stdout, test.stderr, stderr)
			}
		})
	}
}

// TestWrongValuesAreNamedTogether: one start tells everything that is wrong.
func TestWrongValuesAreNamedTogether(t *testing.T) {
	code, _, stderr := runMain(t, nil, "run", "--source", "/etc", "--backend", "nft",
		"--outbound-policy", "deny", "--log-level", "loud", "--log-format", "xml",
		"--daemonset", "agent", "--cni-bin-dir", "/opt/cni/bin")
	want := `--source "/etc": must be kubernetes or files:DIRECTORY
--daemonset "agent": must be NAMESPACE/NAME
--cni-conf-dir and --cni-bin-dir: give both or none
--backend "nft": must be auto, ebpf or iptables
--outbound-policy "deny": must be passthrough or block
--log-level "loud": must be debug, info, warn or error
--log-format "xml": must be text or json
find the node's name, or give it as --node: no name
`
	if diff := cmp.Diff(want, stderr); code != 2 || diff != "" {
		t.Errorf("exit code %d, want 2; stderr -want +got:\n%s", code, diff)
	}
}
