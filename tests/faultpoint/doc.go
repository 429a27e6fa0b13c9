// Package faultpoint stops a process before each system call by which it would
// change something that outlives it, and lets a test decide what happens there:
// go on, be killed, or first meet a change that somebody else makes.
//
// The kernel itself reports the calls (seccomp user notifications), so that they
// are all enumerated, those of libraries and of programs that the process runs
// too: a fault point cannot be forgotten, and the code under test has none.
//
// What counts: eBPF maps written to, objects pinned, links made, updated and
// detached; mounts; files and directories made, renamed and removed; rtnetlink
// requests that change something, nftables transactions, tables replaced by
// legacy iptables. What ends with the process anyway does not: programs loaded,
// maps made but not pinned.
//
// It needs root and Linux 5.9.
package faultpoint
