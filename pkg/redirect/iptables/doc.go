// Package iptables redirects the connections of pods with nat rules inside each
// pod's network namespace, for nodes and pods that cannot have eBPF. It
// implements redirect.Redirector and redirect.Meter.
//
// It touches no namespace but the pods', needs no rule of its own on the node,
// and knows the proxy by UID alone. It runs iptables-restore and iptables-save,
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
