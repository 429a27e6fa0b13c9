// Package redirect says what it means to steer the TCP connections of a pod to
// its sidecar Envoy: the model (Workload, Policy), the interface that every
// backend implements (Redirector, Meter) and what is common to them.
//
// It does not touch the kernel itself: packages bpf and iptables below it do.
// It knows nothing of Kubernetes; annotations reach it as a plain map.
//
// Values are plain data and may be copied. Kernel state belongs to the backend
// and outlives the process: Close leaves it in place, only Remove and the
// backends' Uninstall take it away.
//
// Addresses are netip.Addr, unmapped; ports are in host byte order. Of the
// errors only ErrNotSupported and ErrGone are promised.
package redirect
