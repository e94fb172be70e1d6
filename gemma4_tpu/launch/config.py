"""What the launchers take: all that train takes, where and how it is to run. Checked before anything is submitted."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

from gemma4_tpu.config.entry import EntryPoint
from gemma4_tpu.config.problems import Problem
from gemma4_tpu.config.schema import ModelConfig, TrainRoot
from gemma4_tpu.errors import UserError
from gemma4_tpu.hardware import SLICES, option_name, slice_of
from gemma4_tpu.launch.after import after_problems
from gemma4_tpu.launch.source import CHECKOUT, called
from gemma4_tpu.training.checks import Checked, examine_train, normalise

PROJECT, ZONE = "CLOUDSDK_CORE_PROJECT", "CLOUDSDK_COMPUTE_ZONE"
"""Environment variables of the Google Cloud CLI."""
_BUCKET = r"gs://[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]"
_NOT_FILES = ("embedded:", "random:", "hf:")


@dataclass(kw_only=True)
class PlaceConfig:
    """Where a run goes, whatever carries it (`launch.`)."""

    project: str | None = None
    """Google Cloud project; null: CLOUDSDK_CORE_PROJECT. `project=` for short."""
    zone: str | None = None
    """Zone with such slices, as us-east5-a; null: CLOUDSDK_COMPUTE_ZONE. `zone=` for short."""
    bucket: str | None = None
    """gs://<bucket>[/<folder>] for new run folders (`<bucket>/<name>/<date>_<time>`), in the zone's region; not needed
    with `run_dir=gs://…`. `bucket=` for short."""
    dry_run: bool = False
    """Show the commands and the rendered files; submit nothing. `dry_run=` for short."""


@dataclass(kw_only=True)
class TpuVmConfig(PlaceConfig):
    """Where and how the run goes onto TPU VMs (`launch.`)."""

    queue_for: str | None = None
    """Wait in the queue for at most so long, as 6h; null: until there is capacity. Waiting costs nothing.
    `queue_for=` for short."""
    max_hours: float | None = 24.0
    """A slice that has been up for so long saves and deletes itself, whatever happens; null: never. `max_hours=` for
    short."""
    restarts: int = 3
    """Starts of the training again on the same slice after a crash or a hang (exit code 42: any number)."""
    recreations: int = 20
    """New slices after a preemption, while this command (or `watch`) runs."""
    git: str | None = None
    """`<URL>@<branch, tag or commit>` to run; null: this checkout as it stands, uncommitted changes included.
    `git=` for short."""
    model_in_memory: bool = False
    """Copy the checkpoint to each host's RAM disk first; false: read it from gs:// while it is loaded."""
    secrets: dict[str, Any] = field(default_factory=dict)
    """Environment variable → name of its secret in Secret Manager, as {WANDB_API_KEY: wandb-key}; the slice reads it.
    `secrets=` for short."""
    after: list[str] = field(default_factory=list)
    """What the first host does when the training is finished, before the slice is deleted: `merge …`, `evaluate …` (on
    the merged model), with further settings of those. `after=` for short."""
    keep: bool = False
    """Leave the slice running (and costing) after the end. `keep=` for short."""
    watch: bool = True
    """Stay and follow the run: report states, ask for a new slice after a preemption. `watch=` for short."""
    poll_seconds: float = 30.0
    """Time between two looks at the state."""
    create_flags: list[str] = field(default_factory=list)
    """Further flags for `gcloud compute tpus queued-resources create`, as --network=… or --reserved."""


@dataclass(kw_only=True)
class GkeConfig(PlaceConfig):
    """Where and how the run goes onto a GKE cluster (`launch.`)."""

    cluster: str | None = None
    """Cluster made by `xpk cluster create`. `cluster=` for short."""
    image: str | None = None
    """Container image made from `launch/Dockerfile`, in a registry that the cluster can read. `image=` for short."""
    restarts: int = 50
    """Starts of the whole job again: after preemptions (42, 127-255), crashes (1) and hangs (3) alike."""
    priority: str = "medium"
    """Kueue's priority: very-low, low, medium, high, very-high."""


