// Package load is both ends of the traffic that redirectbench measures: a server
// on five ports, and a client that does what it is told by lines of JSON, each
// answered by one. Each runs in a process of its own, so that it has a core and
// an account of CPU time of its own.
package load
