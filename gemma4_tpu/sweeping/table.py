"""A sweep as rows: what each job was given, and what came of it. Works on any folder of run folders."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gemma4_tpu.config.sweeps import fixed_keys, swept
from gemma4_tpu.errors import UserError
from gemma4_tpu.sweeping import record
from gemma4_tpu.sweeping.record import HIGHER_IS_BETTER, LOWER_IS_BETTER, Job, Sweep
from gemma4_tpu.tracking.records import result_of

DEFAULT_METRIC = "heldout_loss_last"
RESULTS = (
    "heldout_loss_last", "heldout_loss_best", "train_loss_last", "updates", "real_tokens", "seconds",
    "real_tokens_per_second", "mfu", "usd",
)  # fmt: skip
"""The keys of `result.json` that a table shows where some job has them."""
_HIGHER = ("fill", "mfu", "updates", "pass", "accuracy", "per_second")
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
class Row:
    """One job."""

    job: Job
    folder: Path
    result: dict[str, Any]
    """Its `result.json`; empty where there is none."""

    def value(self, key: str) -> float | None:
        """A finite figure of a job that finished or was pruned; None: it has none."""
        value = self.result.get(key)
        if self.job.status not in (record.FINISHED, record.PRUNED):
            return None
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
        return None


def rows_of(sweep: Sweep) -> list[Row]:
    """Every job of a sweep folder: those of its record, then run folders that the record does not know.

    Raises:
      UserError: there is none.
    """
    jobs = list(sweep.jobs.values())
    inside = sorted(place for place in sweep.folder.iterdir() if (place / "config.yaml").is_file())
    strangers = [place for place in inside if place.name not in sweep.jobs]
    jobs += _found(strangers)
    if not jobs:
        raise UserError(f"sweep={sweep.folder}: holds neither sweep.json nor run folders; give the folder of a sweep")
    rows = []
    for job in jobs:
        folder = sweep.run_folder(job)
        rows.append(Row(job, folder, result_of(folder).values))
    return rows


def _found(folders: Sequence[Path]) -> list[Job]:
    """Run folders without a record: what differs between their overrides is what was swept."""
    words = {}
    for folder in folders:
        path = folder / "overrides.yaml"
        given = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else []
        words[folder] = [word for word in given or [] if not word.startswith("run_dir=")]
    common = set.intersection(*map(set, words.values())) if len(words) > 1 else set()
    jobs = []
    for folder, given in words.items():
        values = swept(given, fixed_keys(sorted(common)))
        told = result_of(folder).values
        status = told.get("status", record.RUNNING)
        jobs.append(Job(name=folder.name, values=values, words=given, status=status, error=told.get("error"), starts=1))
    return jobs


def best_metric(sweep: Sweep, wanted: str | None) -> Metric:
    """The metric that decides: the one asked for, else the sweep's own, else the last held-out loss."""
    key = wanted or sweep.metric or DEFAULT_METRIC
    if sweep.direction and key == sweep.metric:
        return Metric(key, sweep.direction)
    return Metric(key, HIGHER_IS_BETTER if any(word in key for word in _HIGHER) else LOWER_IS_BETTER)


def outcome_value(sweep: Sweep, job: Job, key: str) -> float:
    """The metric of a job; NaN where it has none."""
    folder = sweep.run_folder(job)
    value = Row(job, folder, result_of(folder).values).value(key)
    return math.nan if value is None else value


def best_row(rows: Sequence[Row], metric: Metric) -> Row | None:
    """The finished job that is best; None where none has the metric."""
    finished = [(row.value(metric.key), row) for row in rows if row.job.status == record.FINISHED]
    known = {value: row for value, row in reversed(finished) if value is not None}
    return known[metric.best(known)] if known else None


def swept_keys(rows: Sequence[Row]) -> list[str]:
    """In the order of their first mention."""
    return list(dict.fromkeys(key for row in rows for key in row.job.values))


def columns(rows: Sequence[Row], metric: Metric) -> list[str]:
    """Keys of `result.json` that some job has, the metric first."""
    return [
        key for key in dict.fromkeys([metric.key, *RESULTS]) if any(row.result.get(key) is not None for row in rows)
    ]