@dataclass(kw_only=True)
class TpuVmRoot(TrainRoot):
    """Everything `launch tpu_vm` takes."""

    launch: TpuVmConfig = field(default_factory=TpuVmConfig)


@dataclass(kw_only=True)
class GkeRoot(TrainRoot):
    """Everything `launch gke` takes."""

    launch: GkeConfig = field(default_factory=GkeConfig)


Root = TypeVar("Root", TpuVmRoot, GkeRoot)


class LaunchEntry(EntryPoint):
    """`gemma4-tpu launch <name>`."""

    @property
    def command(self) -> str:
        return called(self.name)

    @property
    def module(self) -> str:
        return f"gemma4_tpu.launch.{self.name}"


def _normalise(root: Root) -> Root:
    """As for train; project and zone from the environment, no slash at the end of addresses."""
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


def _examine_tpu_vm(root: TpuVmRoot) -> tuple[Checked | None, list[Problem]]:
    launch = root.launch
    messages = _place(root)
    if launch.queue_for is not None and not re.fullmatch(r"\d+[smhd]", launch.queue_for):
        messages.append(f"launch.queue_for={launch.queue_for}: give a number and s, m, h or d, as 6h")
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
                f"launch.secrets: {name} is to be an environment variable, and its value the name of a secret in Secret"
                " Manager (never the secret itself): secrets={WANDB_API_KEY: wandb-key}"
            )
    if launch.model_in_memory and not (root.model.path or "").startswith("gs://"):
        messages.append(f"launch.model_in_memory=true: model.path={root.model.path} is not on gs://")
    messages += [f"launch.create_flags: {flag}: give --name=value" for flag in launch.create_flags if flag[:2] != "--"]
    slice_ = slice_of(root.hardware)
    if slice_ is not None and slice_.topology and slice_.runtime_version is None:
        messages.append(
            f"hardware={option_name(slice_.name)}: {slice_.chip.name} is not offered as a TPU VM; "
            f"{called('gke')} takes it"
        )
    if launch.git is None and CHECKOUT is None:
        messages.append(
            "launch.git: which sources? the package is installed here without a checkout that could be uploaded; give"
            " git=<URL>@<branch, tag or commit>"
        )
    messages += after_problems(launch.after, root.model.name, hosts=slice_.hosts if slice_ else 1)
    return _with_train(root, messages)


def _examine_gke(root: GkeRoot) -> tuple[Checked | None, list[Problem]]:
    launch = root.launch
    messages = _place(root)
    if not launch.cluster:
        messages.append("launch.cluster: which cluster? give cluster=<name>, made by xpk cluster create")
    if not launch.image:
        messages.append("launch.image: which image? build launch/Dockerfile, push it, and give image=<registry>/<name>")
    if launch.restarts < 0:
        messages.append(f"launch.restarts={launch.restarts}: give a number of at least 0")
    priorities = ("very-low", "low", "medium", "high", "very-high")
    if launch.priority not in priorities:
        messages.append(f"launch.priority={launch.priority}: give one of {', '.join(priorities)}")
    return _with_train(root, messages)


def _with_train(root: TpuVmRoot | GkeRoot, messages: list[str]) -> tuple[Checked | None, list[Problem]]:
    checked, problems = examine_train(root)
    found = [*problems, *(Problem(message) for message in messages)]
    return (None if found else checked), found


