package helm_test

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"

	"github.com/sluicemesh/sluice/deploy/helm"
	"github.com/sluicemesh/sluice/pkg/xds"
)

var update = flag.Bool("update", false, "write the chart's copy of the bootstrap anew")

// TestBootstrap holds the chart's copy of the bootstrap to pkg/xds/bootstrap.yaml.
// Comments are left out: they would be stored with every pod.
func TestBootstrap(t *testing.T) {
	var want bytes.Buffer
	for line := range strings.Lines(string(xds.Bootstrap())) {
		if text := strings.TrimSpace(line); text != "" && !strings.HasPrefix(text, "#") {
			want.WriteString(line)
		}
	}
	if *update {
		if err := os.WriteFile(filepath.Join("sluice", "files", "bootstrap.yaml"), want.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if diff := cmp.Diff(want.String(), string(helm.Bootstrap())); diff != "" {
		t.Errorf("files/bootstrap.yaml is not pkg/xds/bootstrap.yaml; write it anew: go test ./deploy/helm -update\n%s", diff)
	}
	var long, short any
	if err := yaml.Unmarshal(xds.Bootstrap(), &long); err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(helm.Bootstrap(), &short); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(long, short); diff != "" {
		t.Errorf("the copy means something else:\n%s", diff)
	}
	// The kubelet replaces $(NAME) in arguments; ''' ends the policy's literal.
	for _, token := range []string{"$(", "$$", "'''"} {
		if strings.Contains(string(helm.Bootstrap()), token) {
			t.Errorf("the bootstrap contains %q, which does not reach Envoy as it is", token)
		}
	}
}
