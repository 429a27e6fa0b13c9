package faultpoint_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/sluicemesh/sluice/tests/faultpoint"
	"github.com/sluicemesh/sluice/tests/need"
	"github.com/sluicemesh/sluice/tests/netnstest"
)

const dirEnv = "SLUICE_TEST_FAULTPOINT"

func TestMain(m *testing.M) {
	if dir, ok := os.LookupEnv(dirEnv); ok {
		if err := work(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(netnstest.VerifyNoLeaks(m))
}

// work does what is to be seen: four changes, one of them by a program, and
// things that change nothing.
func work(dir string) error {
	if err := faultpoint.Arm(); err != nil {
		return err
	}
	if _, err := netlink.LinkList(); err != nil {
		return err
	}
	if err := os.Mkdir(filepath.Join(dir, "one"), 0o700); err != nil {
		return err
	}
	if _, err := os.ReadFile("/proc/self/status"); err != nil {
		return err
	}
	if err := os.Rename(filepath.Join(dir, "one"), filepath.Join(dir, "two")); err != nil {
		return err
	}
	if err := exec.Command("touch", filepath.Join(dir, "three")).Run(); err != nil {
		return err
	}
	return os.Remove(filepath.Join(dir, "two"))
}

func TestWatch(t *testing.T) {
	need.Root(t)
	need.Tool(t, "touch")
	names := []string{"mkdir", "rename", "create", "unlink", "unlink"} // Go asks for a file first
	left := [][]string{{}, {"one"}, {"two"}, {"three", "two"}, {"three", "two"}, {"three"}}
	for _, kill := range []faultpoint.Action{faultpoint.Kill, faultpoint.KillAll} {
		for end := range len(names) + 1 {
			dir := t.TempDir()
			cmd := exec.Command("/proc/self/exe")
			cmd.Env = append(os.Environ(), dirEnv+"="+dir)
			cmd.Stderr = os.Stderr
			calls := faultpoint.Watch(t, cmd, func(c faultpoint.Call) faultpoint.Action {
				if c.Helper != (c.Name == "create") {
					t.Errorf("%+v: made by a program that was started: %v", c, c.Helper)
				}
				if c.Index == end {
					return kill
				}
				return faultpoint.Go
			})
			var got []string
			for _, c := range calls {
				got = append(got, c.Name)
			}
			if want := names[:min(end+1, len(names))]; !slices.Equal(got, want) {
				t.Errorf("killed before call %d: calls %q, want %q", end, got, want)
			}
			entries, err := os.ReadDir(dir)
			if err != nil {
				t.Fatal(err)
			}
			have := []string{}
			for _, e := range entries {
				have = append(have, e.Name())
			}
			want := left[end]
			if end == 2 && kill == faultpoint.Kill {
				want = []string{"three", "two"} // touch lives on
			}
			if !slices.Equal(have, want) {
				t.Errorf("killed before call %d: %q is there, want %q", end, have, want)
			}
			if cmd.ProcessState.Success() != (end == len(names)) {
				t.Errorf("killed before call %d: it ended with %v", end, cmd.ProcessState)
			}
		}
	}
}
