// Command guest is the first and only process of its own of the machines that
// tests/kernels boots. It mounts what programs expect, loads modules, runs the
// steps of its job one after the other, reports all of it over a serial port and
// restarts the machine, which ends it.
//
// It judges nothing: what a step's output means is for tests/kernels to say.
//
// The machine is its own: nothing that it does is undone.
//
// What goes wrong is an event; what cannot be reported is on the console.
package main
