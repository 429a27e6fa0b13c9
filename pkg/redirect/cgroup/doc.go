// Package cgroup finds the root of the cgroup v2 hierarchy and, below it, the
// cgroups that all pods of the node live in, by which a process of a pod is
// told from one of the node.
//
// It reads and changes nothing. It does not follow cgroup v1: where processes
// of pods are known there alone, Pods says so with ErrUnknown.
package cgroup
