"""What an evaluation needs from a benchmark of any kind: problems, and verdicts on their answers."""

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
    """Judgements on the samples of one subject."""

    verdicts: Mapping[Key, Verdict]
    opinions: Mapping[Key, Mapping[str, Any]] | None = None
    """Second opinions; None if none were requested."""
    told: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `EvaluationOutcome` derived from these samples."""


class Court(Protocol):
    """A benchmark, ready to judge; a context manager."""

    official: bool
    """Whether the benchmark has its own rule in addition to ours."""

    @property
    def problems(self) -> Sequence[Asked]:
        """The problems, in the benchmark's order."""

    def __enter__(self) -> Self:
        """Prepares for judging. Raises: UserError: something that judging needs is missing."""

    def __exit__(self, *_: object) -> None:
        """Stops what it started."""

    @property
    def fingerprint(self) -> str:
        """sha256 of the problems' contents."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Settings besides sampling that two evaluations must share to be comparable."""

    @property
    def categories(self) -> Mapping[str, str]:
        """Problem → category, for problems that have one."""

    @property
    def told(self) -> Mapping[str, Any]:
        """Fields of `EvaluationOutcome` that are known before any samples exist."""

    def judge(self, samples: Sequence[Sample], folder: Path, *, again: bool) -> Judged:
        """Judges the samples of the subject in `folder`, and stores verdicts there; `again`: ignores stored ones."""
