{{- define "spegel.cleanup.selectorLabels" -}}
app.kubernetes.io/component: cleanup
{{ include "spegel.selectorLabels" . }}
{{- end }}

{{/* The pods of a Job carry its name as a label, which has 63 characters at most. */}}
{{- define "spegel.cleanup.job" -}}
{{- include "spegel.fullname" . | trunc 50 | trimSuffix "-" -}}-cleanup-wait
{{- end }}

{{- define "spegel.cleanup.hook" -}}
helm.sh/hook: post-delete
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end }}

{{/* What is put on every node after an uninstall, and again by hand for nodes that were down. */}}
{{- define "spegel.cleanup.spec" -}}
selector:
  matchLabels:
    {{- include "spegel.cleanup.selectorLabels" . | nindent 4 }}
# All nodes at once: each waits for no other.
updateStrategy:
  rollingUpdate:
    maxUnavailable: 100%
template:
  metadata:
    labels:
      {{- include "spegel.cleanup.selectorLabels" . | nindent 6 }}
      {{- with .Values.commonLabels }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
  spec:
    automountServiceAccountToken: false
    enableServiceLinks: false
    terminationGracePeriodSeconds: 5
    {{- include "spegel.placement" . | nindent 4 }}
    nodeSelector:
      {{- toYaml (merge (dict "kubernetes.io/os" "linux") (.Values.nodeSelector | default dict)) | nindent 6 }}
    containers:
      - name: cleanup
        image: {{ include "spegel.image" . | quote }}
        imagePullPolicy: {{ .Values.image.pullPolicy }}
        securityContext:
          {{- include "spegel.securityContextOfEditors" . | nindent 10 }}
        args:
          - cleanup
          - --log-level={{ .Values.spegel.logLevel }}
          - --addr=:{{ .Values.service.cleanup.port }}
          - --containerd-registry-config-path={{ .Values.spegel.containerdRegistryConfigPath }}
          {{- if .Values.spegel.persistence.enabled }}
          - --data-dir={{ .Values.spegel.persistence.path }}
          {{- end }}
        ports:
          - name: readiness
            containerPort: {{ .Values.service.cleanup.port }}
            protocol: TCP
        readinessProbe:
          httpGet:
            path: /readyz
            port: readiness
          periodSeconds: 2
          timeoutSeconds: 3
        resources:
          {{- toYaml .Values.resources | nindent 10 }}
        volumeMounts:
          - name: containerd-config
            mountPath: {{ .Values.spegel.containerdRegistryConfigPath }}
          {{- if .Values.spegel.persistence.enabled }}
          - name: data
            mountPath: {{ .Values.spegel.persistence.path }}
          {{- end }}
    volumes:
      - name: containerd-config
        hostPath:
          path: {{ .Values.spegel.containerdRegistryConfigPath }}
          type: DirectoryOrCreate
      {{- if .Values.spegel.persistence.enabled }}
      - name: data
        hostPath:
          path: {{ .Values.spegel.persistence.hostPath }}
          type: DirectoryOrCreate
      {{- end }}
{{- end }}

{{- define "spegel.cleanup.repeated" -}}
apiVersion: apps/v1
kind: DaemonSet
metadata:
  name: {{ include "spegel.fullname" . }}-cleanup
  namespace: {{ include "spegel.namespace" . }}
spec:
  {{- include "spegel.cleanup.spec" . | nindent 2 }}
{{- end }}

{{/* Without a backslash, which Helm 4 doubles when it prints a hook's log: so the annotation's name has no dot. */}}
{{- define "spegel.cleanup.repeatCommand" -}}
{{- $set := printf "%s-cleanup" (include "spegel.fullname" .) -}}
{{- $job := include "spegel.cleanup.job" . -}}
{{- $kubectl := printf "kubectl -n %s" (include "spegel.namespace" .) -}}
{{ $kubectl }} get job {{ $job }} -o jsonpath='{.metadata.annotations.spegel-cleanup}' | {{ $kubectl }} apply -f - && {{ $kubectl }} rollout status daemonset/{{ $set }} && {{ $kubectl }} delete daemonset/{{ $set }} job/{{ $job }}
{{- end }}
