"""Types of the launchers' configurations: those of train, and where and how it runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gemma4_tpu.config.schema import TrainRoot


@dataclass(kw_only=True)
class PlaceConfig:
    """Where a run goes, whatever carries it (`launch.`)."""

    project: str | None = None
    """Google Cloud project; null: CLOUDSDK_CORE_PROJECT. `project=` for short."""
    zone: str | None = None
    """Zone with such slices, as us-east5-a; null: CLOUDSDK_COMPUTE_ZONE. `zone=` for short."""
    bucket: str | None = None
    """gs://<bucket>[/<folder>] for new run folders (`<bucket>/<name>/<date>_<time>`), in the zone's region; not needed
    with `run_dir=gs://…`. `bucket=` for short.
    """
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
    """What the first host does when training is finished, before the slice is deleted: `merge …`, `evaluate …` and
    `serve …` (of the merged model; until `max_hours`), with further settings of those. `after=` for short."""
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
