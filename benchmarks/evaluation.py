"""Judging speed: simulations per second at each level of isolation that works on this machine.

    python -m benchmarks.evaluation --problems <clone of verilog-eval> [--samples 5] [--out benchmarks/evaluation.md]

Each of the 156 references is judged as an answer `--samples` times (5: 780 simulations, an evaluation with n = 5),
after the self-check, on all cores. CPU seconds are those of all processes, the judge's own included.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import time
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from gemma4_tpu.config.tasks import JudgeConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.evals.problems import Problem
from gemma4_tpu.evals.verilog.judge import VerilogJudge
from gemma4_tpu.evals.verilog.sandbox import Level
from gemma4_tpu.evals.verilog.verdict import reference_as_answer
from gemma4_tpu.evals.verilog.verilog_eval import VerilogEval
from gemma4_tpu.markdown import table


@dataclass(frozen=True)
class Row:
    """One level."""

    level: str
    check_seconds: float
    seconds: float
    cpu_seconds: float
    simulations: int
    passed: int


def measure(level: Level, problems: list[Problem], samples: int, cache: Path) -> Row:
    """Judges every reference `samples` times at one level."""
    config = JudgeConfig(sandbox=level, cache_dir=str(cache))
    with VerilogJudge(config) as judge:
        check = judge.prepare(problems, fresh=True)
    before = _cpu_seconds()
    with VerilogJudge(config) as judge:
        judge.prepare(problems)
        answers = [(p, f"```verilog\n{reference_as_answer(p)}\n```") for _ in range(samples) for p in problems]
        started = time.monotonic()
        kinds = Counter(verdict.kind for verdict in judge.judge_all(answers))
        seconds = time.monotonic() - started
    return Row(level, check.seconds, seconds, _cpu_seconds() - before, len(answers), kinds["pass"])


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


HEADS = ("level", "self-check s", "simulations", "seconds", "CPU seconds", "idle: seconds (*estimated*)", "passed")


def _cells(row: Row, cores: int) -> list[object]:
    seconds = [f"{row.seconds:.1f}", f"{row.cpu_seconds:.1f}", f"{row.cpu_seconds / cores:.1f}"]
    return [row.level, f"{row.check_seconds:.1f}", row.simulations, *seconds, row.passed]


def report(rows: list[Row], simulator: str, command: str) -> str:
    """The table as Markdown."""
    cores = len(os.sched_getaffinity(0))
    lines = [
        "# Judging by simulation",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {cores} CPU cores ({platform.machine()}), {simulator}; load over five minutes"
        f" {os.getloadavg()[1]:.1f}, of which the judge's workers are {cores}. *Measured* by",
        "",
        f"    {command}",
        "",
        *table(HEADS, [_cells(row, cores) for row in rows], "lrrrrrr"),
        "One simulation is one verdict, strict and official: scan, design built and run, bench run with its responses.",
        f"The estimate is CPU seconds, the judge's own included, divided by {cores} cores.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=Path, required=True, help="a clone of verilog-eval")
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("outputs/bench_evaluation"), help="for the self-check's file")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/evaluation.md"))
    args = parser.parse_args()
    problems = VerilogEval().load(args.problems)
    rows = []
    for level in (Level.BUBBLEWRAP, Level.LANDLOCK):
        try:
            rows.append(measure(level, problems, args.samples, args.work))
            print(rows[-1], flush=True)
        except UserError as refusal:
            print(refusal)
    with VerilogJudge(JudgeConfig(workers=1, cache_dir=str(args.work))) as judge:
        simulator = judge.tools.name
    command = f"python -m benchmarks.evaluation --problems <verilog-eval> --samples {args.samples}"
    args.out.write_text(report(rows, simulator, command))


if __name__ == "__main__":
    main()
