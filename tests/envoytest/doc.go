// Package envoytest starts the real Envoy for tests: as the proxy's user,
// inside a network namespace of the test's choice, with statistics, access log
// and configuration dump at hand. It also asks Envoy whether it would accept a
// configuration.
//
// It makes no namespaces and writes no configuration; tests bring both.
//
// An Envoy belongs to the test that started it and ends with it. Any number may
// run at once: they share no file, no memory and, each in its own namespace, no
// port. What an Envoy logged is shown when its test fails.
//
// Functions that take a testing.TB end the test on errors; Get and WaitReady
// return theirs, so that a test can poll.
package envoytest
