package bpf

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/pkg/redirect/bpf/paircheck"
	"github.com/sluicemesh/sluice/pkg/redirect/redirecttest"
	"github.com/sluicemesh/sluice/tests/need"
)

// TestMain is also the child that a trial of acceleration starts, and the one
// that TestKilledProxy kills.
func TestMain(m *testing.M) {
	var err error
	switch {
	case len(os.Args) > 1 && os.Args[1] == "paircheck":
		err = paircheck.Child(os.Stdin, os.Stdout)
	case len(os.Args) > 4 && os.Args[1] == holdArg:
		err = hold(os.Args[2], os.Args[3], os.Args[4])
	default:
		os.Exit(redirecttest.Main(m))
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", os.Args[1], err)
		os.Exit(1)
	}
}

// newOptions returns options with a bpffs of the test's own, and uninstalls
// when the test is over.
func newOptions(tb testing.TB) Options {
	tb.Helper()
	need.EBPF(tb)
	o := Options{PinDir: filepath.Join(tb.TempDir(), "bpf", "sluice")}
	dir := filepath.Dir(o.PinDir)
	if err := os.Mkdir(dir, 0o700); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := Uninstall(context.Background(), o); err != nil {
			tb.Errorf("uninstall: %v", err)
		}
		if ok, err := isBPFFS(dir); err != nil || ok {
			tb.Errorf("after uninstall: %s is a bpffs: %v, %v", dir, ok, err)
			_ = unix.Unmount(dir, unix.MNT_DETACH)
		}
	})
	return o
}

func open(tb testing.TB, o Options) *Redirector {
	tb.Helper()
	r, err := New(o)
	if err != nil {
		tb.Fatal(err)
	}
	return r
}

// TestConformance runs without acceleration, with SLUICE_TEST_ACCELERATE=on with
// it.
func TestConformance(t *testing.T) {
	if os.Getenv("SLUICE_TEST_ACCELERATE") != "on" {
		redirecttest.Run(t, redirect.BackendEBPF, opener(newOptions(t)))
		return
	}
	o := accelerated(t)
	redirecttest.Run(t, redirect.BackendEBPF, opener(o))
	r := open(t, o)
	defer func() { _ = r.Close() }()
	if events, err := r.AccelerationEvents(); err != nil || events["joined"] == 0 {
		t.Errorf("no pair was joined: %v, %v", events, err)
	}
}

// TestConformanceWithoutTC is TestConformance as on kernels that let no tc program
// register listeners.
func TestConformanceWithoutTC(t *testing.T) {
	o := newOptions(t)
	redirecttest.Run(t, redirect.BackendEBPF, func(tb testing.TB, hostNetns string) redirect.Redirector {
		o.HostNetns = hostNetns
		return openBuild(tb, o, withoutTC)
	})
}

// withoutTC makes a build one for kernels that let no tc program register
// listeners, which then runs on all.
func withoutTC(spec *ebpf.CollectionSpec) error {
	return spec.Variables[redirectVarSlTcMayRegister].Set(uint8(0))
}

// openBuild opens the build that change makes of this one.
func openBuild(tb testing.TB, o Options, change func(*ebpf.CollectionSpec) error) *Redirector {
	tb.Helper()
	r, err := newFrom(o, func() (*ebpf.CollectionSpec, error) {
		spec, err := loadForKernel()
		if err != nil {
			return nil, err
		}
		return spec, change(spec)
	})
	if err != nil {
		tb.Fatal(err)
	}
	return r
}

// opener opens the backend with options on a node.
func opener(o Options) redirecttest.Open {
	return func(tb testing.TB, hostNetns string) redirect.Redirector {
		o.HostNetns = hostNetns
		return open(tb, o)
	}
}
