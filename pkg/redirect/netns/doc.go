// Package netns runs functions inside network namespaces and names namespaces:
// by inode, as nsfs does, by cookie, as the kernel's BPF helpers do, and by number,
// as rtnetlink does.
//
// It neither creates nor removes namespaces and never changes the namespace of
// the caller's thread.
//
// Do enters a namespace on a fresh goroutine that is locked to its thread and
// waits for it. A thread that cannot be led back dies with its goroutine, so
// no other code ever runs in the wrong namespace. All functions are safe for
// concurrent use.
//
// A path that leads to no network namespace gives an error that wraps
// redirect.ErrGone; all other errors only describe.
package netns
