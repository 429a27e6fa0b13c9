package bpf

import (
	"errors"
	"fmt"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/sluicemesh/sluice/tests/need"
)

// TestVerifyAll has this kernel verify every program, with and without what it
// may use of newer kernels. How many instructions that takes is compared by
// tests/kernels.
func TestVerifyAll(t *testing.T) {
	need.EBPF(t)
	check := func(spec *ebpf.CollectionSpec, with string) {
		t.Helper()
		all := verify(spec)
		if len(all) != len(spec.Programs) {
			t.Errorf("%d programs were verified, want %d", len(all), len(spec.Programs))
		}
		for _, v := range all {
			var verifier *ebpf.VerifierError
			switch {
			case errors.As(v.Err, &verifier):
				t.Errorf("%s (%s): %+v", v.Program, with, verifier)
			case v.Err != nil:
				t.Errorf("%s (%s): %v", v.Program, with, v.Err)
			case v.Instructions == 0:
				t.Errorf("%s (%s): no instruction was verified", v.Program, with)
			}
			t.Logf("%-16s %-20s %6d instructions verified", v.Program, with, v.Instructions)
		}
	}
	has := func(missing error) []uint8 {
		if missing == nil {
			return []uint8{0, 1}
		}
		return []uint8{0}
	}
	for _, mptcp := range has(haveMPTCP()) {
		for _, tc := range has(haveTCRegister()) {
			spec, err := prepare(0)
			if err != nil {
				t.Fatal(err)
			}
			err = errors.Join(spec.Variables[redirectVarSlHaveMptcp].Set(mptcp), spec.Variables[redirectVarSlTcMayRegister].Set(tc))
			if err != nil {
				t.Fatal(err)
			}
			check(spec, fmt.Sprintf("mptcp %d, tc %d", mptcp, tc))
		}
	}
	listening, err := loadListening()
	if err != nil {
		t.Fatal(err)
	}
	check(listening, "iterator")

	accel, err := loadAccel()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := verifyOne(accel.Copy(), accelProgSlSent); errors.Is(err, ebpf.ErrNotSupported) {
		t.Logf("no acceleration on this kernel: %v", err)
		return
	}
	check(accel, "acceleration")
	spec, err := prepare(0)
	if err != nil {
		t.Fatal(err)
	}
	if err := spec.Variables[redirectVarSlAccelerate].Set(uint8(1)); err != nil {
		t.Fatal(err)
	}
	check(spec, "with acceleration")
}

func TestProbe(t *testing.T) {
	need.EBPF(t)
	if err := Probe(); err != nil {
		t.Fatal(err)
	}
}
