"""Compares two evaluations problem by problem, and states what can and cannot be claimed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gemma4_tpu.errors import UserError
from gemma4_tpu.evals.passk import KS, ScoreDifference, difference
from gemma4_tpu.evals.scores import EvaluationOutcome

_DESCRIPTIVE = (
    "base",
    "run",
    "checkpoint",
    "weights",
    "batch_size",
    "endpoint",
    "samples",
    "backend",
    "stop_ids",
    "model",
    "seeds",
)
"""Settings that identify the model or how it was run; they can differ in a fair comparison."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Evaluation A minus evaluation B."""

    a: str
    b: str
    differences: list[ScoreDifference]
    """One for each k."""
    only_a: int
    """Number of problems that B lacks; they are excluded."""
    only_b: int
    unlike: dict[str, tuple[Any, Any]]
    """Settings that differ although they should not."""
    first_metric: str = "pass@1"
    """Name of the metric for k = 1."""
    greedy: bool = False
    """Whether both sides answer greedily."""
    categories: dict[str, ScoreDifference] = field(default_factory=dict)
    """For k = 1, the difference by category; empty if there are none."""

    def claims(self) -> list[str]:
        """The claims in sentences, with their caveats."""
        first = self.differences[0]
        problems = first.better + first.worse + first.equal
        lines = [
            f"{self.first_metric if d.k == 1 else f'pass@{d.k}'}: {self.a} is"
            f" {abs(d.value):.3f} {'above' if d.value >= 0 else 'below'} {self.b}"
            f" (interval over problems [{d.low:+.3f}, {d.high:+.3f}]"
            + (f", sampling error {d.sampling_error:.3f}" if d.sampling_error is not None else "")
            + f"); better on {d.better} problems, worse on {d.worse}, equal on {d.equal}."
            for d in self.differences
        ]
        lines.append(_GREEDY if self.greedy else _about_these(first, problems))
        lines.append(_about_new(first))
        if self.categories:
            lines.append(_about_categories(self.categories))
        lines.append(
            "Each side is one set of weights: these numbers do not include the variation between training runs with"
            " different seeds, hardware or data, so a gap cannot be attributed to any of these."
        )
        if self.unlike:
            listed = "; ".join(f"{key}: {a} and {b}" for key, (a, b) in sorted(self.unlike.items()))
            lines.append(f"Not a like-for-like comparison ({listed}): the gap includes these differences.")
        if self.only_a or self.only_b:
            lines.append(
                f"Excluded: {self.only_a} problems that only {self.a} has, {self.only_b} that only {self.b} has."
            )
        return lines


_GREEDY = "Both sides answer greedily, so there is no sampling error."


def _about_categories(categories: Mapping[str, ScoreDifference]) -> str:
    beyond = {name: d for name, d in categories.items() if d.beyond_problems}
    listed = "; ".join(f"{name} {d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]" for name, d in beyond.items())
    return (
        f"In {len(beyond)} of {len(categories)} categories the interval excludes 0"
        f"{f' ({listed})' if listed else ''}; without any real difference, it does so by chance in one of twenty."
    )


def _about_these(d: ScoreDifference, problems: int) -> str:
    if d.beyond_sampling is None:
        return "With one sample per problem, the sampling error is unknown: new samples could reverse the order."
    if d.beyond_sampling:
        return f"On these {problems} problems, the gap at k={d.k} is larger than redrawing the samples would explain."
    return f"On these {problems} problems, redrawing the samples could produce the gap at k={d.k}."


def _about_new(d: ScoreDifference) -> str:
    if d.beyond_problems:
        return "On new problems of the same kind, expect the same sign."
    return "On new problems of the same kind, either could be better: the interval over problems contains 0."


def compare(a: EvaluationOutcome, b: EvaluationOutcome, names: tuple[str, str] | None = None) -> Comparison:
    """Compares on the problems that both have.

    Args:
      a: one evaluation.
      b: another one, on the same benchmark.
      names: names for the two.

    Raises:
      UserError: the benchmarks differ, or have no problem in common.
    """
    if a.benchmark != b.benchmark:
        raise UserError(f"compare: A is on {a.benchmark}, B on {b.benchmark}; there is nothing to pair")
    common = [name for name in a.problems if name in b.problems]
    if not common:
        raise UserError("compare: the two evaluations have no problem in common")
    x, y = ([(one.problems[name].n, one.problems[name].passed) for name in common] for one in (a, b))
    most = min(n for n, _ in [*x, *y])
    first, second = names or (a.name, b.name)
    return Comparison(
        a=first,
        b=second,
        differences=[difference(x, y, k) for k in KS if k <= most],
        only_a=len(a.problems) - len(common),
        only_b=len(b.problems) - len(common),
        unlike=_unlike(a, b),
        first_metric=a.metric(1),
        greedy=a.greedy and b.greedy,
        categories=_by_category([a.problems[name].category for name in common], x, y),
    )


def _by_category(
    categories: Sequence[str | None], x: Sequence[tuple[int, int]], y: Sequence[tuple[int, int]]
) -> dict[str, ScoreDifference]:
    """A minus B in each category; all arguments list problems in the same order."""
    members: dict[str, list[int]] = {}
    for number, category in enumerate(categories):
        if category is not None:
            members.setdefault(category, []).append(number)
    return {name: difference([x[i] for i in own], [y[i] for i in own], 1) for name, own in members.items()}


def _unlike(a: EvaluationOutcome, b: EvaluationOutcome) -> dict[str, tuple[Any, Any]]:
    keys = sorted({*a.settings, *b.settings} - set(_DESCRIPTIVE))
    unlike = {key: _pair(a.settings, b.settings, key) for key in keys if a.settings.get(key) != b.settings.get(key)}
    for key in ("simulator", "sandbox"):
        if a.selfcheck.get(key) != b.selfcheck.get(key):
            unlike[key] = _pair(a.selfcheck, b.selfcheck, key)
    return unlike


def _pair(a: Mapping[str, Any], b: Mapping[str, Any], key: str) -> tuple[Any, Any]:
    return a.get(key), b.get(key)
