// Package xds says what the sidecar Envoys of a node are told: the model
// (Service, Pod, HTTPRoute), the resources that are made of it, and the static
// bootstrap with which every sidecar starts. Packages translate and server
// below it turn the model into resources and serve them.
//
// It knows nothing of Kubernetes and does no I/O.
//
// Values are plain data. A Resource is shared by all pods of the node and
// must not be changed once it was handed on.
//
// Its functions return no errors.
package xds
