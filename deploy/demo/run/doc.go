// Demo shows Sluice at work on one machine, without Kubernetes: it starts the
// agent on its file source, makes pods through a real CNI chain (bridge,
// host-local, sluice-cni), runs the bookshop and an Envoy in each, and prints
// what happens to their traffic, with the figures it measured.
//
// It stands in for the kubelet, the container runtime and the cluster's DNS, as
// far as the demo needs them, and for nothing else: programs and Envoys get
// what they would get in a cluster.
//
// Everything is in network namespaces named sluice-demo-*, in the cgroup
// sluice-demo, and below /run/sluice-demo, where it also mounts a bpffs of its
// own; links, rules and routes of the machine are not touched. "run" compares
// the machine before and after and removes all of it, also when it is
// interrupted, and what a killed demo left behind; with --keep, "clean" does.
//
// It fails when anything that it shows is not as it should be, naming it.
package main
