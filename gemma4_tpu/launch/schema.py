"""Types of the launchers' configurations: those of train, plus where and how it runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gemma4_tpu.config.schema import TrainRoot


@dataclass(kw_only=True)
class PlaceConfig:
    """Where a run goes, with any launcher (`launch.`)."""

    project: str | None = None
    """Google Cloud project; null: CLOUDSDK_CORE_PROJECT. Short form: `project=`."""
    zone: str | None = None
    """Zone with such slices, such as us-east5-a; null: CLOUDSDK_COMPUTE_ZONE. Short form: `zone=`."""
    bucket: str | None = None
    """gs://<bucket>[/<folder>] for new run folders (`<bucket>/<name>/<date>_<time>`), in the zone's region; not needed
    with `run_dir=gs://…`. Short form: `bucket=`.
    """
    dry_run: bool = False
    """Show the commands and the rendered files; submit nothing. Short form: `dry_run=`."""


@dataclass(kw_only=True)
class TpuVmConfig(PlaceConfig):
    """Where and how a run goes onto TPU VMs (`launch.`)."""

    queue_for: str | None = None
    """Wait in the queue for at most this long, such as 6h; null: until there is capacity. Waiting costs nothing. Short
    form: `queue_for=`."""
    max_hours: float | None = 24.0
    """A slice that has been up for this long saves and deletes itself, whatever happens; null: never. Short form:
    `max_hours=`."""
    restarts: int = 3
    """Restarts of the training run on the same slice after a crash or a hang (after exit code 42: any number)."""
    recreations: int = 20
    """New slices after a preemption, while this command (or `watch`) runs."""
    git: str | None = None
    """`<URL>@<branch, tag or commit>` to run; null: this checkout as it is, including uncommitted changes. Short form:
    `git=`."""
    model_in_memory: bool = False
    """Copy the checkpoint to each host's RAM disk first; false: read it from gs:// while loading."""
    secrets: dict[str, Any] = field(default_factory=dict)
    """Environment variable → name of its secret in Secret Manager, such as {WANDB_API_KEY: wandb-key}; the slice reads
    it. Short form: `secrets=`."""
    after: list[str] = field(default_factory=list)
    """Stages that the first host runs after training, before the slice is deleted: `merge …`, `evaluate …` and
    `serve …` (the merged model, until `max_hours`), each with its own settings. Short form: `after=`."""
    keep: bool = False
    """Leave the slice running (and costing money) after the end. Short form: `keep=`."""
    watch: bool = True
    """Stay and follow the run: report its states, request a new slice after a preemption. Short form: `watch=`."""
    poll_seconds: float = 30.0
    """Seconds between two checks of the state."""
    create_flags: list[str] = field(default_factory=list)
    """Further flags for `gcloud compute tpus queued-resources create`, such as --network=… or --reserved."""


@dataclass(kw_only=True)
class GkeConfig(PlaceConfig):
    """Where and how a run goes onto a GKE cluster (`launch.`)."""

    cluster: str | None = None
    """Cluster made by `xpk cluster create`. Short form: `cluster=`."""
    image: str | None = None
    """Container image built from `launch/Dockerfile`, in a registry that the cluster can read. Short form: `image=`."""
    restarts: int = 50
    """Restarts of the whole job, whether after preemptions (42, 127-255), crashes (1) or hangs (3)."""
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
