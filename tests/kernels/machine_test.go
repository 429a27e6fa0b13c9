package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sluicemesh/sluice/tests/kernels/wire"
)

// TestMachine has scripts in place of qemu.
func TestMachine(t *testing.T) {
	const done = `echo '{"boot":{"release":"6.1"}}'; echo '{"done":true}'`
	tooLong := errors.New("too long")
	for name, tc := range map[string]struct {
		script, want string
	}{
		"does its job":       {script: done},
		"ends before":        {script: `echo '{"boot":{"release":"6.1"}}'`, want: "its console ends with:\nKernel panic"},
		"cannot do it":       {script: `echo '{"failed":"load module veth"}'; ` + done, want: "load module veth"},
		"qemu does not run":  {script: `echo "no such option" >&2; exit 1`, want: "exit status 1: no such option"},
		"writes nonsense":    {script: `echo 'Oops: 0000'; ` + done, want: `"Oops: 0000\n"`},
		"does not end":       {script: `echo '{"boot":{"release":"6.1"}}'; exec sleep 1000`, want: tooLong.Error()},
		"cuts off its words": {script: `printf '{"boot":'; exit 0`, want: "before its job was done"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			m := machine{qemu: filepath.Join(dir, "qemu"), console: filepath.Join(dir, "console.log"), cpus: 1}
			if err := errors.Join(
				os.WriteFile(m.qemu, []byte("#!/bin/sh\n"+tc.script+"\n"), 0o755),
				os.WriteFile(m.console, []byte("Kernel panic\n"), 0o644),
			); err != nil {
				t.Fatal(err)
			}
			limit := time.Minute
			if tc.want == tooLong.Error() {
				limit = 200 * time.Millisecond
			}
			ctx, cancel := context.WithTimeoutCause(t.Context(), limit, tooLong)
			defer cancel()
			var seen []wire.Event
			err := m.run(ctx, func(e wire.Event) { seen = append(seen, e) })
			switch {
			case tc.want == "" && err != nil:
				t.Errorf("got %v", err)
			case tc.want == "" && (len(seen) != 2 || seen[0].Boot.Release != "6.1"):
				t.Errorf("events %+v", seen)
			case tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)):
				t.Errorf("got %v, want an error with %q", err, tc.want)
			}
		})
	}
}
