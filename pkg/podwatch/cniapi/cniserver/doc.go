// Package cniserver is the agent's end of package cniapi: a Server that answers
// the CNI plugin on a unix socket that only root may use.
//
// It decides nothing about pods; the agent's cniapi.Handler does. It is a package
// of its own because it needs net/http, whose initialization alone would double
// the time in which the plugin starts.
//
// A Server is safe for concurrent use. It takes the socket over from an earlier
// one in one step, and leaves the socket's file in place when it ends: taking it
// away could hit the file of a server that took over meanwhile.
//
// No errors are promised. The text of an error that the Handler returned reaches
// the plugin unchanged.
package cniserver
