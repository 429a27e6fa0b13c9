// Bench compares Sluice's xDS server with go-control-plane's in one run: one of
// many clusters changes and is delivered to all pods of a node. It prints a
// table; docs/benchmarks.md says what is in it.
//
// It does not measure an Envoy, several cores, or other types than clusters.
//
// Servers and clients live in this process, one server after the other. Unix
// sockets are made in a temporary directory, which is removed at the end.
//
// It fails if a pod is sent anything else than what has changed.
package main
