// Command sluice-cni is the CNI plugin: chained after the plugin that makes a
// pod's interface, it tells the agent of the node about the pod and waits until
// its traffic is redirected, so that no container starts before.
//
// It decides nothing, knows neither Kubernetes nor eBPF and touches no network
// namespace: all that is the agent's, which it asks over package cniapi.
//
// It runs once per request and keeps nothing. Without an agent ADD fails, so
// that no pod runs past its proxy, and DEL succeeds, so that every pod can go.
//
// Errors go to stdout as the CNI specification has them, with its codes; logs go
// to stderr alone.
package main
