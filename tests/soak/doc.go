// Package soak lets a node with the real agent, plugin and Envoys work for as
// long as one likes: mixed traffic while pods come and go, the agent is killed
// and ended, and proxies are killed. In the end every request that failed must
// have a cause, and nothing may have grown that should not.
//
// make soak DURATION=2m
package soak
