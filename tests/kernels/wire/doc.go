// Package wire is what tests/kernels and the first process of the machines that
// it boots say to each other: a Job in, Events out.
//
// It moves no bytes itself and has no state.
//
// It promises no errors.
package wire
