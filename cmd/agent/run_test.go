package main

import (
	"log/slog"
	"testing"
)

// TestContainerIsNotTheNode: an agent that is told where the node's procfs is
// must keep nothing in a mount of its own, nor take its cgroups for the node's.
func TestContainerIsNotTheNode(t *testing.T) {
	var k kernelConfig
	log := slog.New(slog.DiscardHandler)
	for proc, want := range map[string]struct {
		noMount  bool
		cgroupNS string
	}{
		"/proc":      {},
		"/proc/":     {},
		"/host/proc": {true, "/host/proc/1/ns/cgroup"},
	} {
		if got := k.ebpf(proc, log).NoMount; got != want.noMount {
			t.Errorf("--proc %s: NoMount is %v, want %v", proc, got, want.noMount)
		}
		if got := k.iptables(proc, log).HostCgroupNS; got != want.cgroupNS {
			t.Errorf("--proc %s: HostCgroupNS is %q, want %q", proc, got, want.cgroupNS)
		}
	}
}
