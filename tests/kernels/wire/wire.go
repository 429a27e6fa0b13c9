package wire

import "time"

// Where things are in the machine's file system.
const (
	// JobPath is the Job, JSON.
	JobPath = "/job.json"
	// ModuleDir holds the modules that the Job names.
	ModuleDir = "/modules"
	// ResultDevice is the serial port that Events are written to, one JSON
	// object a line. The first one is the kernel's console.
	ResultDevice = "/dev/ttyS1"
)

// A Job is what a machine does from its start to its end.
type Job struct {
	// Modules are file names in ModuleDir, each after those it depends on.
	Modules []string `json:"modules"`
	// Steps are run one after the other, whether or not an earlier one failed.
	Steps []Step `json:"steps"`
}

// A Step is a program.
type Step struct {
	Name string   `json:"name"`
	Args []string `json:"args"`
	// Dir is where it runs, Env what it finds beside PATH.
	Dir string   `json:"dir"`
	Env []string `json:"env,omitempty"`
	// Timeout ends it and all that it has started.
	Timeout time.Duration `json:"timeout"`
}

// An Event is something that has happened in the machine. Exactly one of its
// fields is set.
type Event struct {
	Boot   *Boot   `json:"boot,omitempty"`
	Output *Output `json:"output,omitempty"`
	Ended  *Ended  `json:"ended,omitempty"`
	// Failed says why the machine cannot do its job.
	Failed string `json:"failed,omitempty"`
	// Done is the last event: all steps have ended.
	Done bool `json:"done,omitempty"`
}

// Boot is the first event.
type Boot struct {
	// Release and Version are those of uname(2).
	Release string `json:"release"`
	Version string `json:"version"`
	// After is the time since the kernel started.
	After time.Duration `json:"after"`
}

// Output is a part of what a step wrote, to stdout or stderr.
type Output struct {
	Step string `json:"step"`
	Text string `json:"text"`
	// Error marks what was written to stderr.
	Error bool `json:"error,omitempty"`
}

// Ended says how a step has ended.
type Ended struct {
	Step string        `json:"step"`
	Took time.Duration `json:"took"`
	// Problem is "" for a program that ended with status 0.
	Problem string `json:"problem,omitempty"`
}

// Facts is what Sluice can do on a kernel, printed as JSON by the program facts.
type Facts struct {
	// Backend is what an agent with the setting auto takes, Reason why that is not
	// eBPF; both as its metrics say.
	Backend string `json:"backend"`
	Reason  string `json:"reason,omitempty"`
	// Programs are the eBPF programs, each verified by itself.
	Programs []Program `json:"programs"`
	// Features are what eBPF uses where it is there, IPTables the variants of
	// iptables: name to "", or why it is missing.
	Features map[string]string `json:"features"`
	IPTables map[string]string `json:"iptables"`
}

// A Program is what the kernel says of an eBPF program.
type Program struct {
	Name string `json:"name"`
	// Instructions that were verified; 0 with a reason in Refused.
	Instructions int    `json:"instructions,omitempty"`
	Refused      string `json:"refused,omitempty"`
}
