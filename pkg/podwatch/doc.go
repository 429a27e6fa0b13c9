// Package podwatch keeps the Kubernetes objects that the agent works on (pods,
// services, endpoint slices, namespaces, routes) as small typed objects in a
// Store, and fills that Store from a source. Kubernetes is the source that reads
// from an API server. Files is the source that reads a directory of plain
// Kubernetes YAML; it also plays the part of the cluster's endpoint controller
// and derives endpoint slices from selectors. What happened to pods goes back to
// the API server with a Reporter; a Removal tells whether the agent's own
// DaemonSet is deleted.
//
// It does not decide which pods are redirected and resolves no reference
// between objects. No Kubernetes type leaves the package: what is not in the
// model does not reach the rest of the agent, and only TCP ports are in it.
//
// A Store has one writer (its source), one consumer of changes (Wait) and any
// number of readers. Objects and slices that it returns are shared and never
// change; a change replaces the object. A change of several objects becomes
// visible at once. Files starts no goroutine before Run and holds one inotify
// instance while it runs; nothing it does outlives the process. Kubernetes,
// Reporter and Removal start nothing before Run either, and have at most one
// request for each kind under way, or one report of each sort. Kubernetes holds
// no object but those in the Store.
//
// NewKubernetes fails on a kubeconfig that cannot be read. After that nothing
// that the API server says or does not say ends Run: what is wrong is in Health,
// by kind, and the last state stays in the Store.
//
// NewFiles fails on a directory that cannot be read. After that what is wrong
// with a document is a Problem with file, line and field, never an error: the
// last good version of its objects stays in the Store.
package podwatch
