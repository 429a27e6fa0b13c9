// Package cnibench measures what sluice-cni adds to the start of a pod: the built
// plugin and agent, real network namespaces, both backends, beside a program that
// does nothing and a plugin of the CNI project. make bench-cni prints the table;
// docs/benchmarks.md says what is in it.
//
// As a test it runs a few rounds and shows that the measurement works.
package cnibench
