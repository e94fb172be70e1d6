"""Common to every benchmark: problems, their sources, and judges of completions.

A new Verilog benchmark is one file with a `ProblemSource`; see `verilog/resbench.py`. Rows with known answers need no
code at all (`accuracy/`). This module imports nothing heavy.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Protocol

from gemma4_tpu.errors import UserError

Message = dict[str, Any]
"""A turn: `role` and `content`."""


class Asked(Protocol):
    """What a model is asked, whoever judges its answer."""

    @property
    def name(self) -> str:
        """Unique within a benchmark."""

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation to answer."""

    @property
    def tools(self) -> tuple[Any, ...] | None:
        """Functions that the model can call, as JSON schemas."""

    @property
    def scored(self) -> tuple[str, ...]:
        """Answers whose likelihoods are requested; empty: the model answers freely."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One task: what the model is told, and the test bench that its answer must pass."""

    name: str
    prompt: str
    reference: str
    """Source of a design that fulfils the specification; defines `reference_top`. Empty: the benchmark has none, so
    that its bench is not graded, a pass needs no number of comparisons, and there are no second opinions."""
    testbench: str
    """Source of the test bench; instantiates `top`."""
    top: str
    """The module that an answer has to define."""
    reference_top: str
    """The module that `reference` defines, if there is one."""
    bench_top: str
    """The root module of `testbench`."""
    bench_needs_reference: bool
    """Whether the bench instantiates the reference next to the answer, or holds what it expects itself."""
    result_marker: str
    """Text inside a string of the bench's with which it announces its result. A nonce is put behind it."""
    result_pattern: str
    """Regular expression of the whole line; `{marker}` stands for the marker with its nonce. Groups `errors` and
    `samples`, where there are any."""
    official_rule: Callable[[str], bool]
    """The benchmark's own verdict from everything that compiler and simulation printed."""
    failure_pattern: str | None = None
    """Regular expression of what a bench prints instead of its result when it counted errors; null: it always prints a
    result."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Data files that the bench reads, by name."""
    header: str = ""
    """The head of the module `top`, where an answer may be its body alone."""

    @property
    def messages(self) -> tuple[Message, ...]:
        return ({"role": "user", "content": self.prompt},)

    @property
    def tools(self) -> None:
        return None

    @property
    def scored(self) -> tuple[str, ...]:
        return ()


def check_problems(problems: Sequence[Problem], benchmark: str) -> None:
    """What a source made, before anything is judged by it.

    Args:
      problems: of the source.
      benchmark: its name, for messages.

    Raises:
      UserError: they are no problems, share names, or hold what worker processes can't be given.
    """
    where = f"benchmark {benchmark}"
    names: set[str] = set()
    for number, problem in enumerate(problems):
        if not isinstance(problem, Problem):
            raise UserError(f"{where}: problem {number} is a {type(problem).__name__}; a source makes `Problem`s")
        said = f"{where}, problem {problem.name}"
        if problem.name in names:
            raise UserError(f"{said}: a second one of this name")
        names.add(problem.name)
        if bad := [key for key in _TEXTS if not isinstance(getattr(problem, key), str)]:
            raise UserError(f"{said}: {', '.join(bad)} must be text")
        if problem.bench_needs_reference and not problem.reference:
            raise UserError(f"{said}: its bench needs a reference, and there is none")
        try:
            ForkingPickler.dumps(problem.official_rule)  # as the pool hands it to its workers
        except Exception:  # it depends on Python's version which one
            raise UserError(
                f"{said}: official_rule is {problem.official_rule!r}, which worker processes can't import; write it as"
                " a function of a module (no lambda, no function within a function)"
            ) from None
        if not callable(problem.official_rule):
            raise UserError(f"{said}: official_rule is {problem.official_rule!r}, no function of what was printed")
        try:
            re.compile(problem.result_pattern.replace("{marker}", "x"))
            re.compile(problem.failure_pattern or "")
        except re.error as error:
            raise UserError(f"{said}: result_pattern or failure_pattern is no regular expression ({error})") from None


_TEXTS = (
    "name", "prompt", "reference", "testbench", "top", "reference_top", "bench_top", "result_marker", "result_pattern",
    "header",
)  # fmt: skip


