// Package helm gives programs what the Helm chart beside it says, so that it is
// said once: `sluice-agent inject` adds to YAML what the chart's admission
// policy adds to pods.
//
// It reads nothing at run time and changes nothing; the files are part of the
// program. The chart itself is used with Helm, not with this package.
package helm

import (
	"bytes"
	_ "embed"
)

var (
	//go:embed sluice/files/sidecar.yaml
	sidecar []byte
	//go:embed sluice/files/bootstrap.yaml
	bootstrap []byte
	//go:embed sluice/values.yaml
	values []byte
)

// Sidecar returns a copy of the description of the sidecar.
func Sidecar() []byte { return bytes.Clone(sidecar) }

// Bootstrap returns a copy of Envoy's bootstrap as pods get it, without comments.
func Bootstrap() []byte { return bytes.Clone(bootstrap) }

// Values returns a copy of the chart's values.yaml.
func Values() []byte { return bytes.Clone(values) }
