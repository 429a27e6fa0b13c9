package bpf

import (
	"errors"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/sluicemesh/sluice/tests/need"
)

// TestVerifyAll has this kernel verify every program, with and without what it
// may use of newer kernels. How many instructions that takes is compared by
// tests/kernels.
func TestVerifyAll(t *testing.T) {
	need.EBPF(t)
	settings := []uint8{0}
	if haveMPTCP() == nil {
		settings = append(settings, 1)
	}
	for _, mptcp := range settings {
		spec, err := prepare(0)
		if err != nil {
			t.Fatal(err)
		}
		if err := spec.Variables[redirectVarSlHaveMptcp].Set(mptcp); err != nil {
			t.Fatal(err)
		}
		all := verify(spec)
		if len(all) != len(spec.Programs) {
			t.Errorf("%d programs were verified, want %d", len(all), len(spec.Programs))
		}
		for _, v := range all {
			var verifier *ebpf.VerifierError
			switch {
			case errors.As(v.Err, &verifier):
				t.Errorf("%s (mptcp %d): %+v", v.Program, mptcp, verifier)
			case v.Err != nil:
				t.Errorf("%s (mptcp %d): %v", v.Program, mptcp, v.Err)
			case v.Instructions == 0:
				t.Errorf("%s (mptcp %d): no instruction was verified", v.Program, mptcp)
			}
			t.Logf("%-16s mptcp %d  %6d instructions verified", v.Program, mptcp, v.Instructions)
		}
	}
}

func TestProbe(t *testing.T) {
	need.EBPF(t)
	if err := Probe(); err != nil {
		t.Fatal(err)
	}
}
