"""How strict a benchmark's benches are: which accept a design that does nothing, and how many mistakes they find.

A bench that accepts a stub is *vacuous*, unless the reference does no more than the stub (a benchmark can request a
constant): then the stub passes the second opinion too.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from gemma4_tpu.config.tasks import JudgeConfig
from gemma4_tpu.evals.problems import Problem
from gemma4_tpu.evals.verilog.mutants import mutants
from gemma4_tpu.evals.verilog.ports import Port, read_ports
from gemma4_tpu.evals.verilog.recall import Memory, fingerprint
from gemma4_tpu.evals.verilog.second import second_name, second_problem
from gemma4_tpu.evals.verilog.stubs import stubs
from gemma4_tpu.evals.verilog.verdict import reference_as_answer
from gemma4_tpu.evals.verilog.verilog_judge import VerilogJudge

SEED = 0  # for the second stimulus here: grades are cached, and should be reproducible
MOST_MUTANTS = 8  # of each reference


@dataclass(frozen=True, kw_only=True)
class Strength:
    """The strength of one bench."""

    ungraded: str | None = None
    """Why it is not graded: no reference, ports that stubs can't have, or a reference that fails here."""
    accepted: list[str] = field(default_factory=list)
    """Stubs that pass although they are wrong."""
    trivial: list[str] = field(default_factory=list)
    """Stubs that pass because the reference does no more under random stimulus."""
    mutants: int | None = None
    """Number of the reference's mutants that build; null: not tried."""
    survivors: int = 0
    """Number of mutants that pass."""
    wrong_survivors: int = 0
    """Number of these that differ from the reference under random stimulus."""


def reference_ports(
    problems: Sequence[Problem], judge: VerilogJudge
) -> tuple[dict[str, list[Port]], dict[str, str]]:  # fmt: skip
    """(problem → ports of its reference, problem → why they are unavailable)."""
    asked = {p.name: judge.task(read_ports, p.reference, p.reference_top) for p in problems if p.reference}
    found = {p.name: asked[p.name].result() if p.name in asked else "is missing" for p in problems}
    return (
        {name: ports for name, ports in found.items() if not isinstance(ports, str)},
        {name: f"the reference {reason}" for name, reason in found.items() if isinstance(reason, str)},
    )


def grade(
    problems: Sequence[Problem], judge: VerilogJudge, cannot_pass: Mapping[str, str], config: JudgeConfig, *,
    with_mutants: bool = False, fresh: bool = False,
) -> dict[str, Strength]:  # fmt: skip
    """The strength of each problem's bench; earlier grades come from the cache, unless `fresh`.

    Args:
      problems: problems prepared by `judge`.
      judge: judges stubs and mutants as it would answers.
      cannot_pass: problems whose reference fails here.
      config: names the cache folder.
      with_mutants: also count mutants (takes several times as long).
      fresh: ignore the cache.
    """
    memory = Memory("benches", config, judge.tools)
    known = {} if fresh else {key: Strength(**row) for key, row in memory.load().items()}
    keys = {problem.name: fingerprint(problem) for problem in problems}
    grades = {name: known[key] for name, key in keys.items() if key in known}
    missing = [p for p in problems if p.name not in grades or (with_mutants and grades[p.name].mutants is None)]
    found = _graded(missing, judge, cannot_pass, with_mutants)
    memory.store({keys[name]: asdict(strength) for name, strength in found.items() if not strength.ungraded})
    return {problem.name: {**grades, **found}[problem.name] for problem in problems}


