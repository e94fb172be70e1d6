"""Checks of a launch before anything is submitted: those of training, and its place and settings. Imports no JAX."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from typing import TypeVar, cast

from gemma4_tpu.config.refusals import Refusal
from gemma4_tpu.config.schema import TrainRoot
from gemma4_tpu.hardware import SLICES, option_name, slice_of
from gemma4_tpu.launch.after import after_problems
from gemma4_tpu.launch.parcel import CHECKOUT, called
from gemma4_tpu.launch.schema import GkeRoot, TpuVmRoot
from gemma4_tpu.training.checks import Checked, examine_train, normalise

PROJECT, ZONE = "CLOUDSDK_CORE_PROJECT", "CLOUDSDK_COMPUTE_ZONE"
"""Environment variables of the Google Cloud CLI."""
_BUCKET = r"gs://[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]"
_NOT_FILES = ("embedded:", "random:", "hf:")
Root = TypeVar("Root", TpuVmRoot, GkeRoot)


def normalise_launch(root: Root) -> Root:
    """As for train; takes project and zone from the environment, removes the slash at the end of addresses."""
    root = cast(Root, normalise(root))
    place = root.launch
    return replace(
        root,
        run_dir=root.run_dir.rstrip("/") if root.run_dir else None,
        launch=replace(
            place,
            project=place.project or os.environ.get(PROJECT),
            zone=place.zone or os.environ.get(ZONE),
            bucket=place.bucket.rstrip("/") if place.bucket else None,
        ),
    )


def examine_tpu_vm(root: TpuVmRoot) -> tuple[Checked | None, list[Refusal]]:
    """Checks everything that can be known without contacting Google; returns the findings, or the problems."""
    launch = root.launch
    messages = _place(root)
    if launch.queue_for is not None and not re.fullmatch(r"\d+[smhd]", launch.queue_for):
        messages.append(f"launch.queue_for={launch.queue_for}: give a number and s, m, h or d, such as 6h")
    if launch.max_hours is not None and not launch.max_hours > 0:
        messages.append(f"launch.max_hours={launch.max_hours}: give more than 0, or null for no limit")
    for key in ("restarts", "recreations"):
        if getattr(launch, key) < 0:
            messages.append(f"launch.{key}={getattr(launch, key)}: give a number of at least 0")
    if not launch.poll_seconds > 0:
        messages.append(f"launch.poll_seconds={launch.poll_seconds}: give more than 0")
    if launch.git is not None and not re.fullmatch(r"\S+@[\w./-]+", launch.git):
        messages.append(f"launch.git={launch.git}: give <URL>@<branch, tag or commit>")
    for name, secret in launch.secrets.items():
        if not re.fullmatch(r"[A-Z][A-Z0-9_]*", name) or not re.fullmatch(r"[\w-]+", str(secret)):
            messages.append(
                f"launch.secrets: {name}: give environment variables with the names of secrets in Secret Manager (never"
                " the secrets themselves), such as secrets={WANDB_API_KEY: wandb-key}"
            )
    if launch.model_in_memory and not (root.model.path or "").startswith("gs://"):
        messages.append(f"launch.model_in_memory=true: model.path={root.model.path} is not on gs://; copy it there")
    messages += [f"launch.create_flags: {flag}: give --name=value" for flag in launch.create_flags if flag[:2] != "--"]
    slice_ = slice_of(root.hardware)
    if slice_ is not None and slice_.topology and slice_.runtime_version is None:
        messages.append(
            f"hardware={option_name(slice_.name)}: {slice_.chip.name} is not available as a TPU VM; use {called('gke')}"
        )
    if launch.git is None and CHECKOUT is None:
        messages.append(
            "launch.git is not set: the package is installed without a checkout to upload; set"
            " git=<URL>@<branch, tag or commit>"
        )
    messages += after_problems(
        launch.after, root.model.name, hosts=slice_.hosts if slice_ else 1, slice_name=root.hardware.name
    )
    return _with_train(root, messages)


def examine_gke(root: GkeRoot) -> tuple[Checked | None, list[Refusal]]:
    """Checks everything that can be known without running xpk; returns the findings, or the problems."""
    launch = root.launch
    messages = _place(root)
    if not launch.cluster:
        messages.append("launch.cluster is not set; set cluster=<name>, created by xpk cluster create")
    if not launch.image:
        messages.append("launch.image is not set; build launch/Dockerfile, push it, and set image=<registry>/<name>")
    if launch.restarts < 0:
        messages.append(f"launch.restarts={launch.restarts}: give a number of at least 0")
    priorities = ("very-low", "low", "medium", "high", "very-high")
    if launch.priority not in priorities:
        messages.append(f"launch.priority={launch.priority}: give one of {', '.join(priorities)}")
    return _with_train(root, messages)


def _with_train(root: TpuVmRoot | GkeRoot, messages: list[str]) -> tuple[Checked | None, list[Refusal]]:
    checked, problems = examine_train(root)
    found = [*problems, *(Refusal(message) for message in messages)]
    return (None if found else checked), found


def _place(root: TpuVmRoot | GkeRoot) -> list[str]:
    """Problems with slice, project, zone and run folder, and files that the slice would not find."""
    messages = []
    slice_ = slice_of(root.hardware)
    if slice_ is None or slice_.topology is None:
        tpus = ", ".join(option_name(name) for name, s in SLICES.items() if s.topology)
        messages.append(f"hardware.name={root.hardware.name}: not a TPU slice; set hardware=<one of {tpus}>")
    if root.hardware.flex_start:
        messages.append(
            "hardware.flex_start=true: for costs only; the launchers request capacity on demand, or spot with spot=true"
            "; leave it out"
        )
    if not root.launch.project or not re.fullmatch(r"[a-z][a-z0-9:.-]*", root.launch.project):
        messages.append(f"launch.project={root.launch.project or 'null'}: give project=<project id>, or set {PROJECT}")
    if not root.launch.zone or not re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z]", root.launch.zone):
        messages.append(f"launch.zone={root.launch.zone or 'null'}: give zone=<zone>, like us-east5-a, or set {ZONE}")
    if root.launch.bucket is not None and not re.fullmatch(rf"{_BUCKET}(/[\w./=+-]+)?", root.launch.bucket):
        messages.append(f"launch.bucket={root.launch.bucket}: give gs://<bucket> or gs://<bucket>/<folder>")
    if root.run_dir is None and root.launch.bucket is None:
        messages.append("launch.bucket is not set; set bucket=gs://<bucket> for run folders, or run_dir=gs://…")
    if root.run_dir is not None and not re.fullmatch(rf"{_BUCKET}/[\w./=+-]+", root.run_dir):
        given = f"run_dir={root.run_dir}"
        messages.append(f"{given}: a slice's disk is deleted with it; give gs://<bucket>/<folder>")
    if root.preview:
        messages.append("preview=true: needs no slice; run python -m gemma4_tpu.train preview=true here")
    return messages + _local_files(root)


def _local_files(root: TrainRoot) -> list[str]:
    sources = {
        f"data.{kind}.{i}.path": source.path
        for kind in ("train", "heldout")
        for i, source in enumerate(getattr(root.data, kind))
    }
    named = {"model.path": root.model.path, "model.tokenizer": root.model.tokenizer, "replay": root.replay, **sources}
    return [
        f"{key}={path}: on this machine, not on the slice; gcloud storage cp -r it to a bucket and give gs://…"
        for key, path in named.items()
        if path and "://" not in path and not path.startswith(_NOT_FILES)
    ]