def texts_of(row: Any, keys: Sequence[str], where: str) -> dict[str, str]:
    """The texts that a row of a benchmark's file holds under `keys`.

    Raises:
      UserError: it has not all of them; names those, behind `where`.
    """
    if missing := [key for key in keys if not (isinstance(row, Mapping) and isinstance(row.get(key), str))]:
        raise UserError(f"{where}: {', '.join(missing)} missing")
    return {key: row[key] for key in keys}


HOW_TO_STOP_LEAKS = (
    "The server takes the markup of thought channels away and leaves the thoughts: start it with its reasoning parser"
    " (vLLM: --reasoning-parser gemma4; the presets of `serve` set it) and draw the samples again."
)


class VerdictClass(StrEnum):
    """Classes of verdicts."""

    PASS = "pass"
    MISMATCH = "mismatch"
    """The bench counted errors, or another number of samples than with the reference."""
    SYNTAX = "syntax"
    ELABORATION = "elaboration"
    """Read, but not built: unknown modules, ports or names, no module of the wanted name."""
    FORBIDDEN = "forbidden construct"
    RUNTIME = "runtime"
    """The simulation ended with an error, or printed too much."""
    TIMEOUT = "timeout"
    """Compilation or simulation used up its CPU time."""
    NO_RESULT = "no result"
    """No module in the completion, no completion, or no result line; also where the reference itself fails."""
    LEAKED = "leaked thought"
    """The completion begins with a thought whose markup the server took away: no telling where the answer begins, so
    nothing of it is judged."""
    WRONG = "wrong"
    """Another answer than the expected one."""
    UNANSWERED = "unanswered"
    """Nothing in it that could be compared with the expected answer."""
    CUT_OFF = "cut off"
    """The answer reached the token limit. What it would have said is not known, so none of it is compared."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The strict verdict on one completion, alongside the benchmark's own."""

    kind: VerdictClass
    detail: str = ""
    """Why, in one line."""
    official: bool | None
    """The benchmark's own verdict on the same code; null: not requested."""
    refused_by: str | None = None
    """The check of the strict verdict that refused it; null for a pass."""
    mismatches: int | None = None
    """Errors that the bench counted."""
    samples: int | None = None
    """Comparisons that the bench made."""
    cpu_seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return self.kind is VerdictClass.PASS

    def to_row(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "kind": str(self.kind)}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Verdict:
        """The inverse of `to_row`."""
        return cls(**{**row, "kind": VerdictClass(row["kind"])})


LEAKED = Verdict(
    kind=VerdictClass.LEAKED, detail="begins with a thought without its markup", official=False, refused_by="text"
)  # fmt: skip
THOUGHT = "thought"
"""The name that Gemma 4 gives to its thought channels; it is ordinary text behind the token that opens one."""


def is_leaked_thought(completion: str) -> bool:
    """Whether it begins with a thought channel's name: what is left of a channel without its control tokens."""
    return completion.lstrip().startswith(f"{THOUGHT}\n")


class SelfCheck(Protocol):
    """What a judge found out about itself before judging."""

    @property
    def simulator(self) -> str:
        """Name and version."""

    @property
    def sandbox(self) -> str:
        """Level of isolation."""

    @property
    def cannot_pass(self) -> dict[str, str]:
        """Name → reason, of the problems whose own reference fails here."""

    def table(self) -> str:
        """For people."""

    def to_row(self) -> dict[str, Any]:
        """For JSON."""


class ProblemSource(Protocol):
    """A benchmark's files."""

    def load(self, path: str | Path) -> list[Problem]:
        """The problems in `path`, in their order. Raises: UserError: there are none, or one is incomplete."""


class Judge(Protocol):
    """Gives verdicts; thread-safe, a context manager."""

    def prepare(self, problems: Sequence[Problem]) -> SelfCheck:
        """Judges the references (or recalls what they did). Needed once before `judge`."""

    def judge(self, problem: Problem, completion: str) -> Verdict:
        """The verdict on one completion."""

    def judge_all(self, samples: Iterable[tuple[Problem, str]]) -> Iterator[Verdict]:
        """Verdicts in the order of the samples, several at work at one time."""
