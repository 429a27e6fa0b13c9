// Package sluicetest makes a machine with Sluice on it, without Kubernetes: the
// built agent on its file source, the built CNI plugin behind the real bridge
// plugin, pods in network namespaces, and real Envoys as their sidecars.
//
// It tests nothing itself. Functions that take a testing.TB end the test on
// errors.
//
// A Node and all that is on it belong to the test that made it and go with it.
// TestMain of a package that uses it is netnstest.VerifyNoLeaks: agent and
// plugin are built once a test process, into its directory of temporary files.
package sluicetest