def _graded(
    problems: Sequence[Problem], judge: VerilogJudge, cannot_pass: Mapping[str, str], with_mutants: bool
) -> dict[str, Strength]:
    ports, ungraded = reference_ports(problems, judge)
    ungraded |= {p.name: "its reference fails here" for p in problems if p.name in cannot_pass}
    graded = [problem for problem in problems if problem.name not in ungraded]
    designs = [(p, name, code) for p in graded for name, code in stubs(p.top, ports[p.name]).items()]
    if with_mutants:
        designs += [(p, _MUTANT, code) for p in graded for code in _mutants(p)]
    passing, built = _passing(designs, judge)
    seconds = {p.name: second_problem(p, ports[p.name], SEED) for p in graded if any(d[0] is p for d in passing)}
    judge.prepare(list(seconds.values()), fresh=True, keep=False)
    right, _ = _passing([(seconds[p.name], name, code) for p, name, code in passing], judge)
    return {
        **{name: Strength(ungraded=reason) for name, reason in ungraded.items()},
        **{p.name: _strength(p.name, built, passing, right, with_mutants) for p in graded},
    }


_MUTANT = "mutant"
_UNBUILT = ("text", "build")
"""Measures that can refuse a design before it runs."""
Design = tuple[Problem, str, str]
"""(problem, name of the stub or `mutant`, source)"""


def _passing(designs: Sequence[Design], judge: VerilogJudge) -> tuple[list[Design], Counter[str]]:
    """(designs that pass, problem → number of mutants with a result)."""
    answers = ((problem, f"```verilog\n{code}\n```") for problem, _, code in designs)
    verdicts = list(judge.judge_all(answers, official=False))
    came = [d for d, v in zip(designs, verdicts, strict=True) if v.passed or v.refused_by not in _UNBUILT]
    passing = [design for design, verdict in zip(designs, verdicts, strict=True) if verdict.passed]
    return passing, Counter(problem.name for problem, name, _ in came if name == _MUTANT)


def _strength(
    problem: str, built: Counter[str], passing: Sequence[Design], right: Sequence[Design], with_mutants: bool
) -> Strength:
    ours = [(name, code) for p, name, code in passing if p.name == problem]
    equal = {(name, code) for p, name, code in right if p.name == second_name(problem)}
    mutants = [design for design in ours if design[0] == _MUTANT]
    return Strength(
        accepted=[name for name, code in ours if name != _MUTANT and (name, code) not in equal],
        trivial=[name for name, code in ours if name != _MUTANT and (name, code) in equal],
        mutants=built[problem] if with_mutants else None,
        survivors=len(mutants),
        wrong_survivors=len([design for design in mutants if design not in equal]),
    )


def _mutants(problem: Problem) -> list[str]:
    """A fixed selection of the reference's mutants."""
    found = mutants(reference_as_answer(problem))
    return random.Random(problem.name).sample(found, min(MOST_MUTANTS, len(found)))


def vacuous(grades: Mapping[str, Strength]) -> dict[str, list[str]]:
    """Problem → stubs that its bench accepts, for vacuous benches."""
    return {name: grade.accepted for name, grade in grades.items() if grade.accepted}


def sentences(grades: Mapping[str, Strength]) -> list[str]:
    """Sentences for people: how many benches accept which stub, how many mutants they find, what is not graded."""
    graded = {name: grade for name, grade in grades.items() if not grade.ungraded}
    accepting = vacuous(graded)
    kinds = Counter(stub for accepted in accepting.values() for stub in accepted)
    listed = f" ({', '.join(f'{stub}: {count}' for stub, count in kinds.most_common())})" if kinds else ""
    said = [f"{len(accepting)} of {len(graded)} benches accept a design that does nothing{listed}."]
    if accepting:
        said.append(f"Vacuous: {', '.join(accepting)}.")
    if tried := [grade for grade in graded.values() if grade.mutants is not None]:
        total, survivors = (sum(getattr(g, key) or 0 for g in tried) for key in ("mutants", "survivors"))
        wrong = sum(grade.wrong_survivors for grade in tried)
        said.append(
            f"{survivors} of {total} mutants of the references pass; {wrong} of these differ from the reference under"
            " random stimulus."
        )
    reasons = Counter(grade.ungraded for grade in grades.values() if grade.ungraded)
    said += [f"Not graded: {count}, {reason}." for reason, count in reasons.items()]
    return said


def to_rows(grades: Mapping[str, Strength]) -> dict[str, dict[str, Any]]:
    """For JSON."""
    return {name: asdict(grade) for name, grade in grades.items()}
