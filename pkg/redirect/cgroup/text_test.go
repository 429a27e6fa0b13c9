package cgroup

import "testing"

func TestInText(t *testing.T) {
	const path = "/kubepods/burstable/pod1/abc"
	for content, want := range map[string]bool{
		"0::/kubepods/burstable/pod1/abc\n":                     true,
		"12:memory:/x\n0::/kubepods/burstable/pod1/abc/child\n": true,
		"0::/kubepods/burstable/pod1/abcd\n":                    false,
		"0::/kubepods/burstable/pod1/def\n":                     false,
		"0::/kubepods/burstable/pod1/def/abc\n":                 false,
		"0::/kubepods/burstable/pod1\n":                         false,
		"0::/\n":                                                false,
		"1:name=systemd:/kubepods/burstable/pod1/abc\n":         false,
		"":                                  false,
		"0::/../../../burstable/pod1/abc\n": true, // seen from another class
		"0::/../../pod1/abc/child\n":        true, // from the same
		"0::/../../../../kubepods/burstable/pod1/abc\n":    true, // from outside of kubepods
		"0::/../../pod2/abc\n":                             false,
		"0::/../../pod1/def\n":                             false,
		"0::/../../pod1/def/kubepods/burstable/pod1/abc\n": false,
		"0::/def/kubepods/burstable/pod1/abc\n":            false, // the reader's own subtree
	} {
		if got := inText(content, path); got != want {
			t.Errorf("inText(%q) = %v, want %v", content, got, want)
		}
	}
}
