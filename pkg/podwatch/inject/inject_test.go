package inject_test

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"

	"github.com/sluicemesh/sluice/deploy/helm"
	"github.com/sluicemesh/sluice/pkg/podwatch/inject"
)

var update = flag.Bool("update", false, "write the golden files anew")

func sources() inject.Sources {
	return inject.Sources{Sidecar: helm.Sidecar(), Bootstrap: helm.Bootstrap(), Values: helm.Values()}
}

// newInjector has the chart's defaults, with a bootstrap that is short to read.
func newInjector(tb testing.TB, o inject.Options) *inject.Injector {
	tb.Helper()
	s := sources()
	s.Bootstrap = []byte("node:\n  id: sidecar\n")
	in, err := inject.New(s, o)
	if err != nil {
		tb.Fatal(err)
	}
	return in
}

// golden compares with a file of testdata, or writes it.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("%s (write it anew with -update):\n%s", path, diff)
	}
}

func TestPods(t *testing.T) {
	in := newInjector(t, inject.Options{})
	for _, c := range podCases() {
		t.Run(c.name, func(t *testing.T) {
			r, err := in.Inject("in.yaml", []byte(c.text()))
			if c.refused != "" {
				if err == nil || !strings.Contains(err.Error(), c.refused) || !strings.HasPrefix(err.Error(), "in.yaml, document 1, Pod "+c.name+": ") {
					t.Fatalf("error %v, want one that names the document and contains %q", err, c.refused)
				}
				if r.YAML != nil {
					t.Error("there is YAML beside the error")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if c.plain != (r.Injected == 0) || c.plain != (string(r.YAML) == c.text()) {
				t.Errorf("%d injected, want none: %v", r.Injected, c.plain)
			}
			if noted := c.plain && c.name != "disabled"; noted != (len(r.Notes) == 1) {
				t.Errorf("notes %q, want one: %v", r.Notes, noted)
			}
			if c.plain {
				return
			}
			golden(t, "pods/"+c.name+".yaml", r.YAML)
			again, err := in.Inject("out.yaml", r.YAML)
			if err != nil || !bytes.Equal(again.YAML, r.YAML) {
				t.Errorf("done twice: %v, or differs", err)
			}
		})
	}
}

// TestFiles shows what becomes of comments, order, style and other documents.
func TestFiles(t *testing.T) {
	for _, name := range []string{"workloads", "styles", "anchors", "json"} {
		t.Run(name, func(t *testing.T) {
			data, err := os.ReadFile(filepath.Join("testdata", "files", name+".in.yaml"))
			if err != nil {
				t.Fatal(err)
			}
			in := newInjector(t, inject.Options{ReleaseNamespace: "sluice-system"})
			r, err := in.Inject(name+".yaml", data)
			if err != nil {
				t.Fatal(err)
			}
			golden(t, "files/"+name+".out.yaml", append(r.YAML, []byte("# "+strings.Join(r.Notes, "\n# ")+"\n")...))
			again, err := in.Inject("out.yaml", r.YAML)
			if err != nil || !bytes.Equal(again.YAML, r.YAML) || again.Injected != 0 {
				t.Errorf("done twice: %v, or differs", err)
			}
			if name == "json" && !json.Valid(r.YAML) {
				t.Error("JSON did not stay JSON")
			}
		})
	}
}

func TestErrors(t *testing.T) {
	in := newInjector(t, inject.Options{})
	pod := func(s string) string { return "apiVersion: v1\nkind: Pod\nmetadata: {name: p, namespace: n}\n" + s }
	for name, test := range map[string]struct{ yaml, want string }{
		"syntax":            {"a: b\n---\na: [\n", "x.yaml, document 2: line 3: did not find expected node content"},
		"no spec":           {pod(""), "x.yaml, document 1, Pod n/p: spec: is missing"},
		"spec is a list":    {pod("spec: []\n"), "x.yaml, document 1, Pod n/p: spec: line 4: want a map"},
		"containers a map":  {pod("spec: {containers: {}}\n"), "Pod n/p: spec.containers: line 4: want a list"},
		"bare label":        {"kind: Pod\napiVersion: v1\nmetadata: {labels: {sluice.dev/inject: true}}\nspec: {}\n", `metadata.labels.sluice.dev/inject: line 3: "true": want a text, in quotes`},
		"bare annotation":   {"kind: Pod\napiVersion: v1\nmetadata: {annotations: {sluice.dev/proxy-cpu: 1}}\nspec: {}\n", `metadata.annotations[sluice.dev/proxy-cpu]: line 3: "1": want a text, in quotes`},
		"host network text": {pod("spec: {hostNetwork: \"yes\"}\n"), `spec.hostNetwork: line 4: "yes": want true or false`},
		"no template":       {"apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: d}\nspec: {}\n", "Deployment d: spec.template: is missing"},
		"in a list":         {"apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Pod, metadata: {name: q}}\n", "Pod q: items[0].spec: is missing"},
		"all of them":       {pod("") + "---\n" + pod(""), "document 2, Pod n/p"},
		"billion laughs": {
			"a: &a [x, x, x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a, *a]\nc: &c [*b, *b, *b, *b, *b, *b, *b, *b, *b, *b]\nd: &d [*c, *c, *c, *c, *c, *c, *c, *c, *c, *c]\ne: &e [*d, *d, *d, *d, *d, *d, *d, *d, *d, *d]\nf: [*e, *e, *e, *e]\n",
			"more than 100000 values",
		},
		"deep": {"a: " + strings.Repeat("[", 200) + strings.Repeat("]", 200) + "\n", "nested deeper than 100"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := in.Inject("x.yaml", []byte(test.yaml)); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %v, want one that contains %q", err, test.want)
			}
		})
	}
}