def _place(root: TpuVmRoot | GkeRoot) -> list[str]:
    """Slice, project, zone, run folder; files that the slice would not find."""
    messages = []
    slice_ = slice_of(root.hardware)
    if slice_ is None or slice_.topology is None:
        tpus = ", ".join(option_name(name) for name, s in SLICES.items() if s.topology)
        messages.append(f"hardware.name={root.hardware.name}: which TPU slice? give hardware=<one of {tpus}>")
    if root.hardware.flex_start:
        messages.append(
            "hardware.flex_start=true: counts costs only; the launchers ask for capacity on demand or, with spot=true, "
            "for spot"
        )
    if not root.launch.project or not re.fullmatch(r"[a-z][a-z0-9:.-]*", root.launch.project):
        messages.append(f"launch.project={root.launch.project or 'null'}: give project=<project id>, or set {PROJECT}")
    if not root.launch.zone or not re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z]", root.launch.zone):
        messages.append(f"launch.zone={root.launch.zone or 'null'}: give zone=<zone>, as us-east5-a, or set {ZONE}")
    if root.launch.bucket is not None and not re.fullmatch(rf"{_BUCKET}(/[\w./=+-]+)?", root.launch.bucket):
        messages.append(f"launch.bucket={root.launch.bucket}: give gs://<bucket> or gs://<bucket>/<folder>")
    if root.run_dir is None and root.launch.bucket is None:
        messages.append("launch.bucket: where does the run folder go? give bucket=gs://<bucket>, or run_dir=gs://…")
    if root.run_dir is not None and not re.fullmatch(rf"{_BUCKET}/[\w./=+-]+", root.run_dir):
        given = f"run_dir={root.run_dir}"
        messages.append(f"{given}: a slice that is deleted takes its disk with it; give gs://<bucket>/<folder>")
    if root.preview:
        messages.append(
            "preview=true: looks at rows, for which no slice is needed: python -m gemma4_tpu.train preview=true"
        )
    return messages + _local_files(root)


def _local_files(root: TrainRoot) -> list[str]:
    sources = {
        f"data.{kind}.{i}.path": source.path
        for kind in ("train", "heldout")
        for i, source in enumerate(getattr(root.data, kind))
    }
    named = {"model.path": root.model.path, "model.tokenizer": root.model.tokenizer, "replay": root.replay, **sources}
    return [
        f"{key}={path}: lies on this machine, not on the slice; gcloud storage cp -r it to a bucket and give gs://…"
        for key, path in named.items()
        if path and "://" not in path and not path.startswith(_NOT_FILES)
    ]


def look_at_checkpoint(model: ModelConfig) -> list[str]:
    """What is worth knowing about the checkpoint, as far as it can be reached from this machine.

    Raises:
      UserError: training would refuse it, on a slice that costs money by then.
    """
    from gemma4_tpu.models.audit import look_from_afar

    found = look_from_afar(model)
    if found.problems:
        raise UserError("training would refuse the checkpoint:\n" + "\n".join(found.problems))
    return found.notes


def _short(*keys: str) -> dict[str, str]:
    common = ("project", "zone", "bucket", "dry_run")
    return {"spot": "hardware.spot", **{key: f"launch.{key}" for key in (*common, *keys)}}


TPU_VM: EntryPoint[TpuVmRoot, Checked] = LaunchEntry(
    name="tpu_vm",
    schema=TpuVmRoot,
    normalise=_normalise,
    examine=_examine_tpu_vm,
    summary=(
        "Train on a Cloud TPU slice: asks for it (queued resources), installs, trains there as python -m"
        " gemma4_tpu.train would with the same words, goes on after preemptions, uploads, deletes the slice."
    ),
    examples=(
        (
            "experiment=v5p8 model.path=gs://bucket/gemma-4-31b bucket=gs://bucket project=p zone=us-east5-a"
            " dry_run=true",
            "show what would be done",
        ),
        ("experiment=v5p8 model.path=gs://… bucket=gs://… spot=true after=[merge]", "spot capacity, merged at the end"),
        ("experiment=v5p8 model.path=gs://… run_dir=gs://bucket/v5p8/<run>", "go on with a run"),
        ("list", "what runs or waits, and what it costs"),
        ("watch <id>", "follow a run again, and go on after preemptions"),
        ("delete <id>", "delete a slice and its place in the queue"),
    ),
    shorthands=_short("queue_for", "max_hours", "git", "secrets", "after", "keep", "watch"),
)

GKE: EntryPoint[GkeRoot, Checked] = LaunchEntry(
    name="gke",
    schema=GkeRoot,
    normalise=_normalise,
    examine=_examine_gke,
    summary="Train on a GKE cluster made by xpk: a JobSet that waits in Kueue's queue and restarts after preemptions.",
    examples=(
        (
            "experiment=v5p8 model.path=gs://bucket/gemma-4-31b bucket=gs://bucket project=p zone=us-east5-a"
            " cluster=c image=us-docker.pkg.dev/p/r/gemma4-tpu:1 dry_run=true",
            "show the command and the JobSet",
        ),
    ),
    shorthands=_short("cluster", "image"),
)
