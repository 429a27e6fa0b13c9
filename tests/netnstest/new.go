package netnstest

import "testing"

// New makes a namespace with nothing but lo, for tests that let a CNI chain
// make the network. It goes with the test.
func New(tb testing.TB, name string) Namespace {
	tb.Helper()
	return newNamespace(tb, name)
}
