"""Scores by lm-evaluation-harness: reads its output, keeps it as a record, and compares two records.

```
result.json      tasks, metrics, standard errors, versions     lm_eval.yaml   lm_eval's configuration
documents.jsonl  {"task", "metric", "document", "value"}       lm_eval/       its own output; lm_eval.log
```
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gemma4_tpu.errors import UserError
from gemma4_tpu.evals.passk import interval
from gemma4_tpu.tracking.files import write_text
from gemma4_tpu.tracking.records import HARNESS, RESULT, read_record, write_record

DOCUMENTS_FILE = "documents.jsonl"
PAIRED, BY_ERRORS = "paired by document", "by standard errors"
_STDERR = "_stderr"

Values = dict[tuple[str, str], dict[str, float]]
"""(task, metric) → document → value."""


@dataclass(frozen=True, kw_only=True)
class HarnessMetric:
    """One score of a task."""

    value: float
    stderr: float | None
    """lm_eval's estimate; null if it makes none."""
    higher_is_better: bool | None


@dataclass(frozen=True, kw_only=True)
class HarnessTask:
    """A task or a group of them."""

    version: str
    """The task's own version."""
    documents: int | None
    """Number of scored documents; null for a group."""
    shots: int | None
    metrics: dict[str, HarnessMetric]
    """By name and filter, as lm_eval writes them: `acc,none`."""


@dataclass(frozen=True, kw_only=True)
class HarnessOutcome:
    """lm_eval's results for one model."""

    model: str
    lm_eval: str
    """Version of lm_eval."""
    settings: dict[str, Any]
    """Server, limits, template."""
    tasks: dict[str, HarnessTask]
    seconds: float | None = None
    status: str = "finished"

    def write(self, folder: Path) -> None:
        """Writes `result.json`."""
        write_record(folder / RESULT, HARNESS, self)

    @classmethod
    def read(cls, folder: Path) -> HarnessOutcome:
        """The inverse of `write`. Raises: UserError: there is no finished evaluation of this kind."""
        path = folder / RESULT
        record = read_record(path)
        if record.kind != HARNESS or record.failed:
            raise UserError(f"{path}: not the result of a finished eval=lm_eval")
        try:
            tasks = {
                name: HarnessTask(**{**task, "metrics": {m: HarnessMetric(**v) for m, v in task["metrics"].items()}})
                for name, task in record.values["tasks"].items()
            }
            return cls(**{**record.values, "tasks": tasks})
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: damaged ({error!r})") from None


def read_written(folder: Path) -> tuple[str, dict[str, HarnessTask], Values]:
    """(version of lm_eval, tasks, values of documents) of the newest results under `folder`.

    Raises:
      UserError: there are none, or they have another format.
    """
    written = sorted(folder.rglob("results_*.json"), key=lambda path: path.name)
    if not written:
        raise UserError(f"{folder}: lm_eval wrote no results")
    path = written[-1]
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        tasks = {name: _task(name, scores, found) for name, scores in found["results"].items()}
        samples = sorted(path.parent.glob(f"samples_*{path.stem.removeprefix('results')}.jsonl"))
        values: Values = {}
        for place in samples:
            task = place.stem.removeprefix("samples_").removesuffix(path.stem.removeprefix("results"))
            _add_documents(values, task, place)
        return str(found.get("lm_eval_version")), tasks, values
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not in the format of lm_eval 0.4 ({error!r})") from None


def _task(name: str, scores: Mapping[str, Any], found: Mapping[str, Any]) -> HarnessTask:
    better = found.get("higher_is_better", {}).get(name) or {}
    counts = found.get("n-samples", {}).get(name) or {}
    metrics = {}
    for key, value in scores.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith(_STDERR) or (number := _number(value)) is None:
            continue
        error = _number(scores.get(f"{metric}{_STDERR},{filtered}"))
        metrics[key] = HarnessMetric(value=number, stderr=error, higher_is_better=better.get(metric))
    return HarnessTask(
        version=str(found.get("versions", {}).get(name)), documents=counts.get("effective"),
        shots=found.get("n-shot", {}).get(name), metrics=metrics,
    )  # fmt: skip


def _add_documents(values: Values, task: str, place: Path) -> None:
    """Adds the value of each document of a task."""
    for line in place.read_text(encoding="utf-8").split("\n"):
        if not line:
            continue
        row = json.loads(line)
        for metric in row.get("metrics") or ():
            if (number := _number(row.get(metric))) is not None:
                documents = values.setdefault((task, f"{metric},{row.get('filter', 'none')}"), {})
                documents[f"{row['doc_id']} {row.get('doc_hash', '')[:12]}"] = number


