package xds

import _ "embed"

//go:embed bootstrap.yaml
var bootstrap string

// Bootstrap returns the configuration, in YAML, that every sidecar Envoy starts
// with. It is the same for all pods of all nodes.
func Bootstrap() []byte { return []byte(bootstrap) }
