{{/*
Values that do not go together: what the operator would refuse at its start, as in settings.py, and
what would be installed and not work. A default here is that of the operator; a test compares both.
*/}}
{{- define "cptjob-operator.faults" -}}
{{- $settings := .Values.settings }}
{{- $jobs := default dict $settings.jobs }}
{{- $pools := default (dict "default" dict) $settings.pools }}
{{- with $jobs.pool }}
{{- if not (hasKey $pools .) }}
settings.jobs.pool: there is no pool {{ . }}; pools: {{ keys $pools | sortAlpha | join ", " }}
{{- end }}
{{- end }}
{{- range $name, $pool := $pools }}
{{- range $index, $each := $pool.tolerations }}
{{- if and $each.value (eq (default "Exists" $each.operator) "Exists") }}
settings.pools.{{ $name }}.tolerations[{{ $index }}].value: goes with operator: Equal; set it or leave it out
{{- end }}
{{- end }}
{{- with $pool.security }}
{{- if and .profile (ne .profile "restricted") (not .namespaces) }}
settings.pools.{{ $name }}.security.namespaces: name those whose jobs get {{ .profile }}; without any, none does
{{- end }}
{{- end }}
{{- end }}
{{- with $settings.leader }}
{{- if gt (mulf 2 (default 5 .renewSeconds)) (float64 (default 15 .leaseSeconds)) }}
settings.leader.renewSeconds: must be at most half of leaseSeconds
{{- end }}
{{- end }}
{{- with (default dict $settings.timing).backoff }}
{{- if lt (float64 (default 600 .capSeconds)) (float64 (default 10 .baseSeconds)) }}
settings.timing.backoff.capSeconds: must be at least baseSeconds
{{- end }}
{{- end }}
{{- if and (not .Values.serviceAccount.create) (not .Values.serviceAccount.name) }}
serviceAccount.name: name the account that is there, or set serviceAccount.create
{{- end }}
{{- with .Values.metrics }}
{{- if and .serviceMonitor.enabled .podMonitor.enabled }}
metrics: serviceMonitor and podMonitor would read the same figures twice; enable one of them
{{- end }}
{{- if and .serviceMonitor.enabled (not .service.enabled) }}
metrics.serviceMonitor: needs metrics.service.enabled; set it, or use metrics.podMonitor
{{- end }}
{{- if and .rules.enabled (not (or .serviceMonitor.enabled .podMonitor.enabled)) }}
metrics.rules: ask for figures that nobody reads; set metrics.serviceMonitor.enabled or metrics.podMonitor.enabled
{{- end }}
{{- end }}
{{- end }}