def _number(value: Any) -> float | None:
    """A finite number; None for anything else, such as the intermediate values of an aggregated metric."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def write_documents(folder: Path, values: Values) -> None:
    """Writes `documents.jsonl`."""
    rows = (
        {"task": task, "metric": metric, "document": document, "value": value}
        for (task, metric), documents in values.items()
        for document, value in documents.items()
    )
    write_text(folder / DOCUMENTS_FILE, "".join(json.dumps(row) + "\n" for row in rows))


def read_documents(folder: Path) -> Values:
    """The inverse of `write_documents`; empty if there are none."""
    path, values = folder / DOCUMENTS_FILE, Values()
    for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() else ():
        if line:
            row = json.loads(line)
            values.setdefault((row["task"], row["metric"]), {})[row["document"]] = row["value"]
    return values


@dataclass(frozen=True, kw_only=True)
class HarnessDifference:
    """A minus B, on one metric of one task."""

    task: str
    metric: str
    a: float
    b: float
    low: float | None
    """Lower end of the 95% interval; None: the error is unknown."""
    high: float | None
    by: str
    """Basis of the interval: `PAIRED` or `BY_ERRORS`."""
    higher_is_better: bool | None

    @property
    def value(self) -> float:
        return self.a - self.b

    @property
    def verdict(self) -> str:
        """States whether A is worse."""
        if self.low is None or self.high is None:
            return "error unknown"
        if self.low <= 0 <= self.high:
            return "no more than chance"
        if self.higher_is_better is None:
            return "differs"
        return "better" if (self.value > 0) == self.higher_is_better else "worse"


@dataclass(frozen=True)
class HarnessComparison:
    """Two models on the tasks that both have."""

    differences: list[HarnessDifference]
    unlike: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """Settings and versions that differ although they should not."""

    def claims(self, a: str, b: str) -> Iterator[str]:
        """The claims in sentences."""
        for d in self.differences:
            reach = "" if d.low is None else f" [{d.low:+.4f}, {d.high:+.4f}], {d.by}"
            yield f"{d.task}, {d.metric}: {a} {d.a:.4f}, {b} {d.b:.4f}: {d.value:+.4f}{reach}: {d.verdict}."
        worse = [d for d in self.differences if d.verdict == "worse"]
        yield (
            f"{a} is worse than {b} on {len(worse)} of {len(self.differences)} scores by more than chance; without any"
            " real difference, that happens on one of forty."
        )
        if self.unlike:
            listed = "; ".join(f"{key}: {x} and {y}" for key, (x, y) in self.unlike.items())
            yield f"Not a like-for-like comparison ({listed})."


_MAY_DIFFER = ("endpoint", "model", "tokenizer")


def compare_harness(a: Path, b: Path) -> HarnessComparison:
    """The evaluation in folder `a` minus that in `b`, on every metric that both have.

    Raises:
      UserError: one is not an evaluation, or they share no task.
    """
    x, y = HarnessOutcome.read(a), HarnessOutcome.read(b)
    of_a, of_b = read_documents(a), read_documents(b)
    differences = [
        _difference(task, metric, x, y, of_a.get((task, metric), {}), of_b.get((task, metric), {}))
        for task in x.tasks
        if task in y.tasks
        for metric in x.tasks[task].metrics
        if metric in y.tasks[task].metrics
    ]
    if not differences:
        raise UserError("compare: the two evaluations have no task in common")
    told = [{"lm_eval": one.lm_eval, **one.settings, **_versions(one)} for one in (x, y)]
    keys = [key for key in told[0] if key in told[1] and key not in _MAY_DIFFER]
    return HarnessComparison(differences, {k: (told[0][k], told[1][k]) for k in keys if told[0][k] != told[1][k]})


def _versions(outcome: HarnessOutcome) -> dict[str, Any]:
    return {f"{name}'s version and shots": (task.version, task.shots) for name, task in outcome.tasks.items()}


def _difference(
    task: str, metric: str, x: HarnessOutcome, y: HarnessOutcome, of_a: dict[str, float], of_b: dict[str, float]
) -> HarnessDifference:
    """Paired if both scored the same documents with values from 0 to 1, of which the score is the mean."""
    a, b = x.tasks[task].metrics[metric], y.tasks[task].metrics[metric]
    gaps = np.array([of_a[document] - of_b[document] for document in of_a if document in of_b])
    bounded = all(0 <= value <= 1 for value in [*of_a.values(), *of_b.values()])
    low: float | None = None
    high: float | None = None
    by = BY_ERRORS
    if len(gaps) and of_a.keys() == of_b.keys() and bounded:
        (low, high), by = interval(gaps, (-1.0, 1.0)), PAIRED
    elif a.stderr is not None and b.stderr is not None:
        reach = 1.96 * math.hypot(a.stderr, b.stderr)
        low, high = a.value - b.value - reach, a.value - b.value + reach
    return HarnessDifference(
        task=task, metric=metric, a=a.value, b=b.value, low=low, high=high, by=by, higher_is_better=a.higher_is_better
    )
