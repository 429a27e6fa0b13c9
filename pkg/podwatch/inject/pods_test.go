package inject_test

// A podCase is a pod and what injection does with it. The golden test runs all
// of them through this package, the cluster test through the API server's
// admission policy as well.
type podCase struct {
	name string
	// metadata and spec are the pod's, in flow style; metadata without name.
	metadata, spec string
	// refused is a part of the error, of both; empty if the pod is taken.
	refused string
	// plain says that the pod gets no sidecar.
	plain bool
}

const container = `{name: app, image: "example.com/app:1", securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}}`

func annotated(key, value string) string {
	return `annotations: {sluice.dev/` + key + `: "` + value + `"}`
}

// podCases are pods in all the ways in which injection treats them differently.
func podCases() []podCase {
	spec := `containers: [` + container + `]`
	return []podCase{
		{name: "simple", spec: spec},
		{name: "labels", metadata: `labels: {app: web, sluice.dev/inject: enabled}`, spec: spec},
		{name: "disabled", metadata: `labels: {sluice.dev/inject: disabled}`, spec: spec, plain: true},
		{name: "init-containers", spec: spec + `, initContainers: [{name: setup, image: "example.com/setup:1"}, {name: other-sidecar, image: "example.com/other:1", restartPolicy: Always}]`},
		{name: "image", metadata: annotated("proxy-image", "example.com/envoy@sha256:0123456789012345678901234567890123456789012345678901234567890123"), spec: spec},
		{name: "resources", metadata: `annotations: {sluice.dev/proxy-cpu: "250m", sluice.dev/proxy-memory: "200Mi", sluice.dev/proxy-cpu-limit: "1", sluice.dev/proxy-memory-limit: "300M"}`, spec: spec},
		{name: "canonical-quantity", metadata: annotated("proxy-cpu", "1000m"), spec: spec},
		{name: "limit-below-default", metadata: annotated("proxy-cpu-limit", "20m"), spec: spec},
		{name: "log-level", metadata: annotated("proxy-log-level", "debug"), spec: spec},
		{name: "uid", metadata: annotated("proxy-uid", "2102"), spec: spec + `, securityContext: {runAsUser: 1337}`},
		{name: "pod-security-context", spec: spec + `, securityContext: {runAsUser: 1000, runAsGroup: 1000, fsGroup: 1000, runAsNonRoot: true, seccompProfile: {type: RuntimeDefault}}`},
		{name: "run-as-root", spec: spec + `, securityContext: {runAsUser: 0}`},
		{name: "short-grace", spec: spec + `, terminationGracePeriodSeconds: 3`},
		{name: "no-grace", spec: spec + `, terminationGracePeriodSeconds: 0`},
		{name: "job", spec: spec + `, restartPolicy: Never`},
		{name: "userns", spec: spec + `, hostUsers: false`},
		{name: "share-processes", spec: spec + `, shareProcessNamespace: true`},
		{name: "no-token", spec: spec + `, automountServiceAccountToken: false`},
		{name: "linux", spec: spec + `, os: {name: linux}, nodeSelector: {kubernetes.io/os: linux}`},
		{name: "host-network", spec: spec + `, hostNetwork: true`, plain: true},
		{name: "windows", spec: `containers: [{name: app, image: "example.com/app:1"}], os: {name: windows}`, plain: true},
		{name: "windows-node", spec: spec + `, nodeSelector: {kubernetes.io/os: windows}`, plain: true},
		{name: "has-istio-proxy", spec: `containers: [` + container + `, {name: istio-proxy, image: "example.com/p:1"}]`, plain: true},
		{name: "has-sluice-proxy", spec: spec + `, initContainers: [{name: sluice-proxy, image: "example.com/p:1", restartPolicy: Always}]`, plain: true},
		{name: "two-containers", metadata: `labels: {app: web}, annotations: {example.com/a: b}`, spec: `containers: [` + container + `, {name: log, image: "example.com/log:1", resources: {requests: {cpu: 1m}}}], volumes: [{name: v, emptyDir: {}}]`},

		{name: "bad-label", metadata: `labels: {sluice.dev/inject: "true"}`, spec: spec, refused: `want enabled or disabled`},
		{name: "bad-cpu", metadata: annotated("proxy-cpu", "lots"), spec: spec, refused: `"lots": want a quantity above 0, such as 100m or 128Mi`},
		{name: "zero-memory", metadata: annotated("proxy-memory", "0"), spec: spec, refused: `"0": want a quantity above 0`},
		{name: "negative-limit", metadata: annotated("proxy-memory-limit", "-1Gi"), spec: spec, refused: `"-1Gi": want a quantity above 0`},
		{name: "empty-limit", metadata: annotated("proxy-cpu-limit", ""), spec: spec, refused: `"": want a quantity above 0`},
		{name: "request-above-limit", metadata: annotated("proxy-cpu", "3"), spec: spec, refused: `"3": want no more than the limit`},
		{name: "bad-level", metadata: annotated("proxy-log-level", "loud"), spec: spec, refused: `"loud": want trace, debug, info, warning, error, critical or off`},
		{name: "bad-image", metadata: annotated("proxy-image", "a b"), spec: spec, refused: `"a b": want a text without white space`},
		{name: "bad-uid", metadata: annotated("proxy-uid", "0"), spec: spec, refused: `"0": want a user ID from 1 to 2147483647`},
		{name: "big-uid", metadata: annotated("proxy-uid", "2147483648"), spec: spec, refused: `"2147483648": want a user ID from 1 to 2147483647`},
		{name: "huge-uid", metadata: annotated("proxy-uid", "99999999999999999999"), spec: spec, refused: `want a user ID from 1 to 2147483647`},
		{name: "unknown", metadata: annotated("proxy-mem", "1Gi"), spec: spec, refused: `not known; there are sluice.dev/proxy-image`},
		{name: "same-user", spec: spec + `, securityContext: {runAsUser: 1337}`, refused: `runs as user 1337, which is the proxy's`},
		{name: "same-user-of-container", spec: `containers: [{name: app, image: "example.com/app:1", securityContext: {runAsUser: 1337}}]`, refused: `runs as user 1337, which is the proxy's`},
	}
}

// text is the pod as YAML.
func (c podCase) text() string {
	metadata := `name: ` + c.name
	if c.metadata != "" {
		metadata += `, ` + c.metadata
	}
	return "apiVersion: v1\nkind: Pod\nmetadata: {" + metadata + "}\nspec: {" + c.spec + "}\n"
}
