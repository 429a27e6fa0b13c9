{{- /*
The admission policies that inject the sidecar. files/sidecar.yaml says what is
added; everything below turns that into CEL.

In CEL a literal map or list has one type of value, or dyn.
*/ -}}

{{- /* A value of a parameter, a text, as CEL literal: JSON's is one of CEL, too. */ -}}
{{- define "sluice.injection.text" -}}{{ . | toString | toJson }}{{- end -}}

{{- /* The default of parameter .parameter as text, looked up in the values .values. */ -}}
{{- define "sluice.injection.default" -}}
{{- $at := .values -}}
{{- range splitList "." .parameter.value -}}{{- $at = (kindIs "map" $at | ternary (get ($at | default dict) .) "") -}}{{- end -}}
{{- kindIs "invalid" $at | ternary "" $at | toString -}}
{{- end -}}

{{- /* Is .value, a CEL expression, right for kind .kind? */ -}}
{{- define "sluice.injection.valid" -}}
{{- if eq .kind "quantity" -}}(isQuantity({{ .value }}) && quantity({{ .value }}).isGreaterThan(quantity("0")))
{{- else if eq .kind "level" -}}{{ .value }} in ["trace", "debug", "info", "warning", "error", "critical", "off"]
{{- else if eq .kind "uid" -}}({{ .value }}.matches("^[1-9][0-9]{0,9}$") && int({{ .value }}) <= 2147483647)
{{- else -}}{{ .value }}.matches("^[^\\s]+$")
{{- end -}}
{{- end -}}

{{- /* What kind . wants. */ -}}
{{- define "sluice.injection.want" -}}
{{- if eq . "quantity" -}}want a quantity above 0, such as 100m or 128Mi
{{- else if eq . "level" -}}want trace, debug, info, warning, error, critical or off
{{- else if eq . "uid" -}}want a user ID from 1 to 2147483647
{{- else -}}want a text without white space
{{- end -}}
{{- end -}}

{{- /* When the CEL expression of .node has a value: a condition, empty for always. */ -}}
{{- define "sluice.injection.when" -}}
{{- if kindIs "map" .node -}}
  {{- $all := list -}}{{- $always := false -}}
  {{- range $key, $node := .node -}}
    {{- $when := include "sluice.injection.when" (dict "node" $node "parameters" $.parameters) -}}
    {{- if $when -}}{{- $all = append $all $when -}}{{- else -}}{{- $always = true -}}{{- end -}}
  {{- end -}}
  {{- if not $always -}}{{ $all | uniq | join " || " }}{{- end -}}
{{- else if and (kindIs "string" .node) (hasPrefix "$" .node) -}}
  {{- $name := trimPrefix "$" .node -}}
  {{- $parameter := get .parameters $name -}}
  {{- if $parameter -}}
    {{- if has $parameter.kind (list "uid" "drain") -}}variables.{{ $name }} != 0
    {{- else if has $parameter.kind (list "quantity" "text") -}}variables.{{ $name }} != ""
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- end -}}

{{- /* The CEL expression of .node of the container, .depth deep. */ -}}
{{- define "sluice.injection.cel" -}}
{{- $inside := repeat (add1 .depth | int) "  " -}}
{{- $outside := repeat (int .depth) "  " -}}
{{- if kindIs "map" .node -}}
{
  {{- range $key, $node := .node }}
  {{- $when := include "sluice.injection.when" (dict "node" $node "parameters" $.parameters) }}
  {{- $value := include "sluice.injection.cel" (dict "node" $node "parameters" $.parameters "depth" (add1 $.depth)) }}
{{ $inside }}{{ if $when }}?{{ end }}{{ toJson $key }}: {{ if $when }}({{ $when }}) ? optional.of(dyn({{ $value }})) : optional.none(){{ else }}dyn({{ $value }}){{ end }},
  {{- end }}
{{ $outside }}}
{{- else if kindIs "slice" .node -}}
[
  {{- range $node := .node }}
  {{- $value := include "sluice.injection.cel" (dict "node" $node "parameters" $.parameters "depth" (add1 $.depth)) }}
{{ $inside }}{{ $value }},
  {{- end }}
{{ $outside }}]
{{- else if and (kindIs "string" .node) (hasPrefix "$" .node) -}}
variables.{{ trimPrefix "$" .node }}
{{- else if kindIs "string" .node -}}
{{ include "sluice.injection.text" .node }}
{{- else -}}
{{ .node }}
{{- end -}}
{{- end -}}

{{- /* The two ways to be meant; a pod is meant in at most one of them. */ -}}
{{- define "sluice.injection.bindings" }}
---
apiVersion: {{ .apiVersion }}
kind: {{ .kind }}
metadata:
  name: {{ .policy }}-by-namespace
  labels: {{- .labels | nindent 4 }}
spec:
  policyName: {{ .policy }}
  {{- with .actions }}
  validationActions: {{ toJson . }}
  {{- end }}
  matchResources:
    namespaceSelector:
      matchLabels: {sluice.dev/inject: enabled}
      matchExpressions:
      - {key: kubernetes.io/metadata.name, operator: NotIn, values: {{ toJson .excluded }}}
    objectSelector:
      matchExpressions:
      - {key: sluice.dev/inject, operator: NotIn, values: [enabled, disabled]}
---
apiVersion: {{ .apiVersion }}
kind: {{ .kind }}
metadata:
  name: {{ .policy }}-by-pod
  labels: {{- .labels | nindent 4 }}
spec:
  policyName: {{ .policy }}
  {{- with .actions }}
  validationActions: {{ toJson . }}
  {{- end }}
  matchResources:
    namespaceSelector:
      matchExpressions:
      - {key: kubernetes.io/metadata.name, operator: NotIn, values: {{ toJson .excluded }}}
    objectSelector:
      matchLabels: {sluice.dev/inject: enabled}
{{- end -}}

{{- /* Pods that have no network of their own or cannot run the sidecar. */ -}}
{{- define "sluice.injection.conditions" }}
  - name: own-network
    expression: "!object.spec.?hostNetwork.orValue(false)"
  - name: linux
    expression: >-
      object.spec.?os.name.orValue("linux") == "linux" &&
      object.spec.?nodeSelector[?"kubernetes.io/os"].orValue("linux") == "linux"
{{- end }}
