package iptables

import (
	"errors"
	"os/exec"
	"strings"
	"testing"

	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/tests/need"
	"github.com/sluicemesh/sluice/tests/netnstest"
)

func TestNoPrograms(t *testing.T) {
	_, err := open(Options{StateDir: t.TempDir()}, func(string) (string, error) { return "", exec.ErrNotFound })
	if !errors.Is(err, redirect.ErrNotSupported) || !strings.Contains(err.Error(), "iptables-nft-restore") {
		t.Errorf("got %v, want ErrNotSupported that names a program", err)
	}
}

// TestNoProgramsForIPv6: that matters to pods with an IPv6 address alone.
func TestNoProgramsForIPv6(t *testing.T) {
	need.Root(t)
	need.Tool(t, "iptables-nft-restore")
	node := netnstest.NewNode(t)
	r, err := open(Options{StateDir: t.TempDir(), Variant: VariantNFT, HostNetns: node.Netns}, func(name string) (string, error) {
		if strings.HasPrefix(name, "ip6tables") {
			return "", exec.ErrNotFound
		}
		return lookPath(name)
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		opts netnstest.PodOptions
		want error
	}{
		{netnstest.PodOptions{NoIPv6: true}, nil},
		{netnstest.PodOptions{}, redirect.ErrNotSupported},
	} {
		pod := node.PodWith(t, "pod", tc.opts)
		w := goldenWorkload()
		w.ID.NetnsInode, w.Netns, w.Addrs = pod.Inode(t), pod.Netns, pod.Addrs()
		err := r.Add(t.Context(), w)
		if !errors.Is(err, tc.want) || err != nil && !strings.Contains(err.Error(), "ip6tables-nft-restore") {
			t.Errorf("add pod with %v: got %v, want %v", w.Addrs, err, tc.want)
		}
	}
}
