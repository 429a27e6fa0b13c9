// Package chart checks the Helm chart in deploy/helm/sluice and what is made of
// it: that each value does something and is described, that wrong ones are
// refused by name, that deploy/manifests/sluice.yaml is up to date. These tests
// need no more than Helm ("make manifest" builds it).
//
// With SLUICE_E2E=1 and KUBECONFIG set it also checks on that cluster, which must
// have the images and no Sluice: that the agent needs each right that the chart
// gives it and no other, and that nothing is left on the node afterwards. These
// tests install and remove Sluice, in namespaces and releases of their own name.
//
// It has no functions for others.
package chart
