"""Types of what a run runs on: slice, processes, device mesh. Base layer, as `schema.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True)
class HardwareConfig:
    """The slice that the run targets (`hardware=`). Facts about chips are in `gemma4_tpu/hardware.py`."""

    name: str = "local"
    """Key of `hardware.SLICES`, such as `v5p-8`; `local` uses whatever JAX finds."""
    usd_per_hour: float | None = None
    """Price of the whole slice in USD per hour; null: the dated price in `prices.yaml`, for `region` and the kind of
    capacity."""
    region: str | None = None
    """Google Cloud region whose prices apply, such as `europe-west4`; null: the first that has one (us-central1)."""
    spot: bool = False
    """Spot capacity: cheaper, but can be preempted; launchers request it, and costs use its price."""
    flex_start: bool = False
    """Flex-start capacity (Dynamic Workload Scheduler), which waits for capacity and keeps it for at most 7 days; for
    costs only."""
    flags: str = "tuned"
    """Compiler flags: `tuned`, the chip's preset (`compiler_flags.py`; GPUs and CPUs have none), or `none`. Planning
    and training compile with the same flags."""
    compiler_options: dict[str, Any] = field(default_factory=dict)
    """XLA options by name, such as `{xla_tpu_enable_latency_hiding_scheduler: true}`; they override those of
    `flags`."""


@dataclass(kw_only=True)
class DistributedConfig:
    """Several processes of one run, one per host (`distributed=`), all started with the same command."""

    coordinator_address: str | None = None
    """`host:port` of process 0; `auto`: JAX finds it (TPU slices, SLURM, Open MPI); null: `auto` if `hardware` has
    several hosts or TPU_WORKER_HOSTNAMES names several, else one process."""
    num_processes: int | None = None
    """Number of processes in the run, with an explicit address."""
    process_id: int | None = None
    """Index of this process, from 0, with an explicit address."""


@dataclass(kw_only=True)
class MeshConfig:
    """Device mesh with the axes `dp` (splits rows only: weights are replicated), `fsdp` (splits rows and weights), `tp`
    (splits heads and hidden units) and `cp` (splits the tokens of each row) (`mesh=`).
    """

    dp: int | None = 1
    """Devices on the `dp` axis; null: those that the other axes leave."""
    fsdp: int | None = None
    """Devices on the `fsdp` axis; null: those that the other axes leave."""
    tp: int | None = None
    """Devices on the `tp` axis; null: those that the other axes leave. If several are null: the largest legal tp, the
    rest fsdp."""
    cp: int = 1
    """Devices on the `cp` axis, for rows too long for one chip; training only."""
