"""Connects Hydra's plugins (`hydra_plugins/gemma4_tpu_sweeps.py`) to the jobs: folder, signals, report, exit code."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, OmegaConf

from gemma4_tpu.config.entry import EntryPoint
from gemma4_tpu.config.sweeps import Processes, Slurm, fixed_keys, job_name, swept
from gemma4_tpu.errors import REFUSED, UserError
from gemma4_tpu.sweeping import state
from gemma4_tpu.sweeping.processes import Monitor, Runner, Stop
from gemma4_tpu.sweeping.state import Sweep, SweepJob, SweepLock
from gemma4_tpu.sweeping.table import best_metric, outcome_value
from gemma4_tpu.tracking.files import jsonable, write_text
from gemma4_tpu.tracking.logs import setup_logging

log = logging.getLogger(__name__)

SOME_FAILED = 1


@dataclass
class OpenSweep:
    """A sweep run by this process."""

    sweep: Sweep
    entry: EntryPoint
    """Entry point of the jobs."""
    stop: Stop
    monitor: Monitor = field(default=lambda job, row: None)
    """Set by a search that stops jobs."""
    launched: set[str] = field(default_factory=set)
    """Names of the jobs given to this process."""


@contextmanager
def sweeping(
    entry: EntryPoint,
    config: DictConfig,
    report: Callable[[Path], object],
    metric: str | None,
    direction: str | None = None,
) -> Iterator[OpenSweep]:
    """Runs a sweep: holds its folder and signals, and finally calls `report` on its folder.

    Raises:
      SystemExit: 1 if some jobs failed or none finished, 2 refused, 42 SIGTERM, 130 Ctrl-C; not raised if all is well.
    """
    setup_logging()
    folder = Path(str(config.hydra.sweep.dir)).absolute()
    try:
        with SweepLock(folder), Stop() as stop:
            sweep = Sweep.open(folder, entry.name)
            sweep.metric, sweep.direction = metric, direction
            opened = OpenSweep(sweep, entry, stop)
            yield opened
            report(folder)
    except UserError as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        raise SystemExit(REFUSED) from None
    if stop.exit_code:
        print(f"\ninterrupted; the same command with hydra.sweep.dir={folder} resumes it", file=sys.stderr)
    if code := stop.exit_code or _exit_code(opened):
        raise SystemExit(code)


def _exit_code(opened: OpenSweep) -> int:
    names = opened.launched or opened.sweep.jobs  # nothing was left to do
    if not names:  # another launcher ran the jobs, and would have raised
        return 0
    statuses = {opened.sweep.jobs[name].status for name in names}
    failed = {state.FAILED, state.PREEMPTED} & statuses
    return SOME_FAILED if failed or state.FINISHED not in statuses else 0


def launch(
    opened: OpenSweep | None, config: DictConfig, settings: Processes | Slurm, overrides: Sequence[Sequence[str]]
) -> list[JobReturn]:
    """Runs these jobs; each returns the value of the sweep's metric (NaN: there is none). A failing job does not raise.

    Raises:
      UserError: `settings` are invalid, or no sweep is open because the sweeper is not one of ours.
    """
    if opened is None:
        raise UserError("hydra/launcher: processes and slurm work with hydra/sweeper=grid or hydra/sweeper=optuna")
    sweep = opened.sweep
    _blank_secrets(sweep.folder / "multirun.yaml")
    given = OmegaConf.to_container(config.hydra.overrides)
    assert isinstance(given, dict)
    elsewhere = [word for word in given["hydra"] if word.lstrip("+").startswith("hydra.searchpath")]
    fixed = fixed_keys([*given["task"], *elsewhere])
    jobs = [_job(sweep, [*elsewhere, *words], fixed) for words in overrides]
    opened.launched |= {job.name for job in jobs}
    Runner(sweep, opened.entry, settings, opened.stop, opened.monitor).run(jobs)
    metric = best_metric(sweep, None).key
    returns = []
    for job, words in zip(jobs, overrides, strict=True):
        returned = JobReturn(overrides=list(words), status=JobStatus.COMPLETED)
        returned.return_value = outcome_value(sweep, job, metric)
        returns.append(returned)
    return returns


def _blank_secrets(path: Path) -> None:
    """Removes secrets from the command line that Hydra has just written there."""
    if path.is_file():
        write_text(path, yaml.safe_dump(jsonable(yaml.safe_load(path.read_text(encoding="utf-8"))), sort_keys=False))


def _job(sweep: Sweep, words: list[str], fixed: set[str]) -> SweepJob:
    values = swept(words, fixed)
    job = SweepJob(name=job_name(values), values=values, words=words)
    if earlier := sweep.jobs.get(job.name):
        job.starts, job.status, job.error, job.pid = earlier.starts, earlier.status, earlier.error, earlier.pid
    return job
