"""Results of an evaluation, problem by problem: the numbers behind reports and comparisons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma4_tpu.errors import UserError
from gemma4_tpu.evals.passk import Score, score, scores
from gemma4_tpu.evals.problems import Verdict, VerdictClass
from gemma4_tpu.evals.store import LENGTH, Key, Sample
from gemma4_tpu.tracking.records import EVALUATION, read_record, write_record

MISSING = "missing"
"""Class of samples that were never obtained; they count as failures."""
CLASSES = (*(str(kind) for kind in VerdictClass), MISSING)


@dataclass(frozen=True, kw_only=True)
class ProblemOutcome:
    """The samples of one problem."""

    n: int
    """Number requested, including those never obtained."""
    passed: int
    official: int | None
    """Passed by the benchmark's own rule; null if it has none."""
    classes: dict[str, int]
    """Verdict class → number of samples."""
    truncated: int
    confirmed: int | None = None
    """Passed, and no second opinion disagrees; null if none was requested."""
    category: str | None = None
    """Category of its row, if it has one."""

    @property
    def missing(self) -> int:
        return self.classes.get(MISSING, 0)


@dataclass(frozen=True, kw_only=True)
class EvaluationOutcome:
    """An evaluation of one subject."""

    name: str
    """`run`, `base`, `model`, `endpoint` or `samples`."""
    benchmark: str
    settings: dict[str, Any]
    """Everything that determines the samples: model, prompt, sampling."""
    problems: dict[str, ProblemOutcome]
    selfcheck: dict[str, Any] = field(default_factory=dict)
    """The judge's own row: simulator, sandbox; empty without simulation."""
    cannot_pass: dict[str, str] = field(default_factory=dict)
    """Problem → reason why its own reference fails here."""
    vacuous: dict[str, list[str]] = field(default_factory=dict)
    """Problem → designs that do nothing and pass its bench."""
    benches: list[str] = field(default_factory=list)
    """Strength of the benches, in sentences."""
    second: dict[str, Any] = field(default_factory=dict)
    """Second opinions: the stimulus' `seed`, `without` (problem → why there is none), `disagreements` (rows)."""
    answers: dict[str, Any] = field(default_factory=dict)
    """For compared answers: how (`compare` or `choose`, `extract`), the accuracy of guessing (`chance`), and `examples`
    that are wrong (rows).
    """
    tokens: int | None = None
    generation_seconds: float | None = None
    """Seconds in this start; null if nothing was generated in it."""
    judging_seconds: float | None = None

    def counts(self, rule: str = "strict", scope: str = "all") -> list[tuple[int, int]]:
        """(n, passes) of each problem, in the benchmark's order."""
        left_out = {"all": set(), "can_pass": {*self.cannot_pass}, "strong": {*self.cannot_pass, *self.vacuous}}[scope]
        passes = {"strict": "passed", "official": "official", "confirmed": "confirmed"}[rule]
        return [(p.n, getattr(p, passes)) for name, p in self.problems.items() if name not in left_out]

    def scores(self) -> dict[str, dict[str, list[Score]]]:
        """pass@k by rule and scope.

        Rules: `strict`; `official`, the benchmark's own; `confirmed`, strict and no second opinion disagrees. Scopes:
        `all` problems; those that `can_pass` here; of these, the `strong` ones, whose bench no stub passes.
        """
        return {
            rule: {scope: scores(self.counts(rule, scope)) for scope in ("all", "can_pass", "strong")}
            for rule in ("strict", *(name for name in ("confirmed", "official") if self._has(name)))
        }

    def _has(self, rule: str) -> bool:
        return all(getattr(problem, rule) is not None for problem in self.problems.values())

    def categories(self) -> dict[str, Score]:
        """Strict pass@1 of each category, in the order of the problems; empty if there are none."""
        counts: dict[str, list[tuple[int, int]]] = {}
        for problem in self.problems.values():
            if problem.category is not None:
                counts.setdefault(problem.category, []).append((problem.n, problem.passed))
        return {category: score(found, 1) for category, found in counts.items()}

    @property
    def greedy(self) -> bool:
        """Whether nothing was drawn at random; unknown for samples from elsewhere."""
        return self.settings.get("temperature") == 0 and "samples" not in self.settings

    def metric(self, k: int) -> str:
        """Name of the score for `k`."""
        return "accuracy" if self.answers and k == 1 else f"pass@{k}"

    @property
    def classes(self) -> dict[str, int]:
        """Verdict class → number of samples, over all problems."""
        total: Counter[str] = Counter()
        for problem in self.problems.values():
            total.update(problem.classes)
        return {kind: total[kind] for kind in CLASSES if total[kind]}

    @property
    def n(self) -> int:
        """Samples per problem."""
        return max(p.n for p in self.problems.values())

    @property
    def samples(self) -> int:
        return sum(p.n for p in self.problems.values())

    @property
    def truncated(self) -> int:
        return sum(p.truncated for p in self.problems.values())

    @property
    def missing(self) -> int:
        return sum(p.missing for p in self.problems.values())

    def write(self, path: Path) -> None:
        """Writes `result.json`, with the scores in it."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        totals = {"classes": self.classes, "truncated": self.truncated, "missing": self.missing, "n": self.n}
        problems = fields.pop("problems")
        scored = {"scores": self.scores(), "categories": self.categories()}
        told = {"status": "finished", **scored, **totals, **fields, "problems": problems}
        write_record(path, EVALUATION, told)

    @classmethod
    def read(cls, path: Path) -> EvaluationOutcome:
        """The inverse of `write`.

        Raises:
          UserError: the file is not the result of a finished evaluation.
        """
        try:
            row = read_record(path).values
            problems = {name: ProblemOutcome(**values) for name, values in row["problems"].items()}
            known = {name: row[name] for name in cls.__dataclass_fields__ if name in row}
            return cls(**{**known, "problems": problems})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not the result of a finished evaluation ({error!r})") from None


def tally(
    names: Sequence[str], n: int, samples: Iterable[Sample], verdicts: Mapping[Key, Verdict],
    opinions: Mapping[Key, Mapping[str, Any]] | None = None, *, official: bool = True,
    categories: Mapping[str, str] | None = None,
) -> dict[str, ProblemOutcome]:  # fmt: skip
    """Counts per problem; samples missing from `n` count as failures.

    `official`: whether the benchmark has its own rule; `categories`: problem → category.

    Raises:
      ValueError: there are more than n samples, or one has no verdict.
    """
    found: dict[str, list[Sample]] = {name: [] for name in names}
    for sample in samples:
        if sample.problem in found:
            found[sample.problem].append(sample)
    outcomes = {}
    for name, there in found.items():
        if len(there) > n:
            raise ValueError(f"{name}: {len(there)} samples of {n}")
        given = [verdicts[sample.key] for sample in there]
        classes = Counter(str(verdict.kind) for verdict in given)
        classes[MISSING] = n - len(there)
        # fmt: off
        outcomes[name] = ProblemOutcome(
            n=n,
            passed=sum(verdict.passed for verdict in given),
            official=sum(verdict.official is True for verdict in given) if official else None,
            classes={kind: classes[kind] for kind in CLASSES if classes[kind]},
            truncated=sum(sample.finish == LENGTH for sample in there),
            confirmed=None if opinions is None else sum(
                verdicts[sample.key].passed and not contradicts(opinions.get(sample.key)) for sample in there
            ),
            category=(categories or {}).get(name),
        )
        # fmt: on
    return outcomes


def contradicts(opinion: Mapping[str, Any] | None) -> bool:
    """Whether a second opinion, by stimulus or proof, says that the design differs from the reference."""
    return opinion is not None and (opinion["kind"] != VerdictClass.PASS or opinion["equivalent"] is False)


def disagreements(
    samples: Iterable[Sample], verdicts: Mapping[Key, Verdict], opinions: Mapping[Key, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """One row for each sample on which bench and second opinion disagree."""
    rows = []
    for sample in samples:
        opinion = opinions.get(sample.key)
        if opinion is None or verdicts[sample.key].passed != contradicts(opinion):
            continue
        proof = "yosys finds an input on which it differs" if opinion["equivalent"] is False else opinion["detail"]
        rows.append({
            "problem": sample.problem, "sample": sample.sample, "verdict": str(verdicts[sample.key].kind),
            "second": "differs" if contradicts(opinion) else "agrees", "detail": proof,
        })  # fmt: skip
    return rows
