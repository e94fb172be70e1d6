"""The parts common to all benchmarks: problems, their sources, and judges of completions.

A new Verilog benchmark is one file with a `ProblemSource`; see `verilog/resbench.py`. Rows with known answers need no
code (`accuracy/`). This module has no heavy imports.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Protocol

from gemma4_tpu.errors import UserError

Message = dict[str, Any]
"""A turn, with `role` and `content`."""


class Asked(Protocol):
    """A question to a model, whoever judges its answer."""

    @property
    def name(self) -> str:
        """Its name, unique within a benchmark."""

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
    """One task: the prompt, and the test bench that the answer must pass."""

    name: str
    prompt: str
    reference: str
    """Source of a design that meets the specification; defines `reference_top`. Empty: the benchmark has none, so its
    bench is not graded, a pass needs no particular number of comparisons, and there are no second opinions."""
    testbench: str
    """Source of the test bench; instantiates `top`."""
    top: str
    """The module that an answer must define."""
    reference_top: str
    """The module that `reference` defines, if there is one."""
    bench_top: str
    """The root module of `testbench`."""
    bench_needs_reference: bool
    """Whether the bench instantiates the reference next to the answer, or contains the expected values itself."""
    result_marker: str
    """Text inside one of the bench's strings that announces its result. A nonce is inserted after it."""
    result_pattern: str
    """Regular expression for the whole line; `{marker}` stands for the marker with its nonce. Groups: `errors` and
    `samples`, if the line has them."""
    official_rule: Callable[[str], bool]
    """The benchmark's own verdict, from the complete output of compiler and simulation."""
    failure_pattern: str | None = None
    """Regular expression for what a bench prints instead of its result if it counted errors; null: it always prints a
    result."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Data files that the bench reads, by name."""
    header: str = ""
    """The header of the module `top`, if an answer can be its body alone."""

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
    """Checks a source's problems before anything is judged by them.

    Args:
      problems: the source's problems.
      benchmark: its name, for messages.

    Raises:
      UserError: they are not problems, share names, or contain something that can't be sent to worker processes.
    """
    where = f"benchmark {benchmark}"
    names: set[str] = set()
    for number, problem in enumerate(problems):
        if not isinstance(problem, Problem):
            raise UserError(f"{where}: problem {number} is a {type(problem).__name__}; a source makes `Problem`s")
        said = f"{where}, problem {problem.name}"
        if problem.name in names:
            raise UserError(f"{said}: a duplicate name; rename one")
        names.add(problem.name)
        if bad := [key for key in _TEXTS if not isinstance(getattr(problem, key), str)]:
            raise UserError(f"{said}: {', '.join(bad)} must be text")
        if problem.bench_needs_reference and not problem.reference:
            raise UserError(f"{said}: its bench needs a reference, but there is none; add one")
        try:
            ForkingPickler.dumps(problem.official_rule)  # as the pool sends it to its workers
        except Exception:  # which one depends on Python's version
            raise UserError(
                f"{said}: official_rule is {problem.official_rule!r}, which worker processes can't import; write it as"
                " a function of a module (no lambda, no function within a function)"
            ) from None
        if not callable(problem.official_rule):
            raise UserError(f"{said}: official_rule is {problem.official_rule!r}, not a function of the printed text")
        try:
            re.compile(problem.result_pattern.replace("{marker}", "x"))
            re.compile(problem.failure_pattern or "")
        except re.error as error:
            raise UserError(f"{said}: result_pattern or failure_pattern is not a regex ({error})") from None


_TEXTS = (
    "name", "prompt", "reference", "testbench", "top", "reference_top", "bench_top", "result_marker", "result_pattern",
    "header",
)  # fmt: skip


def texts_of(row: Any, keys: Sequence[str], where: str) -> dict[str, str]:
    """The texts under `keys` in a row of a benchmark's file.

    Raises:
      UserError: some are missing; names them, after `where`.
    """
    if missing := [key for key in keys if not (isinstance(row, Mapping) and isinstance(row.get(key), str))]:
        raise UserError(f"{where}: {', '.join(missing)} missing")
    return {key: row[key] for key in keys}


HOW_TO_STOP_LEAKS = (
    "The server strips the markup of thought channels but leaves the thoughts: start it with its reasoning parser"
    " (vLLM: --reasoning-parser gemma4; the presets of `serve` set it) and draw the samples again."
)


class VerdictClass(StrEnum):
    """The classes of verdicts."""

    PASS = "pass"
    MISMATCH = "mismatch"
    """The bench counted errors, or made a different number of comparisons than with the reference."""
    SYNTAX = "syntax"
    ELABORATION = "elaboration"
    """Parsed but not built: unknown modules, ports or names, or no module of the required name."""
    FORBIDDEN = "forbidden construct"
    RUNTIME = "runtime"
    """The simulation ended with an error, or printed too much."""
    TIMEOUT = "timeout"
    """Compilation or simulation exceeded its CPU time."""
    NO_RESULT = "no result"
    """No module in the completion, no completion, or no result line; also if the reference itself fails."""
    LEAKED = "leaked thought"
    """The completion begins with a thought whose markup the server stripped: where the answer begins is unknown, so it
    is not judged."""
    WRONG = "wrong"
    """An answer other than the expected one."""
    UNANSWERED = "unanswered"
    """Contains nothing that can be compared with the expected answer."""
    CUT_OFF = "cut off"
    """The answer reached the token limit. Its rest is unknown, so none of it is compared."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The strict verdict on one completion, alongside the benchmark's own."""

    kind: VerdictClass
    detail: str = ""
    """The reason, in one line."""
    official: bool | None
    """The benchmark's own verdict on the same code; null: not requested."""
    refused_by: str | None = None
    """The check of the strict verdict that failed; null for a pass."""
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
"""Gemma 4's name for its thought channels; it is ordinary text after the token that opens one."""


def is_leaked_thought(completion: str) -> bool:
    """Whether a completion begins with a thought channel's name, which remains if the control tokens are stripped."""
    return completion.lstrip().startswith(f"{THOUGHT}\n")


class ProblemSource(Protocol):
    """A benchmark's files."""

    def load(self, path: str | Path) -> list[Problem]:
        """The problems in `path`, in their order. Raises: UserError: there are none, or one is incomplete."""
