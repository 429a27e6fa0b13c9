package chart

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"
)

// changes has another value, as JSON, for each value of the chart.
var changes = map[string]string{
	"image.repository":              `"example/agent"`,
	"image.tag":                     `"9"`,
	"image.digest":                  `"sha256:` + strings.Repeat("ab", 32) + `"`,
	"image.pullPolicy":              `"Always"`,
	"imagePullSecrets":              `[{"name":"login"}]`,
	"backend":                       `"iptables"`,
	"accelerate":                    `"auto"`,
	"outboundPolicy":                `"block"`,
	"excludeNamespaces":             `["legacy"]`,
	"logLevel":                      `"debug"`,
	"logFormat":                     `"text"`,
	"cni.confDir":                   `"/var/lib/cni/conf"`,
	"cni.binDir":                    `"/var/lib/cni/bin"`,
	"injection.enabled":             `false`,
	"injection.excludeNamespaces":   `["kube-system","other"]`,
	"proxy.image":                   `"envoyproxy/envoy:v2"`,
	"proxy.imagePullPolicy":         `"Never"`,
	"proxy.uid":                     `2337`,
	"proxy.logLevel":                `"debug"`,
	"proxy.concurrency":             `7`,
	"proxy.drainSeconds":            `77`,
	"proxy.resources":               `{"requests":{"cpu":"77m"}}`,
	"metrics.port":                  `25090`,
	"metrics.annotations":           `false`,
	"metrics.service":               `false`,
	"podMonitor.enabled":            `false`,
	"podMonitor.interval":           `"7s"`,
	"podMonitor.labels":             `{"team":"a"}`,
	"dashboard.enabled":             `false`,
	"dashboard.labels":              `{"grafana_dashboard":null,"team":"a"}`,
	"statusPolicy":                  `false`,
	"resources":                     `{"requests":{"cpu":"77m"}}`,
	"updateStrategy":                `{"type":"OnDelete"}`,
	"tolerations":                   `[]`,
	"nodeSelector":                  `{"pool":"a"}`,
	"affinity":                      `{"nodeAffinity":{"a":1}}`,
	"podAnnotations":                `{"a":"b"}`,
	"podLabels":                     `{"a":"b"}`,
	"priorityClassName":             `"high"`,
	"terminationGracePeriodSeconds": `77`,
	"seLinuxOptions":                `{"type":"spc_t"}`,
	"extraArgs":                     `["--x"]`,
	"extraEnv":                      `[{"name":"A","value":"b"}]`,
	"namespace.create":              `true`,
}

// A value is one that the chart documents.
type value struct {
	path, byDefault, description string
}

// values reads values.yaml: a value is a key with a comment that ends it, or a
// list; a map without defaults of its own, or one that is given as a whole, too.
func values(tb testing.TB) []value {
	tb.Helper()
	b, err := os.ReadFile(filepath.Join(chartDir(tb), "values.yaml"))
	if err != nil {
		tb.Fatal(err)
	}
	var doc yaml.Node
	if err := yaml.Unmarshal(b, &doc); err != nil {
		tb.Fatal(err)
	}
	var all []value
	var walk func(prefix string, n *yaml.Node)
	walk = func(prefix string, n *yaml.Node) {
		for i := 0; i+1 < len(n.Content); i += 2 {
			key, v := n.Content[i], n.Content[i+1]
			path := strings.TrimPrefix(prefix+"."+key.Value, ".")
			if _, whole := changes[path]; v.Kind == yaml.MappingNode && len(v.Content) > 0 && !whole {
				walk(path, v)
				continue
			}
			v.HeadComment, v.LineComment = "", ""
			v.Style |= yaml.FlowStyle
			text, err := yaml.Marshal(flow(v))
			if err != nil {
				tb.Fatal(err)
			}
			all = append(all, value{path, strings.TrimSpace(string(text)), comment(key.HeadComment)})
		}
	}
	walk("", doc.Content[0])
	return all
}

// flow has a node written in one line.
func flow(n *yaml.Node) *yaml.Node {
	if n.Kind != yaml.ScalarNode {
		n.Style = yaml.FlowStyle
	}
	for _, c := range n.Content {
		flow(c)
	}
	return n
}

// comment returns the text of the last paragraph of a comment.
func comment(c string) string {
	c = c[strings.LastIndex(c, "\n\n")+1:]
	var words []string
	for line := range strings.Lines(c) {
		words = append(words, strings.TrimSpace(strings.TrimPrefix(strings.TrimSpace(line), "#")))
	}
	return strings.TrimSpace(strings.Join(words, " "))
}

