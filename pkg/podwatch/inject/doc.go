// Package inject puts the sidecar into Kubernetes YAML: into Pods and into the
// pod templates of what makes pods. It does to text what the chart's admission
// policy does to pods, by the same description (deploy/helm/sluice/files/sidecar.yaml),
// for clusters that have no such policies.
//
// It does not look into a cluster: a namespace's label cannot be seen, so
// everything is injected that does not say no. Documents of other kinds, and
// those that need no sidecar, come out byte by byte as they went in; comments
// and the order of fields of the others are kept.
//
// An Injector has no state but its settings and may be used by several
// goroutines at once. Wrong input is an error that names file, document, object
// and field; what comes with an error must not be used.
package inject
