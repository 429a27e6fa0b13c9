// Package redirecttest is the conformance suite of redirection: one table of
// cases, IPv4 and IPv6 each, that every redirect.Redirector passes. What the
// backends do differently is named in that table and nowhere else.
//
// It runs no Envoy: a small proxy stands for it, which says what it was asked
// for. The suite has no opinion on how a backend does its work; tests of rules,
// programs and maps belong to the backends.
//
// The proxy is the test binary itself, started again as another user inside
// the pod's namespace, so TestMain of a package that calls Run must call Main.
// Everything the suite makes is gone when it returns.
//
// Failures are reported through testing.T.
package redirecttest
