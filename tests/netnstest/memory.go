package netnstest

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/sluicemesh/sluice/pkg/redirect/cgroup"
	"github.com/sluicemesh/sluice/tests/need"
)

// memoryV1 is where the memory controller is on machines whose cgroups are
// version 1 as far as resources go.
const memoryV1 = "/sys/fs/cgroup/memory"

// A MemoryCgroup is the directory of a cgroup, of either version, that counts and
// bounds the memory of the processes in it: what they use and what the kernel
// keeps for them, eBPF maps too.
type MemoryCgroup string

// NewMemoryCgroup makes one without a bound; see NewCgroup.
func NewMemoryCgroup(tb testing.TB) MemoryCgroup {
	tb.Helper()
	root, err := cgroup.Root()
	if err != nil {
		tb.Fatal(err)
	}
	has := func(file string) bool {
		b, _ := os.ReadFile(filepath.Join(root, file))
		return slices.Contains(strings.Fields(string(b)), "memory")
	}
	const control = "cgroup.subtree_control"
	switch {
	case has(control):
	case has("cgroup.controllers"):
		set := func(to string) {
			if err := os.WriteFile(filepath.Join(root, control), []byte(to), 0); err != nil {
				tb.Errorf("%s the memory controller: %v", to, err)
			}
		}
		set("+memory")
		tb.Cleanup(func() { set("-memory") })
	default:
		root = memoryV1
	}
	dir, err := os.MkdirTemp(root, prefix(os.Getpid())+"*")
	if err != nil {
		need.Missing(tb, "memory controller of cgroups: "+err.Error())
	}
	tb.Cleanup(func() {
		if err := removeCgroup(dir); err != nil {
			tb.Error(err)
		}
	})
	return MemoryCgroup(dir)
}

// Enter moves the calling process there.
func (c MemoryCgroup) Enter(tb testing.TB) {
	tb.Helper()
	if err := os.WriteFile(filepath.Join(string(c), "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0); err != nil {
		tb.Fatalf("enter cgroup: %v", err)
	}
}

// Leave bounds the memory to what is used and so many bytes more.
func (c MemoryCgroup) Leave(tb testing.TB, room int) {
	tb.Helper()
	used, limit := "memory.current", "memory.max"
	if strings.HasPrefix(string(c), memoryV1) {
		used, limit = "memory.usage_in_bytes", "memory.limit_in_bytes"
	}
	b, err := os.ReadFile(filepath.Join(string(c), used))
	var n int
	if err == nil {
		n, err = strconv.Atoi(strings.TrimSpace(string(b)))
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(string(c), limit), fmt.Append(nil, n+room), 0)
	}
	if err != nil {
		tb.Fatalf("bound the memory of a cgroup: %v", err)
	}
}
