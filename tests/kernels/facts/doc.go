// Command facts prints what Sluice can do on the kernel that it runs on, as
// JSON: which backend an agent takes and why, what the kernel says of every eBPF
// program, which optional features there are. Its argument is the agent's program,
// which it runs as a node does, with an empty directory as source.
//
// It compares with nothing and redirects no pod.
//
// What the agent installs is below a directory of temporary files, apart from the
// hooks in the kernel that serve all pods. It has removed all of that when it ends;
// if it is killed, that stays. It is meant for a machine that nobody else uses.
//
// Every error is fatal: half the facts are none.
package main
