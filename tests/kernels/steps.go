package main

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/sluicemesh/sluice/tests/kernels/wire"
)

// testDir holds the test programs in the machine, sourceDir the tests' data in
// the places where the repository has them.
const (
	testDir   = "/tests"
	sourceDir = "/src"
)

// A suite is a package's tests on a kernel.
type suite struct {
	// pkg is the package's directory in the repository.
	pkg string
	// run is what go test knows as -run; "": all tests.
	run string
	// must are tests that have to be among those that pass: a pattern does not
	// notice that a test has another name now.
	must    []string
	timeout time.Duration
}

// testPackages are the packages of the root tier that need no Envoy and no
// container runtime.
func testPackages() []string {
	return []string{
		"pkg/redirect/bpf", "pkg/redirect/iptables", "pkg/redirect/redirecttest",
		"pkg/redirect/netns", "pkg/redirect/cgroup", "tests/netnstest",
	}
}

// allSuites is the whole root tier for a kernel with that backend. Tests of eBPF
// need a kernel that can have it.
func allSuites(backend string) []suite {
	var all []suite
	for _, pkg := range testPackages() {
		if backend != "ebpf" && (pkg == "pkg/redirect/bpf" || pkg == "pkg/redirect/redirecttest") {
			continue
		}
		all = append(all, suite{pkg: pkg, timeout: 40 * time.Minute})
	}
	return all
}

// shortSuites is what can be run at every change: emulated machines are slow. With
// eBPF it ends with a new agent that takes over from an older one, mends what is
// broken and removes all.
func shortSuites(backend string) []suite {
	if backend != "ebpf" {
		return []suite{conformance("pkg/redirect/iptables", "TestConformance/nft", basicCases())}
	}
	life := []string{"TestListeners", "TestTakeOverOtherPrograms", "TestMend", "TestUninstall"}
	return []suite{
		conformance("pkg/redirect/bpf", "TestConformance", append(basicCases(), hookCases()...)),
		{pkg: "pkg/redirect/bpf", run: "^(" + strings.Join(life, "|") + ")$", must: life, timeout: shortTimeout},
	}
}

// shortTimeout is far more than a short suite takes, which is a minute.
const shortTimeout = 5 * time.Minute

// basicCases of the conformance suite are what redirection is. Every call of
// iptables takes an emulated machine a second, so that is all that kernels without
// eBPF are asked for.
func basicCases() []string {
	return []string{
		"outbound/captured", "inbound/same_node", "inbound/own_service", "no_proxy/outbound", "no_proxy/inbound",
	}
}

// hookCases are those in which kernels may differ: what sockets there are, the
// hooks that the basic ones do not meet, a new agent.
func hookCases() []string {
	return []string{
		"outbound/end_to_end", "outbound/v4-mapped", "outbound/MPTCP_socket", "outbound/fast_open",
		"inbound/MPTCP_socket", "probe/node", "lifecycle/restart",
	}
}

// conformance is cases of the conformance suite, IPv4 alone, in the package's
// test with that name.
func conformance(pkg, test string, cases []string) suite {
	s := suite{pkg: pkg, timeout: shortTimeout}
	// A pattern has a part for each level of names: it may match some cases more.
	var levels [2][]string
	for _, c := range cases {
		for i, name := range strings.Split(c, "/") {
			if !slices.Contains(levels[i], name) {
				levels[i] = append(levels[i], name)
			}
		}
		s.must = append(s.must, test+"/"+c+"/v4")
	}
	for _, name := range strings.Split(test, "/") {
		s.run += "^" + name + "$/"
	}
	for _, names := range levels {
		s.run += "^(" + strings.Join(names, "|") + ")$/"
	}
	s.run += "^v4$"
	return s
}

// steps returns what a machine runs for the suites, in their order.
func steps(suites []suite) []wire.Step {
	var all []wire.Step
	for i, s := range suites {
		args := []string{testProgram(s.pkg), "-test.v", "-test.count=1", "-test.timeout=" + s.timeout.String()}
		if s.run != "" {
			args = append(args, "-test.run="+s.run)
		}
		all = append(all, wire.Step{
			Name: stepName(i, s), Args: args, Dir: sourceDir + "/" + s.pkg,
			// What is missing there is a failure, not skipped.
			Env: []string{"CI=true"}, Timeout: s.timeout + time.Minute,
		})
	}
	return all
}

// stepName is what the i-th suite is called.
func stepName(i int, s suite) string { return fmt.Sprintf("%d %s", i+1, s.pkg) }

func testProgram(pkg string) string { return testDir + "/" + strings.ReplaceAll(pkg, "/", "_") }
