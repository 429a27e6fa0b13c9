// Package redirectbench measures what redirection costs: the same two pods with
// the same two Envoys, with nothing redirected, addressed by hand, and redirected
// by each backend, in turns in one run. make bench-redirect prints the tables;
// docs/benchmarks.md says what is in them. Package load makes the traffic.
//
// As a test it runs a few rounds and shows that the measurement works: that
// each mode takes the way it claims to take.
package redirectbench
