"""vLLM on GKE: the Kubernetes objects of a served model, for `kubectl apply -f -`.

A Deployment whose pods are single-host slices, the Service in front of them, and a HorizontalPodAutoscaler driven by
the number of requests waiting in vLLM's queues, which Google's managed Prometheus scrapes (PodMonitoring) and its
custom-metrics adapter passes to Kubernetes. The merged folder stays in its bucket; Cloud Storage FUSE mounts it.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from gemma4_tpu.config.serving import ServingConfig
from gemma4_tpu.hardware import SLICES
from gemma4_tpu.serving.checks import ServeChecked
from gemma4_tpu.serving.command import CACHE_MOUNT, MODEL_MOUNT, environment, model_name, serve_words
from gemma4_tpu.serving.flag_checks import HANDED_ON

WAITING = "vllm:num_requests_waiting"
PROBE_SECONDS = 10


def manifests(serving: ServingConfig, checked: ServeChecked) -> list[dict[str, Any]]:
    """Deployment, Service, PodMonitoring and HorizontalPodAutoscaler, for `runner=gke`."""
    name, labels = object_name(model_name(serving, checked)), {"app": object_name(model_name(serving, checked))}
    about = {"name": name, "namespace": serving.gke.namespace, "labels": labels}
    deployment = {
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": about,
        "spec": {
            "replicas": serving.gke.min_replicas, "selector": {"matchLabels": labels},
            "progressDeadlineSeconds": int(serving.ready_timeout_seconds) + 600,
            "template": {
                "metadata": {"labels": labels, "annotations": {"gke-gcsfuse/volumes": "true"}},
                "spec": _pod(serving, checked),
            },
        },
    }  # fmt: skip
    service = {
        "apiVersion": "v1", "kind": "Service", "metadata": about,
        "spec": {"selector": labels, "ports": [{"name": "http", "port": serving.port, "targetPort": "http"}]},
    }  # fmt: skip
    monitoring = {
        "apiVersion": "monitoring.googleapis.com/v1", "kind": "PodMonitoring", "metadata": about,
        "spec": {
            "selector": {"matchLabels": labels},
            "endpoints": [{"port": "http", "path": "/metrics", "interval": "15s"}],
        },
    }  # fmt: skip
    waiting = {"name": f"prometheus.googleapis.com|{WAITING}|gauge"}
    target = {"type": "AverageValue", "averageValue": str(serving.gke.waiting_requests)}
    autoscaler = {
        "apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": about,
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": name},
            "minReplicas": serving.gke.min_replicas, "maxReplicas": serving.gke.max_replicas,
            "metrics": [{"type": "Pods", "pods": {"metric": waiting, "target": target}}],
            # A new slice compiles for minutes, so a brief lull must not remove it.
            "behavior": {"scaleDown": {"stabilizationWindowSeconds": 3600}},
        },
    }  # fmt: skip
    return [deployment, service, monitoring, autoscaler]


def rendered(serving: ServingConfig, checked: ServeChecked) -> str:
    """The objects as YAML documents."""
    return yaml.safe_dump_all(manifests(serving, checked), sort_keys=False, width=120)


def object_name(model: str) -> str:
    """A model's name in Kubernetes' syntax."""
    return re.sub(r"[^a-z0-9]+", "-", f"vllm-{model}".lower()).strip("-")[:63].strip("-")


def _pod(serving: ServingConfig, checked: ServeChecked) -> dict[str, Any]:
    slice_ = SLICES[serving.slice]
    bucket, _, path = (checked.bucket or "").removeprefix("gs://").partition("/")
    chips = {"google.com/tpu": str(slice_.chips)}
    health: dict[str, Any] = {
        "httpGet": {"path": "/health", "port": "http"},
        "periodSeconds": PROBE_SECONDS,
        "timeoutSeconds": 5,
    }
    named = environment(serving, checked, CACHE_MOUNT)
    variables: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in named.items()]
    if secret := serving.gke.secret:
        variables += [
            {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": name, "optional": True}}}
            for name in HANDED_ON
        ]
    container = {
        "name": "vllm", "image": serving.image, "command": ["vllm"],
        "args": serve_words(serving, checked, MODEL_MOUNT),
        "env": variables, "ports": [{"name": "http", "containerPort": serving.port}],
        "resources": {"requests": chips, "limits": chips},
        "startupProbe": health | {"failureThreshold": int(serving.ready_timeout_seconds) // PROBE_SECONDS + 1},
        "readinessProbe": health | {"failureThreshold": 3},
        "livenessProbe": health | {"failureThreshold": 12},
        "volumeMounts": [
            {"name": "model", "mountPath": MODEL_MOUNT, "readOnly": True},
            {"name": "cache", "mountPath": CACHE_MOUNT},
            {"name": "memory", "mountPath": "/dev/shm"},
        ],
    }  # fmt: skip
    fuse = {"bucketName": bucket, "mountOptions": f"implicit-dirs,only-dir:{path}"}
    return {
        **({"serviceAccountName": serving.gke.service_account} if serving.gke.service_account else {}),
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": slice_.chip.gke_accelerator,
            "cloud.google.com/gke-tpu-topology": str(slice_.topology).partition(":")[2],
        },
        "containers": [container],
        "volumes": [
            {"name": "model", "csi": {"driver": "gcsfuse.csi.storage.gke.io", "readOnly": True,
                                      "volumeAttributes": fuse}},
            {"name": "cache", "emptyDir": {}},
            {"name": "memory", "emptyDir": {"medium": "Memory", "sizeLimit": f"{serving.shm_size_gib}Gi"}},
        ],
    }  # fmt: skip