func TestSettings(t *testing.T) {
	in := newInjector(t, inject.Options{
		Values: []byte("proxy: {image: a:1, logLevel: info, concurrency: 0, drainSeconds: 0, uid: 2102, resources: {limits: null, requests: {cpu: 0.5}}}\nexcludeNamespaces: [quiet]\ninjection: {excludeNamespaces: []}\nother: thing\n"),
		Set:    map[string]string{"proxy-image": "b:2", "proxy-memory-limit": "32Mi"},
	})
	r, err := in.Inject("x", []byte("apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec:\n  containers: [{name: a}]\n---\napiVersion: v1\nkind: Pod\nmetadata: {name: p, namespace: quiet}\nspec: {}\n"))
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "settings.yaml", r.YAML)
	if want := []string{"x, document 2, Pod quiet/p: not injected: nothing is in namespace quiet"}; !cmp.Equal(r.Notes, want) {
		t.Errorf("notes %q, want %q", r.Notes, want)
	}

	_, err = inject.New(sources(), inject.Options{
		Values: []byte("proxy: {logLevel: warn, concurrency: many, drainSeconds: -1, image: '', resources: {requests: 3}}\ninjection: {excludeNamespaces: a}"),
		Set:    map[string]string{"proxy-cpu": "x", "proxy-sauce": "1"},
	})
	for _, want := range []string{
		`value proxy.logLevel: "warn": want trace, debug, info, warning, error, critical or off`,
		`value proxy.concurrency: "many": want a number from 0 to 2147483647`,
		`value proxy.drainSeconds: "-1": want a number from 0`,
		`value proxy.image: "": want a text`,
		`proxy-cpu: "x": want a quantity above 0`,
		`proxy-sauce: there is no such annotation`,
		`value injection.excludeNamespaces: want a list`,
	} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want one that contains %q", err, want)
		}
	}
}

// FuzzInject: whatever comes in, nothing panics; what is not changed is the same
// byte by byte; what is changed is still YAML and is not changed again.
func FuzzInject(f *testing.F) {
	for _, c := range podCases() {
		f.Add([]byte(c.text()))
	}
	files, err := filepath.Glob("testdata/files/*.in.yaml")
	if err != nil || len(files) == 0 {
		f.Fatalf("find seeds: %v", err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	in := newInjector(f, inject.Options{})
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := in.Inject("x", data)
		if err != nil {
			return
		}
		if r.Injected == 0 {
			if !bytes.Equal(r.YAML, data) {
				t.Fatalf("nothing was injected, yet the text changed:\n%q\n%q", data, r.YAML)
			}
			return
		}
		dec := yaml.NewDecoder(bytes.NewReader(r.YAML))
		for {
			var n yaml.Node
			if err := dec.Decode(&n); err != nil {
				if err.Error() != "EOF" {
					t.Fatalf("the result is no YAML: %v\n%s", err, r.YAML)
				}
				break
			}
		}
		again, err := in.Inject("x", r.YAML)
		if err != nil || again.Injected != 0 {
			t.Fatalf("the result is injected again: %v\n%s", err, r.YAML)
		}
	})
}
