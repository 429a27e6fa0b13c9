// Package server serves xDS to the sidecar Envoys of one node: the aggregated
// discovery service, incremental (delta) and state of the world, on an abstract
// unix socket inside the network namespace of each pod.
//
// It does not make resources and does not look into them: they arrive as
// xds.Resource, named and versioned by content, in sets that belong to an owner
// (a service, say). It knows nothing of Kubernetes, and enters namespaces only
// through Options.InNetns.
//
// A resource is stored once and marshalled once. A stream remembers how far in
// the node's log of changes its client is, and of names only those that the
// client asked for (one bit each) or that are not settled (in flight, held
// back, rejected): an update costs the number of changed resources times the
// number of streams, never the number of resources. One lock guards store and
// streams; nothing is sent and nothing waits under it. The sockets close with
// the process, and Envoys keep their configuration until they are back.
//
// Only Open and New return errors that mean something to the caller; what
// clients do wrong ends in their stream's status, in the log and in metrics.
package server
