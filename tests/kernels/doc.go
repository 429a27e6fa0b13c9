// Command kernels tries Sluice on the kernels that people run: it boots each of
// them in a machine that qemu emulates, runs the root tier of the tests inside, and
// compares what works with two committed files: support.yaml says what must work
// where, instructions.txt how many instructions each kernel verified before it took
// each eBPF program. "make test-kernels" and "make verify" run it; CONTRIBUTING.md
// says how, docs/kernels.md shows the tables.
//
// It gets no kernels (tests/setup/kernels.sh does) and runs no Envoy. It tells
// nothing about speed: an emulated machine is ten times slower than a real one.
//
// What machines say is kept in bin/kernels until the next run. Everything else is in
// a directory of temporary files that goes with the program; machines have neither
// disk nor network, and end with it, also when it is killed.
//
// It ends with status 1 if a kernel does less or more than it must, a test fails or is
// skipped, a machine does not do its job in time, or a kernel is missing. One that the
// archive does not serve is named and is no failure.
package main
