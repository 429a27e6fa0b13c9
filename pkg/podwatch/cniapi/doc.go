// Package cniapi is how the CNI plugin and the agent of a node talk: the types
// of a request and a Client for the plugin, HTTP with JSON bodies on a unix
// socket that only root may use. The agent's end is package cniserver below.
//
// It decides nothing about pods and touches no network namespace; the agent's
// Handler does. It imports little of the standard library, not even net/http, so
// that the plugin starts fast, and nothing of Kubernetes or eBPF.
//
// A Client is safe for concurrent use.
//
// Of the errors only ErrUnavailable is promised. The text of an error that the
// agent's Handler returned reaches the plugin unchanged.
package cniapi
