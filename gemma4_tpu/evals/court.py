"""What an evaluation needs of a benchmark, whatever its kind: problems, and verdicts on the answers to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

from gemma4_tpu.evals.problems import Asked, Verdict
from gemma4_tpu.evals.store import Key, Sample

VERDICTS_FILE = "verdicts.jsonl"


@dataclass(frozen=True)
class Judged:
    """On the samples of one subject."""

    verdicts: Mapping[Key, Verdict]
    opinions: Mapping[Key, Mapping[str, Any]] | None = None
    """Second ones; None: none were asked for."""
    told: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `EvaluationOutcome` that follow from these samples."""


class Court(Protocol):
    """A benchmark, ready to judge; a context manager."""

    official: bool
    """Whether the benchmark has a rule of its own, beside ours."""

    @property
    def problems(self) -> Sequence[Asked]:
        """In the benchmark's order."""

    def __enter__(self) -> Self:
        """Gets ready. Raises: UserError: what judging needs is not there."""

    def __exit__(self, *_: object) -> None:
        """Ends what it started."""

    @property
    def fingerprint(self) -> str:
        """sha256 of everything that the problems say."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What two evaluations must have in common to be compared, beyond sampling."""

    @property
    def categories(self) -> Mapping[str, str]:
        """Problem → category, where there are any."""

    @property
    def told(self) -> Mapping[str, Any]:
        """Fields of `EvaluationOutcome` that are known before there are samples."""

    def judge(self, samples: Sequence[Sample], folder: Path, *, again: bool) -> Judged:
        """Verdicts on the samples of the subject in `folder`, kept there; `again`: not those that are there already."""
