package redirect

import "testing"

func TestAccelerationIn(t *testing.T) {
	right, faster := Acceleration{Right: true}, Acceleration{Right: true, Faster: true}
	for _, tc := range []struct {
		of        Acceleration
		node, pod Accelerate
		want      bool
	}{
		{faster, "", "", false},
		{faster, AccelerateOff, AccelerateOn, false},
		{faster, AccelerateOn, AccelerateOff, false},
		{faster, AccelerateAuto, AccelerateOff, false},
		{faster, AccelerateAuto, "", true},
		{right, AccelerateAuto, "", false},
		{right, AccelerateAuto, AccelerateAuto, false},
		{right, AccelerateAuto, AccelerateOn, true},
		{right, AccelerateOn, "", true},
		{right, AccelerateOn, AccelerateAuto, true},
		{Acceleration{Faster: true}, AccelerateOn, AccelerateOn, false},
		{Acceleration{}, AccelerateAuto, AccelerateOn, false},
	} {
		if got := tc.of.In(tc.node, tc.pod); got != tc.want {
			t.Errorf("%+v with node %q, pod %q: %v", tc.of, tc.node, tc.pod, got)
		}
	}
}
