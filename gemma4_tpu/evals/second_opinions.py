"""Second opinions on the samples of an evaluation, in addition to verdicts: random stimulus, proofs, lint and size.

```
second_opinions.jsonl   {"problem", "sample", "kind", "mismatches", "samples", "equivalent", "lint", "cells", …}
second_opinion.json     {"seed", "without": {problem: why there is none}}
```
"""

from __future__ import annotations

import logging
import secrets
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma4_tpu.evals.problems import Problem, Verdict, VerdictClass
from gemma4_tpu.evals.store import Key, Rows, Sample, alike
from gemma4_tpu.evals.verilog import synthesis
from gemma4_tpu.evals.verilog.extract import code_of
from gemma4_tpu.evals.verilog.ports import Roles
from gemma4_tpu.evals.verilog.second import second_name, second_problem
from gemma4_tpu.evals.verilog.strength import reference_ports
from gemma4_tpu.evals.verilog.verilog_judge import VerilogJudge
from gemma4_tpu.tracking.records import STIMULUS, read_record, write_record
from gemma4_tpu.tracking.typed import FLAG, TEXT, WHOLE, choice, fields, maybe

log = logging.getLogger(__name__)

OPINIONS_FILE, STIMULUS_FILE = "second_opinions.jsonl", "second_opinion.json"
LINT, SIZE = "lint", "size"


@dataclass(frozen=True)
class Second:
    """The problems of the second opinion, ready for judging."""

    seed: int
    """Seed of the stimulus."""
    problems: dict[str, Problem]
    """By the name of the original problem."""
    combinational: frozenset[str]
    without: dict[str, str]
    """Problem → why there is no second opinion."""


def prepare(problems: Sequence[Problem], judge: VerilogJudge, seed: int | None, folder: Path) -> Second:
    """Makes benches with fresh stimulus for all problems with a reference.

    Args:
      problems: problems prepared by `judge`.
      judge: judges the references under the new stimulus.
      seed: seed of the stimulus; None: the one recorded in `folder`, or else a new one.
      folder: the record's.
    """
    recorded = folder / STIMULUS_FILE
    if seed is None:
        seed = int(read_record(recorded, STIMULUS).values["seed"]) if recorded.is_file() else secrets.randbits(31)
    ports, without = reference_ports(problems, judge)
    seconds = {p.name: second_problem(p, ports[p.name], seed) for p in problems if p.name in ports}
    check = judge.prepare(list(seconds.values()), fresh=True, keep=False)
    for name in seconds:
        if why := check.cannot_pass.get(second_name(name)):
            without[name] = f"the reference disagrees with itself: {why}"
    by_name = {problem.name: problem for problem in problems}
    second = Second(
        seed=seed,
        problems={name: problem for name, problem in seconds.items() if name not in without},
        combinational=frozenset(n for n in seconds if not Roles.of(ports[n], by_name[n].reference).clocks),
        without=without,
    )
    write_record(recorded, STIMULUS, {"seed": seed, "without": without})
    return second


_OPINION = fields({
    "kind": choice(*VerdictClass), "detail": TEXT, "equivalent": maybe(FLAG), LINT: maybe(WHOLE), "cells": maybe(WHOLE),
    "transistors": maybe(WHOLE),
})  # fmt: skip


def second_opinions(
    samples: Sequence[Sample], verdicts: Mapping[Key, Verdict], second: Second, judge: VerilogJudge,
    columns: Sequence[str], path: Path,
) -> dict[Key, dict[str, Any]]:  # fmt: skip
    """One row for each sample that ran to the end of its own bench, passed or not; equal completions run once.

    Args:
      samples: the samples of one subject.
      verdicts: the verdicts on them.
      second: see `prepare`.
      judge: runs everything in its sandbox.
      columns: `lint`, `size`: also what verilator and yosys report about samples that pass.
      path: file that keeps the rows; existing rows are not made again.
    """
    with Rows(path, _OPINION) as rows:
        fresh = [s for s in samples if s.problem in second.problems and s.key not in rows.rows]
        equal = alike(s for s in fresh if verdicts[s.key].kind in (VerdictClass.PASS, VerdictClass.MISMATCH))
        if equal:
            log.info("second opinions on %d samples, %d of them distinct", sum(map(len, equal.values())), len(equal))
        extras = [
            _extras(second, problem, completion, judge, columns) if verdicts[same[0].key].passed else {}
            for (problem, completion), same in equal.items()
        ]
        opinions = judge.judge_all(
            ((second.problems[problem], completion) for problem, completion in equal), official=False
        )
        for same, opinion, futures in zip(equal.values(), opinions, extras, strict=True):
            more = {name: future.result() for name, future in futures.items()}
            cells, transistors = more.pop(SIZE, (None, None))
            row = {
                "kind": str(opinion.kind), "detail": opinion.detail, "mismatches": opinion.mismatches,
                "samples": opinion.samples, "equivalent": None, LINT: None, "cells": cells,
                "transistors": transistors, **more,
            }  # fmt: skip
            for sample in same:
                rows.add_for(sample, row)
        return dict(rows.rows)


def _extras(
    second: Second, name: str, completion: str, judge: VerilogJudge, columns: Sequence[str]
) -> dict[str, Future[Any]]:
    """Requests to other tools about a sample that passes, as far as they are installed."""
    problem = second.problems[name]
    code = code_of(completion, problem)
    yosys, verilator = synthesis.installed(synthesis.YOSYS), synthesis.installed(synthesis.VERILATOR)
    level = synthesis.level_for_yosys(judge)
    asked: dict[str, Future[Any]] = {}
    if yosys and level and name in second.combinational:
        pair = (problem.reference, problem.reference_top, code, problem.top)
        asked["equivalent"] = judge.task(synthesis.equivalent, yosys, *pair, level=level)
    if yosys and level and SIZE in columns:
        asked[SIZE] = judge.task(synthesis.size, yosys, code, problem.top, level=level)
    if verilator and LINT in columns:
        asked[LINT] = judge.task(synthesis.lint, verilator, code, problem.top)
    return asked


def columns(opinions: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """For lint warnings, cells and transistors: number of samples with a figure, and the median; and the proofs."""
    rows = list(opinions)
    known = {name: [row[name] for row in rows if row.get(name) is not None] for name in (LINT, "cells", "transistors")}
    proofs = Counter(row["equivalent"] for row in rows)
    return {
        "columns": {name: {"samples": len(v), "median": statistics.median(v)} for name, v in known.items() if v},
        "proofs": {"equal": proofs[True], "different": proofs[False]},
    }
