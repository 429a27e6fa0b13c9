// Package need says what a test needs from the machine: root, a tool, the real
// Envoy. What is missing skips the test with its name, or fails it when the
// environment variable CI is set, so that nothing is skipped unseen there.
//
// It installs nothing and looks nowhere on the network; make fetches Envoy and
// the CNI plugins.
//
// Its functions may be called from several tests at once and leave no state.
//
// They end the calling test instead of returning an error.
package need
