package chart

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/sluicemesh/sluice/tests/need"
)

// manifestHead says what the file is.
const manifestHead = `# Sluice as one manifest: the Helm chart deploy/helm/sluice with its defaults,
# and the namespace. Made by "make manifest"; do not edit.
#
#   kubectl apply --server-side -f sluice.yaml
`

// TestManifest holds the rendered manifest to the chart.
func TestManifest(t *testing.T) {
	want := manifestHead + mustRender(t, "--set", "namespace.create=true")
	// What applies it is not Helm, and no Helm may take the objects for its own.
	want = strings.ReplaceAll(want, "app.kubernetes.io/managed-by: Helm", "app.kubernetes.io/managed-by: kubectl")
	path := filepath.Join(need.Repo(t), "deploy", "manifests", "sluice.yaml")
	if *update {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	is, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, string(is)); diff != "" {
		t.Errorf("deploy/manifests/sluice.yaml is not what the chart becomes; renew it: make manifest\n%s", diff)
	}
}

// TestObjects: every object says whose it is, and those that belong into a
// namespace say which, so that kubectl puts them there as well.
func TestObjects(t *testing.T) {
	all := objects(t, mustRender(t, "--set", "namespace.create=true,podMonitor.enabled=true"))
	if len(all) < 10 {
		t.Fatalf("%d objects", len(all))
	}
	namespaced := map[string]bool{"ServiceAccount": true, "Role": true, "RoleBinding": true, "DaemonSet": true, "Service": true, "PodMonitor": true}
	for _, o := range all {
		kind, name := str(o["kind"]), str(at(o, "metadata", "name"))
		for _, label := range []string{"name", "instance", "version", "part-of", "managed-by"} {
			if at(o, "metadata", "labels", "app.kubernetes.io/"+label) == nil {
				t.Errorf("%s %s has no label app.kubernetes.io/%s", kind, name, label)
			}
		}
		if ns := str(at(o, "metadata", "namespace")); (ns == namespace) != namespaced[kind] {
			t.Errorf("%s %s: namespace %q", kind, name, ns)
		}
	}
	selector, _ := at(find(t, all, "DaemonSet"), "spec", "selector", "matchLabels").(map[string]any)
	for k, v := range selector {
		if is := at(find(t, all, "DaemonSet"), "spec", "template", "metadata", "labels", k); is != v {
			t.Errorf("label %s of the agent's pods: %v, selected is %v", k, is, v)
		}
	}
}

// TestNotes: the notes name the next commands, with the names of this release.
func TestNotes(t *testing.T) {
	notes := func(args ...string) string {
		out, err := command(t, helm(t), append([]string{"install", "other", chartDir(t), "--dry-run=client", "--namespace", "mesh"}, args...)...)
		if err != nil {
			t.Fatal(err)
		}
		_, n, ok := strings.Cut(out, "NOTES:")
		if !ok {
			t.Fatalf("no notes in %q", out)
		}
		return n
	}
	with := notes()
	for _, want := range []string{
		"kubectl -n mesh rollout status daemonset/other-agent",
		"kubectl label namespace NAMESPACE sluice.dev/inject=enabled",
		"kubectl -n NAMESPACE rollout restart deployment",
	} {
		if !strings.Contains(with, want) {
			t.Errorf("the notes lack %q:\n%s", want, with)
		}
	}
	if without := notes("--set", "injection.enabled=false"); !strings.Contains(without, "sluice-agent inject") || strings.Contains(without, "label namespace NAMESPACE") {
		t.Errorf("the notes without injection:\n%s", without)
	}
}

// TestRightsDocumented holds the table of rights in docs/install.md to the chart:
// a capability or mount that is not explained is not given.
func TestRightsDocumented(t *testing.T) {
	b, err := os.ReadFile(filepath.Join(need.Repo(t), "docs", "install.md"))
	if err != nil {
		t.Fatal(err)
	}
	explained := map[string]bool{}
	for _, m := range regexp.MustCompile("(?m)^\\| `([A-Z_]+|/[^`]*)` \\|").FindAllStringSubmatch(string(b), -1) {
		explained[m[1]] = true
	}
	given := map[string]bool{}
	pod := at(find(t, objects(t, mustRender(t)), "DaemonSet"), "spec", "template", "spec")
	container := at(pod, "containers", 0)
	capabilities, _ := at(container, "securityContext", "capabilities", "add").([]any)
	for _, c := range capabilities {
		given[str(c)] = true
	}
	volumes, _ := at(pod, "volumes").([]any)
	for _, v := range volumes {
		given[str(at(v, "hostPath", "path"))] = true
	}
	if diff := cmp.Diff(given, explained); diff != "" {
		t.Errorf("rights of the chart (-) and of docs/install.md (+):\n%s", diff)
	}
	for _, field := range []string{"privileged", "allowPrivilegeEscalation"} {
		if at(container, "securityContext", field) != false {
			t.Errorf("%s is not false", field)
		}
	}
	if at(container, "securityContext", "readOnlyRootFilesystem") != true {
		t.Error("the root file system is not read-only")
	}
}
