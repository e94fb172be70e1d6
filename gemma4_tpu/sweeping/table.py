"""A sweep as rows: what each job was given, and what came of it. Works on any folder of run folders."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma4_tpu.config.sweeps import fixed_keys, swept
from gemma4_tpu.errors import UserError
from gemma4_tpu.sweeping import state
from gemma4_tpu.sweeping.state import HIGHER_IS_BETTER, LOWER_IS_BETTER, Sweep, SweepJob
from gemma4_tpu.tracking.records import overrides_of, result_of

DEFAULT_METRIC = "heldout_loss_last"
RESULTS = (
    "heldout_loss_last", "heldout_loss_best", "train_loss_last", "updates", "real_tokens", "seconds",
    "real_tokens_per_second", "mfu", "usd",
)  # fmt: skip
"""The keys of `result.json` that a table shows where some job has them."""
_HIGHER = ("fill", "mfu", "updates", "pass", "accuracy", "margin", "reward", "per_second")
"""Metrics with these in their name are better when higher, unless the sweep says otherwise."""


@dataclass(frozen=True)
class Metric:
    """What the best run is best at."""

    key: str
    """Of `result.json`."""
    direction: str
    """`minimize` or `maximize`."""

    def best(self, values: Iterable[float]) -> float:
        """The best of several values."""
        return (min if self.direction == LOWER_IS_BETTER else max)(values)


@dataclass(frozen=True)
class JobRow:
    """One job."""

    job: SweepJob
    folder: Path
    result: dict[str, Any]
    """Its `result.json`, the objective's measures among its keys; empty where there is none."""

    def value(self, key: str) -> float | None:
        """A finite figure of a job that finished or was pruned; None: it has none."""
        value = self.result.get(key)
        if self.job.status not in (state.FINISHED, state.PRUNED):
            return None
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
        return None


@dataclass(frozen=True)
class SweepTable:
    """What reports are made from."""

    folder: Path
    rows: list[JobRow]
    """Every job: those of the folder's record, then run folders that the record does not know."""
    metric: Metric

    @classmethod
    def of(cls, folder: Path, metric: str | None) -> SweepTable:
        """Of a sweep's folder, or of any folder of run folders.

        Args:
          folder: its jobs' record, if there is one, and their run folders.
          metric: a key of `result.json`; None: the sweep's own.

        Raises:
          UserError: no job there, or none has that metric while some have results.
        """
        sweep = Sweep.open(folder)
        rows = _rows_of(sweep)
        numbers = sorted({k for row in rows for k, v in row.result.items() if isinstance(v, int | float)})
        if metric is not None and numbers and metric not in numbers:
            raise UserError(f"metric={metric}: no run has it; there are {', '.join(numbers)}")
        return cls(folder, rows, best_metric(sweep, metric))

    @property
    def title(self) -> str:
        return f"{self.folder.parent.name} / {self.folder.name}"

    @property
    def keys(self) -> list[str]:
        """What was swept, in the order of first mention."""
        return list(dict.fromkeys(key for row in self.rows for key in row.job.values))

    @property
    def results(self) -> list[str]:
        """Keys of `result.json` that some job has, the metric first."""
        wanted = dict.fromkeys([self.metric.key, *RESULTS])
        return [key for key in wanted if any(row.result.get(key) is not None for row in self.rows)]

    @property
    def best(self) -> JobRow | None:
        """The finished job that is best; None where none has the metric."""
        finished = [(row.value(self.metric.key), row) for row in self.rows if row.job.status == state.FINISHED]
        known = {value: row for value, row in reversed(finished) if value is not None}
        return known[self.metric.best(known)] if known else None

    @property
    def ranked(self) -> list[JobRow]:
        """Best first; those without the metric last, in their order."""
        sign = 1 if self.metric.direction == LOWER_IS_BETTER else -1
        values = {id(row): row.value(self.metric.key) for row in self.rows}
        return sorted(self.rows, key=lambda row: (values[id(row)] is None, sign * (values[id(row)] or 0.0)))


def _rows_of(sweep: Sweep) -> list[JobRow]:
    jobs = list(sweep.jobs.values())
    inside = sorted(place for place in sweep.folder.iterdir() if (place / "config.yaml").is_file())
    strangers = [place for place in inside if place.name not in sweep.jobs]
    jobs += _found(strangers)
    if not jobs:
        raise UserError(f"sweep={sweep.folder}: holds neither sweep.json nor run folders; give the folder of a sweep")
    rows = []
    for job in jobs:
        folder = sweep.run_folder(job)
        rows.append(JobRow(job, folder, _figures(folder)))
    return rows


def _figures(folder: Path) -> dict[str, Any]:
    """`result.json` of a run, the measures of its objective among the others."""
    values = result_of(folder).values
    return values | values.get("measures", {})


def _found(folders: Sequence[Path]) -> list[SweepJob]:
    """Run folders without a record: what differs between their overrides is what was swept."""
    words = {}
    for folder in folders:
        given = overrides_of(folder) or []
        words[folder] = [word for word in given if not word.startswith("run_dir=")]
    common = set.intersection(*map(set, words.values())) if len(words) > 1 else set()
    jobs = []
    for folder, given in words.items():
        values = swept(given, fixed_keys(sorted(common)))
        told = result_of(folder).values
        status = told.get("status", state.RUNNING)
        jobs.append(
            SweepJob(name=folder.name, values=values, words=given, status=status, error=told.get("error"), starts=1)
        )
    return jobs


def best_metric(sweep: Sweep, wanted: str | None) -> Metric:
    """The metric that decides: the one asked for, else the sweep's own, else the last held-out loss."""
    key = wanted or sweep.metric or DEFAULT_METRIC
    if sweep.direction and key == sweep.metric:
        return Metric(key, sweep.direction)
    return Metric(key, HIGHER_IS_BETTER if any(word in key for word in _HIGHER) else LOWER_IS_BETTER)


def outcome_value(sweep: Sweep, job: SweepJob, key: str) -> float:
    """The metric of a job; NaN where it has none."""
    folder = sweep.run_folder(job)
    value = JobRow(job, folder, _figures(folder)).value(key)
    return math.nan if value is None else value
