// Package netnstest builds a node out of network namespaces: a bridge with an
// IPv4 and an IPv6 subnet, pods on it, and further networks that the node
// routes to. Tests get real interfaces, routes and sockets without touching the
// machine's own network.
//
// It installs no redirection and runs no Envoy.
//
// Everything belongs to the test that made it and is gone when that test ends,
// also when it fails or is interrupted. Namespaces are bound under /run/netns
// with a prefix that names this process; what a killed process left is removed
// by the next VerifyNoLeaks. A Namespace may be used from several goroutines.
//
// Functions that take a testing.TB end the test on errors; those that take a
// context return them.
package netnstest
