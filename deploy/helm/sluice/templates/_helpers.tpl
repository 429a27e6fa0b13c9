{{- /* The name of all that belongs to the agent. */ -}}
{{- define "sluice.agent" -}}{{ .Release.Name }}-agent{{- end -}}

{{- /* By what the agent's pods are known; never changes. */ -}}
{{- define "sluice.selector" -}}
app.kubernetes.io/name: sluice
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: agent
{{- end -}}

{{- /* Labels of every object. */ -}}
{{- define "sluice.labels" -}}
app.kubernetes.io/name: sluice
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: sluice
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end -}}

{{- define "sluice.image" -}}
{{- .Values.image.repository -}}
{{- if .Values.image.digest -}}@{{ .Values.image.digest }}{{- else -}}:{{ .Values.image.tag | default .Chart.AppVersion }}{{- end -}}
{{- end -}}

{{- /* The namespaces that are left alone, as a JSON list. */ -}}
{{- define "sluice.excludedNamespaces" -}}
{{- concat (list "kube-system" .Release.Namespace) .Values.excludeNamespaces | uniq | sortAlpha | toJson -}}
{{- end -}}

{{- /* "true" if the policy for the agents' status patches is wanted. */ -}}
{{- define "sluice.statusPolicy" -}}
{{- $wanted := toString .Values.statusPolicy -}}
{{- if or (eq $wanted "true") (and (eq $wanted "auto") (.Capabilities.APIVersions.Has "admissionregistration.k8s.io/v1")) -}}true{{- end -}}
{{- end -}}

{{- /* Refuses what would be installed and then not run. */ -}}
{{- define "sluice.checkNamespace" -}}
{{- $namespace := lookup "v1" "Namespace" "" .Release.Namespace | default dict -}}
{{- $level := dig "metadata" "labels" "pod-security.kubernetes.io/enforce" "" $namespace -}}
{{- if and $level (ne $level "privileged") -}}
{{- fail (printf "namespace %s: its label pod-security.kubernetes.io/enforce=%s forbids the agent's pods (host network, host paths). Run: kubectl label --overwrite namespace %s pod-security.kubernetes.io/enforce=privileged" .Release.Namespace $level .Release.Namespace) -}}
{{- end -}}
{{- end -}}
