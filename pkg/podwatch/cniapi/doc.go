// Package cniapi is how the CNI plugin and the agent of a node talk: the types
// of a request, a Server for the agent and a Client for the plugin, HTTP with
// JSON bodies on a unix socket that only root may use.
//
// It decides nothing about pods and touches no network namespace; the agent's
// Handler does. It imports nothing but the standard library, so that the plugin
// starts fast and stays free of Kubernetes and eBPF.
//
// Server and Client are safe for concurrent use. A server takes the socket over
// from an earlier one in one step, and leaves the socket's file in place when it
// ends: taking it away could hit the file of a server that took over meanwhile.
//
// Of the errors only ErrUnavailable is promised. The text of an error that the
// agent's Handler returned reaches the plugin unchanged.
package cniapi