// TestEveryValueMatters changes one value after the other: what the chart becomes
// must change, too.
func TestEveryValueMatters(t *testing.T) {
	base := []string{"--set-json", "podMonitor.enabled=true,dashboard.enabled=true"}
	before := mustRender(t, base...)
	known := map[string]bool{}
	for _, v := range values(t) {
		known[v.path] = true
		to, ok := changes[v.path]
		if !ok {
			t.Errorf("value %s has no change to try: add one", v.path)
			continue
		}
		if mustRender(t, append(base, "--set-json", v.path+"="+to)...) == before {
			t.Errorf("%s=%s changes nothing", v.path, to)
		}
	}
	for path := range changes {
		if !known[path] {
			t.Errorf("value %s is changed here, but values.yaml has none", path)
		}
	}
}

// TestWrongValues: a wrong value is refused, and its name is in the message.
func TestWrongValues(t *testing.T) {
	for set, want := range map[string]string{
		`backend="foo"`:                                 "/backend",
		`backend=null`:                                  "", // the default again
		`outboundPolicy="allow"`:                        "/outboundPolicy",
		`logLevel="trace"`:                              "/logLevel",
		`logFormat="xml"`:                               "/logFormat",
		`bakend="ebpf"`:                                 "'bakend' not allowed",
		`image.tga="1"`:                                 "'tga' not allowed",
		`image.pullPolicy="Sometimes"`:                  "/image/pullPolicy",
		`image.digest="1234"`:                           "/image/digest",
		`imagePullSecrets=["login"]`:                    "/imagePullSecrets/0",
		`excludeNamespaces="a"`:                         "/excludeNamespaces",
		`excludeNamespaces=["A b"]`:                     "/excludeNamespaces/0",
		`cni.confDir="etc/cni"`:                         "/cni/confDir",
		`injection.enabled="yes"`:                       "/injection/enabled",
		`proxy.uid=0`:                                   "/proxy/uid",
		`proxy.logLevel="verbose"`:                      "/proxy/logLevel",
		`proxy.drainSeconds="5s"`:                       "/proxy/drainSeconds",
		`proxy.resources.limits.gpu=1`:                  "'gpu' not allowed",
		`proxy.resources.limits.cpu="x"`:                "/proxy/resources/limits/cpu",
		`metrics.port=0`:                                "/metrics/port",
		`podMonitor.interval="often"`:                   "/podMonitor/interval",
		`statusPolicy="maybe"`:                          "/statusPolicy",
		`updateStrategy.type="Now"`:                     "/updateStrategy/type",
		`updateStrategy.rollingUpdate.maxUnavailable=0`: "/updateStrategy/rollingUpdate/maxUnavailable",
		`tolerations=[{"operator":"All"}]`:              "/tolerations/0/operator",
		`podLabels={"a":1}`:                             "/podLabels/a",
		`terminationGracePeriodSeconds=-1`:              "/terminationGracePeriodSeconds",
		`extraEnv=[{"value":"b"}]`:                      "'name'",
	} {
		_, err := render(t, "--set-json", set)
		switch {
		case want == "" && err != nil:
			t.Errorf("%s: refused: %v", set, err)
		case want != "" && err == nil:
			t.Errorf("%s: accepted", set)
		case want != "" && !strings.Contains(err.Error(), want):
			t.Errorf("%s: refused without %q: %v", set, want, err)
		}
	}
}

// TestReadme holds the table of values in the chart's README.md to values.yaml.
func TestReadme(t *testing.T) {
	var table strings.Builder
	table.WriteString("| value | default | meaning |\n|---|---|---|\n")
	for _, v := range values(t) {
		if v.description == "" {
			t.Errorf("value %s: no comment above it", v.path)
		}
		fmt.Fprintf(&table, "| `%s` | `%s` | %s |\n", v.path, v.byDefault, strings.ReplaceAll(v.description, "|", `\|`))
	}
	path := filepath.Join(chartDir(t), "README.md")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	const open, end = "<!-- values: begin -->\n", "<!-- values: end -->\n"
	before, rest, ok := strings.Cut(string(b), open)
	is, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s: no lines %q and %q", path, open, end)
	}
	if *update {
		if err := os.WriteFile(path, []byte(before+open+table.String()+end+after), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if diff := cmp.Diff(table.String(), is); diff != "" {
		t.Errorf("README.md and values.yaml differ; write the table anew: make manifest\n%s", diff)
	}
}
