// Package podwatch keeps the Kubernetes objects that the agent works on (pods,
// services, endpoint slices, namespaces, routes) as small typed objects in a
// Store, and fills that Store from a source. Files is the source that reads a
// directory of plain Kubernetes YAML; it also plays the part of the cluster's
// endpoint controller and derives endpoint slices from selectors.
//
// It does not decide which pods are redirected and resolves no reference
// between objects. No Kubernetes type leaves the package: what is not in the
// model does not reach the rest of the agent, and only TCP ports are in it.
//
// A Store has one writer (its source), one consumer of changes (Wait) and any
// number of readers. Objects and slices that it returns are shared and never
// change; a change replaces the object. A change of several objects becomes
// visible at once. Files starts no goroutine before Run and holds one inotify
// instance while it runs; nothing it does outlives the process.
//
// NewFiles fails on a directory that cannot be read. After that what is wrong
// with a document is a Problem with file, line and field, never an error: the
// last good version of its objects stays in the Store.
package podwatch
