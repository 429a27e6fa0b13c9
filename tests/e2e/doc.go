// Package e2e tests Sluice as its users meet it: the built agent on its file
// source, the built CNI plugin behind the real bridge plugin, real Envoys as
// sidecars, and traffic through them. What a test asserts it asserts by
// traffic, by Envoy's statistics or access log, and by the agent's metrics.
//
// It does not look into packages; what one of them promises alone is tested there.
//
// Each test makes a node of its own in network namespaces, with state, pins and
// sockets of its own, and leaves nothing.
//
// BACKEND=ebpf or iptables restricts a run to one backend.
package e2e
