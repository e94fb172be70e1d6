"""A sweep as rows: the values of each job, and its results. Works on any folder of run folders."""

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
"""Keys of `result.json` that a table shows if any job has them."""
_HIGHER = ("fill", "mfu", "updates", "pass", "accuracy", "margin", "reward", "per_second")
"""Metrics with these in their name are better when higher, unless the sweep says otherwise."""


@dataclass(frozen=True)
class Metric:
    """What makes a run the best."""

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
    """Its `result.json`, with the objective's measures as keys; empty if there is none."""

    def value(self, key: str) -> float | None:
        """A finite figure of a job that finished or was pruned; None if there is none."""
        value = self.result.get(key)
        if self.job.status not in (state.FINISHED, state.PRUNED):
            return None
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
        return None


@dataclass(frozen=True)
class SweepTable:
    """The input of reports."""

    folder: Path
    rows: list[JobRow]
    """Every job: those of the folder's record, then run folders that the record does not list."""
    metric: Metric

    @classmethod
    def of(cls, folder: Path, metric: str | None) -> SweepTable:
        """Reads a sweep's folder, or any folder of run folders.

        Args:
          folder: contains run folders and, for a sweep, its record.
          metric: a key of `result.json`; None: the sweep's own.

        Raises:
          UserError: there is no job, or some have results but none has that metric.
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
        """Swept keys, in order of first mention."""
        return list(dict.fromkeys(key for row in self.rows for key in row.job.values))

    @property
    def results(self) -> list[str]:
        """Keys of `result.json` that any job has, the metric first."""
        wanted = dict.fromkeys([self.metric.key, *RESULTS])
        return [key for key in wanted if any(row.result.get(key) is not None for row in self.rows)]

    @property
    def best(self) -> JobRow | None:
        """The best finished job; None if none has the metric."""
        finished = [(row.value(self.metric.key), row) for row in self.rows if row.job.status == state.FINISHED]
        known = {value: row for value, row in reversed(finished) if value is not None}
        return known[self.metric.best(known)] if known else None

    @property
    def ranked(self) -> list[JobRow]:
        """Best first; jobs without the metric last, in order."""
        sign = 1 if self.metric.direction == LOWER_IS_BETTER else -1
        values = {id(row): row.value(self.metric.key) for row in self.rows}
        return sorted(self.rows, key=lambda row: (values[id(row)] is None, sign * (values[id(row)] or 0.0)))


def _rows_of(sweep: Sweep) -> list[JobRow]:
    jobs = list(sweep.jobs.values())
    inside = sorted(place for place in sweep.folder.iterdir() if (place / "config.yaml").is_file())
    strangers = [place for place in inside if place.name not in sweep.jobs]
    jobs += _found(strangers)
    if not jobs:
        raise UserError(f"sweep={sweep.folder}: has neither sweep.json nor run folders; pass a sweep's folder")
    rows = []
    for job in jobs:
        folder = sweep.run_folder(job)
        rows.append(JobRow(job, folder, _figures(folder)))
    return rows


def _figures(folder: Path) -> dict[str, Any]:
    """`result.json` of a run, with its objective's measures as keys."""
    values = result_of(folder).values
    return values | values.get("measures", {})


def _found(folders: Sequence[Path]) -> list[SweepJob]:
    """Run folders without a record; the swept keys are those in which their overrides differ."""
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
    """The metric that decides: the requested one, else the sweep's own, else the last held-out loss."""
    key = wanted or sweep.metric or DEFAULT_METRIC
    if sweep.direction and key == sweep.metric:
        return Metric(key, sweep.direction)
    return Metric(key, HIGHER_IS_BETTER if any(word in key for word in _HIGHER) else LOWER_IS_BETTER)


def outcome_value(sweep: Sweep, job: SweepJob, key: str) -> float:
    """The metric of a job; NaN if it has none."""
    folder = sweep.run_folder(job)
    value = JobRow(job, folder, _figures(folder)).value(key)
    return math.nan if value is None else value
