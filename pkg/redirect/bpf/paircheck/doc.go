// Package paircheck tries on real sockets whether connections whose two ends
// are joined (acceleration) still do what TCP connections do, and measures
// whether they are faster. It knows nothing of eBPF: connections to one port of
// loopback are expected to be joined by whoever started it, those to another
// are not, and both must look the same.
//
// It runs as a child process with a network namespace and a cgroup of its own,
// so that nothing of it is seen outside, and ends with its standard input.
// Every wait has a deadline.
package paircheck
