"""Checks of `serving.runner=gke`: what it serves, and where. Imports no JAX."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import PurePosixPath

from gemma4_tpu.config.serving import ServingConfig
from gemma4_tpu.hardware import LOCAL, SLICES

GKE = "gke"
_LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_NAMES = {
    "namespace": (_LABEL, "up to 63 lower-case letters, digits and dashes"),
    "service_account": (rf"(?=.{{1,253}}$){_LABEL}(\.{_LABEL})*", "lower-case letters, digits, dashes and dots"),
    "secret": (rf"(?=.{{1,253}}$){_LABEL}(\.{_LABEL})*", "lower-case letters, digits, dashes and dots"),
}
"""Key → the form of such a name in Kubernetes, and that in words."""


def in_a_pod(serving: ServingConfig, run: str) -> ServingConfig:
    """The configuration inside a pod: open to the Service, and named after the folder (`merged` after its run)."""
    place = PurePosixPath(run)
    named = place.parent.name if place.name == "merged" else place.name
    host = "0.0.0.0" if serving.host == ServingConfig().host else serving.host
    return replace(serving, host=host, served_model_name=serving.served_model_name or named)


def gke_problems(serving: ServingConfig, adapters: list[str]) -> list[str]:
    """Problems with pods of this kind."""
    gke, messages = serving.gke, []
    slice_ = SLICES.get(serving.slice)
    if serving.slice == LOCAL or (slice_ is not None and slice_.chip.gke_accelerator is None):
        messages.append(f"serving.slice={serving.slice}: serving.runner=gke needs a TPU slice, such as v6e-8")
    if adapters:
        messages.append("adapters: serving.runner=gke serves one merged folder; leave them out")
    if serving.drafter:
        messages.append("serving.drafter: serving.runner=gke mounts one folder; leave it out")
    if gke.min_replicas > gke.max_replicas:
        messages.append(f"serving.gke.min_replicas={gke.min_replicas}: more than max_replicas={gke.max_replicas}")
    messages += [
        f"serving.gke.{key}={name}: in Kubernetes such a name consists of {words}, and begins and ends with a letter or"
        " digit"
        for key, (form, words) in _NAMES.items()
        if (name := getattr(gke, key)) is not None and not re.fullmatch(form, name)
    ]
    if "$(" in json.dumps([serving.flags, serving.extra_args, serving.env, serving.served_model_name], default=str):
        messages.append("serving: Kubernetes replaces $(…) in flags, extra_args and env; leave it out")
    return messages
