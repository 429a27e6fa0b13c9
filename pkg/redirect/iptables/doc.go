// Package iptables redirects the connections of pods with nat rules inside each
// pod's network namespace, for nodes and pods that cannot have eBPF. It
// implements redirect.Redirector and redirect.Meter.
//
// On the node itself it has one small set of rules, by which pods know the
// node's own connections; without cgroup v2 it does without. It knows the proxy
// by UID alone, and touches no other namespace. It runs iptables-restore and iptables-save,
// nft or legacy, and contains no packet filter code itself.
//
// Rules are data first (rules.go, pure) and then applied in one transaction a
// table. They live as long as the namespace. A record per workload in StateDir
// says which namespace, variant and digest; what the kernel really has is read
// back from it. Operations on one workload wait for each other, others run side
// by side; the package has no background work.
//
// New returns an error that wraps redirect.ErrNotSupported if the machine or its
// kernel cannot do it, Add one that wraps redirect.ErrGone if the namespace has
// vanished.
package iptables
