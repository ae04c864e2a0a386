{{/* Names are cut so that what is added to them still fits into 63 characters. */}}
{{- define "cptjob-operator.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "cptjob-operator.fullname" -}}
{{- $name := include "cptjob-operator.name" . }}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride }}
{{- else if contains $name .Release.Name }}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{/* Objects without a namespace: two releases of one name may be in two namespaces. */}}
{{- define "cptjob-operator.clusterName" -}}
{{- printf "%s-%s" .Release.Namespace (include "cptjob-operator.fullname" .) }}
{{- end }}

{{- define "cptjob-operator.serviceAccount" -}}
{{- default (include "cptjob-operator.fullname" .) .Values.serviceAccount.name }}
{{- end }}

{{- define "cptjob-operator.selector" -}}
app.kubernetes.io/name: {{ include "cptjob-operator.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "cptjob-operator.labels" -}}
{{ include "cptjob-operator.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/component: operator
app.kubernetes.io/part-of: cptjob
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Reference of an image: (list IMAGE APP-VERSION). */}}
{{- define "cptjob-operator.image" -}}
{{- $image := index . 0 }}
{{- if $image.digest }}
{{- printf "%s@%s" $image.repository $image.digest }}
{{- else }}
{{- printf "%s:%s" $image.repository (default (index . 1) $image.tag) }}
{{- end }}
{{- end }}

{{/* What the operator reads: what the chart knows better than a default, under what is given. */}}
{{- define "cptjob-operator.settings" -}}
{{- $known := dict
      "jobs" (dict "image" (include "cptjob-operator.image" (list .Values.trainerImage .Chart.AppVersion)))
      "leader" (dict "name" (include "cptjob-operator.fullname" .))
      "network" (dict
        "operatorNamespace" .Release.Namespace
        "operatorLabels" (include "cptjob-operator.selector" . | fromYaml)
        "monitoringNamespace" "monitoring")
      "serving" (dict "metricsPort" 9400 "probePort" 9401) }}
{{- toYaml (mergeOverwrite $known (deepCopy .Values.settings)) }}
{{- end }}
