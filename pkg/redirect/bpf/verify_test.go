package bpf

import (
	"errors"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/sluicemesh/sluice/tests/need"
)

// TestVerifyAll has this kernel verify every program.
func TestVerifyAll(t *testing.T) {
	need.EBPF(t)
	for _, mptcp := range []uint8{0, 1} {
		spec, err := prepare(0)
		if err != nil {
			t.Fatal(err)
		}
		if err := spec.Variables[redirectVarSlHaveMptcp].Set(mptcp); err != nil {
			t.Fatal(err)
		}
		for name := range spec.Programs {
			one := spec.Copy()
			for other := range one.Programs {
				if other != name {
					delete(one.Programs, other)
				}
			}
			c, err := ebpf.NewCollection(one)
			var verifier *ebpf.VerifierError
			if errors.As(err, &verifier) {
				t.Errorf("%s (mptcp %d): %+v", name, mptcp, verifier)
				continue
			}
			if err != nil {
				t.Errorf("%s (mptcp %d): %v", name, mptcp, err)
				continue
			}
			c.Close()
		}
	}
}

func TestProbe(t *testing.T) {
	need.EBPF(t)
	if err := Probe(); err != nil {
		t.Fatal(err)
	}
}
