package iptables

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
)

func TestHostGolden(t *testing.T) {
	pods := []netip.Addr{
		netip.MustParseAddr("10.0.0.7"), netip.MustParseAddr("10.0.0.9"), netip.MustParseAddr("fd00::7"),
	}
	for name, cgroups := range map[string][]string{
		"host":         {"kubepods"},
		"host_systemd": {"kubepods.slice", "docker/1/kubelet.slice/kubelet-kubepods.slice"},
	} {
		for _, addr := range goldenWorkload().Addrs {
			file := name + "_v6"
			if addr.Is4() {
				file = name + "_v4"
			}
			t.Run(file, func(t *testing.T) {
				got := installText(hostTables(source(addr), cgroups, pods), nil)
				file := filepath.Join("testdata", file+".rules")
				if *update {
					if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
						t.Fatal(err)
					}
				}
				want, err := os.ReadFile(file)
				if err != nil {
					t.Fatal(err)
				}
				if diff := gocmp.Diff(string(want), got); diff != "" {
					t.Errorf("differs from %s (-want +got); -update writes it anew:\n%s", file, diff)
				}
			})
		}
	}
}

// TestHostProblem: what others may do to the node's rules is seen, and mended.
func TestHostProblem(t *testing.T) {
	want := hostTables(netip.MustParseAddr(DefaultProbeSource4), []string{"kubepods.slice"}, goldenWorkload().Addrs)
	const whole = `*raw
:PREROUTING ACCEPT [0:0]
:SLUICE_FORGED - [0:0]
[0:0] -A PREROUTING -s 169.254.81.206/32 -j SLUICE_FORGED
[0:0] -A SLUICE_FORGED -j DROP
COMMIT
*nat
:POSTROUTING ACCEPT [0:0]
:SLUICE_NODE - [0:0]
:SLUICE_EXEMPT - [0:0]
[0:0] -A POSTROUTING -j KUBE-POSTROUTING
[0:0] -A POSTROUTING -p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -j SLUICE_NODE
[0:0] -A POSTROUTING -s 10.0.0.0/8 -d 10.0.0.0/8 -j RETURN
[0:0] -A SLUICE_NODE -d 10.0.0.7/32 -g SLUICE_EXEMPT
[0:0] -A SLUICE_EXEMPT -p tcp -m cgroup ! --path "kubepods.slice" -m conntrack ! --ctstate DNAT -j SNAT --to-source 169.254.81.206
COMMIT
`
	const jump = "[0:0] -A POSTROUTING -p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -j SLUICE_NODE\n"
	for _, tc := range []struct {
		name     string
		old, new string
		problem  string
		mend     string
	}{
		{"whole", "", "", "", ""},
		{"jump is gone", jump, "", "there are 0", "-I POSTROUTING 1 -p tcp"},
		{"jump is there twice", jump, jump + jump, "there are 2", "-D POSTROUTING -p tcp"},
		{
			"jump stands behind what decides", "[0:0] -A POSTROUTING -j KUBE-POSTROUTING\n",
			"[0:0] -A POSTROUTING -s 10.0.0.0/8 -d 10.0.0.0/8 -j RETURN\n", "stands behind others", "-I POSTROUTING 1 -p tcp",
		},
		{"forged packets pass", "[0:0] -A SLUICE_FORGED -j DROP\n", "", "chain SLUICE_FORGED", "-A SLUICE_FORGED -j DROP"},
		{"no cgroup is looked at", ` -m cgroup ! --path "kubepods.slice"`, "", "chain SLUICE_EXEMPT", "-m cgroup ! --path"},
		{"a pod is missing", "[0:0] -A SLUICE_NODE -d 10.0.0.7/32 -g SLUICE_EXEMPT\n", "", "chain SLUICE_NODE", "-A SLUICE_NODE -d 10.0.0.7/32"},
		{"a chain too much", ":SLUICE_NODE - [0:0]\n", ":SLUICE_NODE - [0:0]\n:SLUICE_OLD - [0:0]\n", "chain SLUICE_OLD", "-X SLUICE_OLD"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if !strings.Contains(whole, tc.old) {
				t.Fatalf("%q is not in the rules", tc.old)
			}
			have, _, err := parseSaved(strings.Replace(whole, tc.old, tc.new, 1))
			if err != nil {
				t.Fatal(err)
			}
			switch err := hostProblem(want, have); {
			case tc.problem == "" && err != nil:
				t.Error(err)
			case tc.problem != "" && (err == nil || !strings.Contains(err.Error(), tc.problem)):
				t.Errorf("got %v, want %q", err, tc.problem)
			}
			if text := installText(want, have); !strings.Contains(text, tc.mend) {
				t.Errorf("it is not mended by:\n%s", text)
			}
		})
	}
}

func TestQuote(t *testing.T) {
	for path, want := range map[string]string{
		"kubepods":       "kubepods",
		"kubepods.slice": `"kubepods.slice"`,
		"a b/kubepods":   `"a b/kubepods"`,
		`a"b\kubepods`:   `"a\"b\\kubepods"`,
	} {
		if got := quote(path); got != want {
			t.Errorf("quote(%s) = %s, want %s", path, got, want)
		}
	}
}
