{{/*
What the operator asks of the API server, one rule a resource. A test takes each away in turn.
*/}}

{{/* In each namespace with jobs. */}}
{{- define "cptjob-operator.jobRules" -}}
# TTL deletes jobs; a conflict reads one again.
- apiGroups: [training.cptjob.io]
  resources: [cptjobs]
  verbs: [get, list, watch, delete]
- apiGroups: [training.cptjob.io]
  resources: [cptjobs/status]
  verbs: [patch]
# Owner references that hold up a deletion in the foreground need this where the admission plugin
# OwnerReferencesPermissionEnforcement is on.
- apiGroups: [training.cptjob.io]
  resources: [cptjobs/finalizers]
  verbs: [update]
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch, create, delete]
# A job's configuration is made once and never changed.
- apiGroups: [""]
  resources: [configmaps]
  verbs: [get, list, create]
- apiGroups: [""]
  resources: [services]
  verbs: [get, list, create, patch]
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, list, create, patch]
# TensorBoard, for jobs that ask for it.
- apiGroups: [apps]
  resources: [deployments]
  verbs: [get, list, create, patch]
# A claim that only one node can mount is told before pods wait for it.
- apiGroups: [""]
  resources: [persistentvolumeclaims]
  verbs: [get]
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create]
{{- end }}

{{/* In the cluster. */}}
{{- define "cptjob-operator.nodeRules" -}}
- apiGroups: [""]
  resources: [nodes]
  verbs: [list, watch]
{{- end }}

{{/* In the operator's own namespace. */}}
{{- define "cptjob-operator.leaderRules" -}}
# A right to create cannot be bound to a name.
- apiGroups: [coordination.k8s.io]
  resources: [leases]
  verbs: [create]
- apiGroups: [coordination.k8s.io]
  resources: [leases]
  resourceNames: [{{ (include "cptjob-operator.settings" . | fromYaml).leader.name }}]
  verbs: [get, update]
{{- end }}
