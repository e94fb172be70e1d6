"""Where a sweep's jobs run: as processes on this machine, or on a SLURM cluster."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from gemma4_tpu.config.sweeps import Processes, Slurm
from gemma4_tpu.sweeping.devices import shares
from gemma4_tpu.sweeping.job_process import Child, Orphan, OwnChild, command
from gemma4_tpu.sweeping.slurm import Queue, SlurmChild
from gemma4_tpu.sweeping.state import Sweep, SweepJob


class Site(ABC):
    """Starts the jobs of one sweep."""

    outlives_parent = False
    """Whether jobs continue when the sweep's own process is stopped."""
    restarts_itself = False
    """Whether a preempted job starts again without this process."""

    @abstractmethod
    def shares(self, configs: list[Any]) -> list[dict[str, str]]:
        """One set of environment variables per concurrent job."""

    @abstractmethod
    def start(self, job: SweepJob, share: dict[str, str]) -> Child:
        """Starts a job."""

    @abstractmethod
    def running(self, job: SweepJob) -> Child | None:
        """A start that an earlier process of the sweep left behind, if it still runs."""


class Here(Site):
    """Processes on this machine."""

    def __init__(self, sweep: Sweep, settings: Processes):
        self._sweep, self._settings = sweep, settings

    def shares(self, configs: list[Any]) -> list[dict[str, str]]:
        """As `Site.shares`: GPUs are divided."""
        return shares(self._settings.parallel, [c.hardware for c in configs if hasattr(c, "hardware")])

    def start(self, job: SweepJob, share: dict[str, str]) -> Child:
        """As `Site.start`."""
        log_path, run_folder = self._sweep.log_path(job), self._sweep.run_folder(job)
        return OwnChild(command(self._sweep.entry, job.words, run_folder), log_path, run_folder, share)

    def running(self, job: SweepJob) -> Child | None:
        """As `Site.running`."""
        return Orphan.of(self._sweep.log_path(job), self._sweep.run_folder(job))


class Cluster(Site):
    """Batch jobs of SLURM."""

    outlives_parent = restarts_itself = True

    def __init__(self, sweep: Sweep, settings: Slurm):
        self._sweep, self._settings, self._queue = sweep, settings, Queue()

    def shares(self, configs: list[Any]) -> list[dict[str, str]]:
        """As `Site.shares`: SLURM divides the resources."""
        return [{} for _ in range(self._settings.parallel)]

    def start(self, job: SweepJob, share: dict[str, str]) -> Child:
        """As `Site.start`."""
        log_path, run_folder = self._sweep.log_path(job), self._sweep.run_folder(job)
        words = command(self._sweep.entry, job.words, run_folder)
        return SlurmChild.submit(job.name, words, self._script(job), log_path, run_folder, self._settings, self._queue)

    def running(self, job: SweepJob) -> Child | None:
        """As `Site.running`."""
        log_path, run_folder = self._sweep.log_path(job), self._sweep.run_folder(job)
        return SlurmChild.of(self._script(job), log_path, run_folder, self._queue)

    def _script(self, job: SweepJob) -> Path:
        return self._sweep.folder / "slurm" / f"{job.name}.sh"


def site_of(sweep: Sweep, settings: Processes | Slurm) -> Site:
    """The site for these settings. Raises `UserError` if it is not available here."""
    return Cluster(sweep, settings) if isinstance(settings, Slurm) else Here(sweep, settings)
