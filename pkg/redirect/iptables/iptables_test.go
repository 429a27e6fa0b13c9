package iptables_test

import (
	"errors"
	"fmt"
	"os"
	"testing"

	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/pkg/redirect/iptables"
	"github.com/sluicemesh/sluice/pkg/redirect/redirecttest"
	"github.com/sluicemesh/sluice/tests/need"
)

func TestMain(m *testing.M) { os.Exit(redirecttest.Main(m)) }

func TestConformance(t *testing.T) {
	for _, variant := range []string{iptables.VariantNFT, iptables.VariantLegacy} {
		t.Run(variant, func(t *testing.T) {
			need.Root(t)
			need.Tool(t, "iptables-"+variant+"-restore")
			need.Tool(t, "ip6tables-"+variant+"-restore")
			if variant == iptables.VariantLegacy {
				needLegacy(t)
			}
			dir := t.TempDir()
			redirecttest.Run(t, redirect.BackendIPTables, func(tb testing.TB, hostNetns string) redirect.Redirector {
				r, err := iptables.New(iptables.Options{StateDir: dir, Variant: variant, HostNetns: hostNetns})
				if err != nil {
					tb.Fatal(err)
				}
				return r
			})
		})
	}
}

// needLegacy demands a kernel that is built with legacy iptables.
func needLegacy(t *testing.T) {
	t.Helper()
	err := iptables.Probe(iptables.Options{Variant: iptables.VariantLegacy})
	if errors.Is(err, redirect.ErrNotSupported) {
		need.Missing(t, fmt.Sprintf("a kernel with legacy iptables: %v", err))
	}
	if err != nil {
		t.Fatal(err)
	}
}
