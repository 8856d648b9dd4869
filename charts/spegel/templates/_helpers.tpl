{{/* With --reuse-values an upgrade from an older chart lacks the values that are new in this one. */}}
{{- define "spegel.checkValues" -}}
{{- range $name := list "cleanup" "grafanaDashboard" "prometheusRule" "startupTaint" "networkPolicy" "livenessProbe" -}}
{{- if not (index $.Values $name) -}}
{{- fail (printf "the value %s is missing, as in the values of an older chart: upgrade with --reset-then-reuse-values (Helm 3.14 and later) or --values instead of --reuse-values" $name) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* Whether containerd's configuration is to be taken back after an uninstall: "true" or nothing. An upgrade may have turned it off. */}}
{{- define "spegel.cleansUp" -}}
{{- if or .Values.spegel.containerdMirrorAdd .Release.IsUpgrade }}true{{ end -}}
{{- end }}

{{/* The name in labels. */}}
{{- define "spegel.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end }}

{{/* The name of all objects, cut so that with `-bootstrap` it is a service's name still (63 characters). */}}
{{- define "spegel.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 53 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 53 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 53 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "spegel.namespace" -}}
{{- default .Release.Namespace .Values.namespaceOverride -}}
{{- end }}

{{- define "spegel.serviceAccountName" -}}
{{- default (include "spegel.fullname" .) .Values.serviceAccount.name -}}
{{- end }}

{{- define "spegel.image" -}}
{{- with .Values.image -}}
{{- .repository -}}
{{- if .digest -}}@{{ .digest }}{{- else -}}:{{ default $.Chart.AppVersion .tag }}{{- end -}}
{{- end -}}
{{- end }}

{{/* What selectors hold. They cannot change during an upgrade, also not during one from the Go program's chart. */}}
{{- define "spegel.selectorLabels" -}}
app.kubernetes.io/name: {{ include "spegel.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "spegel.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "spegel.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* How a node's containerd reaches its own spegel: hostPort or nodePort. */}}
{{- define "spegel.access" -}}
{{- $access := .Values.service.registry.access -}}
{{- if ne $access "auto" -}}
{{- $access -}}
{{- else if semverCompare ">=1.34.0-0" .Capabilities.KubeVersion.Version -}}
nodePort
{{- else -}}
hostPort
{{- end -}}
{{- end }}

{{/* Flags have environment variables of their names: this one is --node-name. */}}
{{- define "spegel.nodeName" -}}
- name: NODE_NAME
  valueFrom:
    fieldRef:
      fieldPath: spec.nodeName
{{- end }}

{{/* This one is --zone. A node without a zone, or a cluster that does not copy it to pods, makes it empty, which means none. */}}
{{- define "spegel.zone" -}}
- name: ZONE
{{- if .Values.spegel.zone }}
  value: {{ .Values.spegel.zone | quote }}
{{- else }}
  valueFrom:
    fieldRef:
      fieldPath: metadata.labels['topology.kubernetes.io/zone']
{{- end }}
{{- end }}

{{/* Whether the mirror's pods ask the Kubernetes API for their node: "true" or nothing. */}}
{{- define "spegel.asksForNode" -}}
{{- if or .Values.startupTaint.enabled (include "spegel.zoneFromNode" .) }}true{{ end -}}
{{- end }}

{{- define "spegel.zoneFromNode" -}}
{{- if and .Values.spegel.zoneFromNode (not .Values.spegel.zone) }}true{{ end -}}
{{- end }}

{{/* Of objects that have no namespace. */}}
{{- define "spegel.clusterName" -}}
{{- printf "%s.%s" (include "spegel.fullname" .) (include "spegel.namespace" .) -}}
{{- end }}

{{- define "spegel.nodeIp" -}}
- name: NODE_IP
{{- if .Values.service.registry.nodeIp }}
  value: {{ .Values.service.registry.nodeIp | quote }}
{{- else }}
  valueFrom:
    fieldRef:
      fieldPath: status.hostIP
{{- end }}
{{- end }}

{{/*
The node's own addresses, from which its containerd comes through a host port. Both families where every kubelet that may belong to this API server
(three versions back) knows them; an older one would not start the pod.
*/}}
{{- define "spegel.hostIps" -}}
- name: NODE_IP
  valueFrom:
    fieldRef:
      fieldPath: {{ ternary "status.hostIPs" "status.hostIP" (semverCompare ">=1.32.0-0" .Capabilities.KubeVersion.Version) }}
{{- end }}

{{/* A container's security context. The API server refuses a privileged one that forbids itself more privileges. */}}
{{- define "spegel.securityContext" -}}
{{- $context := .Values.securityContext | default dict -}}
{{- if $context.privileged -}}
{{- $context = omit $context "allowPrivilegeEscalation" "capabilities" -}}
{{- end -}}
{{- toYaml $context -}}
{{- end }}

{{/* The same of the one that loads the kernel's programs. */}}
{{- define "spegel.securityContextOfRegistry" -}}
{{- $context := include "spegel.securityContext" . | fromYaml -}}
{{- if and .Values.spegel.ebpf.enabled (not $context.privileged) -}}
{{- $capabilities := $context.capabilities | default dict -}}
{{- $added := concat ($capabilities.add | default list) (list "BPF" "NET_ADMIN" "PERFMON") | uniq -}}
{{- $context = set $context "capabilities" (set (deepCopy $capabilities) "add" $added) -}}
{{- end -}}
{{- toYaml $context -}}
{{- end }}

{{/* The same of those that change containerd's configuration: its directories and files may be another user's. */}}
{{- define "spegel.securityContextOfEditors" -}}
{{- $context := include "spegel.securityContext" . | fromYaml -}}
{{- with $context.capabilities -}}
{{- $added := concat (.add | default list) (list "DAC_OVERRIDE" "FOWNER") | uniq -}}
{{- $context = set $context "capabilities" (set (deepCopy .) "add" $added) -}}
{{- end -}}
{{- toYaml $context -}}
{{- end }}

{{/* Where pods of every node run: the mirror's, and those that clean up after it. */}}
{{- define "spegel.placement" -}}
{{- with .Values.priorityClassName -}}
priorityClassName: {{ . }}
{{- end }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.podSecurityContext }}
securityContext:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* The seconds of a duration like 1h, 4m or 1m30s. */}}
{{- define "spegel.seconds" -}}
{{- $hours := regexFind "[0-9]+h" . | trimSuffix "h" | int -}}
{{- $minutes := regexFind "[0-9]+m" . | trimSuffix "m" | int -}}
{{- $seconds := regexFind "[0-9]+s" . | trimSuffix "s" | int -}}
{{- add (mul $hours 3600) (mul $minutes 60) $seconds -}}
{{- end }}
