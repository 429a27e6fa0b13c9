// Package bpf redirects with eBPF: connect hooks lead what a pod dials to its
// Envoy, sockops, tc and sk_lookup programs give its Envoy what others dial in the pod.
// No packet is rewritten and no NAT is involved.
//
// It does not decide which pods are redirected or how; that is the caller's
// Workload. It does not fall back to anything: Probe says whether it can work.
//
// All state lives in the kernel, pinned below Options.PinDir, and works without
// this process. Methods may be called concurrently, also by several processes:
// a lock on the pin directory admits one change at a time. Close leaves
// everything in place; Uninstall removes it.
//
// Errors wrap redirect.ErrNotSupported when the kernel lacks something,
// redirect.ErrGone when a pod's namespace has vanished, and ErrIncompatible
// when another build has left maps that this one would misread.
package bpf
