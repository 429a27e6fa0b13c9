// Command sluice-agent runs on every node. It reads which pods and services
// there are, redirects the TCP traffic of the node's pods to their sidecar
// Envoys and serves those Envoys their configuration.
//
// It is the only place that knows all parts: podwatch (what there is), redirect
// (the kernel) and xds (the sidecars) know nothing of each other. plan.go holds
// the pure functions between them, agent.go applies the plans.
//
// All state is under one lock; work in the kernel happens outside of it, one
// operation on a sandbox at a time. What it puts into the kernel outlives it: when the agent ends,
// however it ends, running and new connections go on as before. Only the
// subcommand uninstall takes redirection away.
//
// Exit codes: 0 after SIGTERM or success, 1 when it cannot do its work, 2 for a
// command line that it does not understand.
package main
