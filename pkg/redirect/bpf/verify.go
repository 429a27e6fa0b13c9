package bpf

import (
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/rlimit"
)

// A Feature is something of the kernel that New uses where it is there and
// does without elsewhere.
type Feature struct {
	Name string
	// Err is nil if the kernel has it, else says what is missing.
	Err error
}

// FeatureMPTCP is redirection of MPTCP sockets that shows nothing of it to the
// application (Linux 5.19).
const FeatureMPTCP = "mptcp"

// FeatureTCRegister is that the filter of a pod's interface registers a proxy
// that listened before the pod was redirected (until Linux 7.2). Elsewhere Add
// and List do.
const FeatureTCRegister = "tc registers listeners"

// Features returns which of them this kernel has.
func Features() []Feature {
	return []Feature{{FeatureMPTCP, haveMPTCP()}, {FeatureTCRegister, haveTCRegister()}}
}

func haveMPTCP() error {
	return features.HaveProgramHelper(ebpf.CGroupSockAddr, asm.FnSkcToMptcpSock)
}

// A Verified is what this kernel says of one program.
type Verified struct {
	Program string
	// Instructions is how many the kernel has looked at before it took the
	// program, an instruction counting once for each way that leads to it. The
	// kernel's limit is a million. 0 if it was refused.
	Instructions int
	// Err is nil, or why the kernel refused the program.
	Err error
}

// Verify has this kernel verify every program by itself, as New would load it,
// and returns what it says of each, in the order of their names. It attaches and
// keeps nothing. Unlike Probe it goes on after a program that is refused. Before
// Linux 5.11 it lifts the process's limit of locked memory.
func Verify() ([]Verified, error) {
	if err := rlimit.RemoveMemlock(); err != nil {
		return nil, fmt.Errorf("lift limit of locked memory: %w", err)
	}
	spec, err := prepare(0)
	if err != nil {
		return nil, err
	}
	all := verify(spec)
	for _, load := range []func() (*ebpf.CollectionSpec, error){loadListening, loadAccel} {
		if spec, err = load(); err != nil {
			return nil, fmt.Errorf("read eBPF object: %w", err)
		}
		all = append(all, verify(spec)...)
	}
	slices.SortFunc(all, func(a, b Verified) int { return strings.Compare(a.Program, b.Program) })
	return all, nil
}

// processed is how the verifier ends its statistics.
var processed = regexp.MustCompile(`(?m)^processed (\d+) insns`)

// verify has the kernel verify each program of spec, with maps as small as can be.
func verify(spec *ebpf.CollectionSpec) []Verified {
	var all []Verified
	for _, name := range slices.Sorted(maps.Keys(spec.Programs)) {
		one := spec.Copy()
		maps.DeleteFunc(one.Programs, func(other string, _ *ebpf.ProgramSpec) bool { return other != name })
		for _, m := range one.Maps {
			m.MaxEntries = min(m.MaxEntries, 1)
		}
		v := Verified{Program: name}
		v.Instructions, v.Err = verifyOne(one, name)
		all = append(all, v)
	}
	return all
}

func verifyOne(spec *ebpf.CollectionSpec, name string) (int, error) {
	c, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{
		Programs: ebpf.ProgramOptions{LogLevel: ebpf.LogLevelStats},
	})
	if err != nil {
		// Without statistics the log ends with what the verifier objects to.
		if c, err = ebpf.NewCollection(spec); err == nil {
			c.Close()
			err = errors.New("the program is refused with statistics and taken without")
		}
		return 0, err
	}
	defer c.Close()
	log := c.Programs[name].VerifierLog
	found := processed.FindStringSubmatch(log)
	if found == nil {
		return 0, errors.New("the verifier's log has no statistics")
	}
	return strconv.Atoi(found[1])
}
