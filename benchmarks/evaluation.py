"""What a verdict costs: CPU seconds at each level of isolation that works here, beside Icarus Verilog run by hand.

    python -m benchmarks.evaluation --problems <clone of verilog-eval> [--samples 5]

Answers are the references, and a mutant of each, as often as `--samples` says. By turns each is judged, as by
`python -m gemma4_tpu.judge`, and compiled and simulated by hand: `iverilog` and `vvp`, without sandbox, limits or any
check. CPU seconds are those of all processes: other load changes them less than seconds, and both alike.
"""

from __future__ import annotations

import argparse
import random
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import psutil

from benchmarks.pages import measured
from gemma4_tpu.config.tasks import JudgeConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.evals.problems import Problem
from gemma4_tpu.evals.verilog.iverilog import Tools
from gemma4_tpu.evals.verilog.mutants import mutants
from gemma4_tpu.evals.verilog.sandbox import Level
from gemma4_tpu.evals.verilog.scan import without_dumps
from gemma4_tpu.evals.verilog.verdict import reference_as_answer
from gemma4_tpu.evals.verilog.verilog_eval import VerilogEval
from gemma4_tpu.evals.verilog.verilog_judge import VerilogJudge
from gemma4_tpu.markdown import table

LONGEST_BENCH = 10_000
"""Comparisons. Benches that make more simulate for up to seconds, whoever runs them; they are left out."""
HEADS = (
    "level", "answers", "verdicts", "passed", "CPU ms per verdict", "mean", "by hand", "ratio",
    "per second (*estimated*)",
)  # fmt: skip
KINDS = ("references", "mutants")


@dataclass(frozen=True)
class LevelRow:
    """One kind of answers at one level."""

    level: str
    kind: str
    verdicts: int
    passed: int
    programs_ms: float
    """CPU milliseconds of the programs of a verdict: median over problems of the mean over its answers."""
    judge_ms: float
    """The same of the judge's own processes for a verdict, mean: a clock's tick is too long for one of them."""
    mean_ms: float
    """CPU milliseconds of a verdict, mean: with the long benches."""
    by_hand_ms: float
    """CPU milliseconds of `iverilog` and `vvp`, median."""

    @property
    def verdict_ms(self) -> float:
        return self.programs_ms + self.judge_ms


def answers(problems: list[Problem], kind: str, samples: int) -> list[tuple[Problem, str]]:
    """(problem, code), each as a text of its own."""
    rng = random.Random(0)
    found = []
    for problem in problems:
        right = reference_as_answer(problem)
        codes = [right] if kind == KINDS[0] else mutants(right)
        found += [(problem, f"{rng.choice(codes)}\n// {number}\n") for number in range(samples) if codes]
    return found


def by_hand(tools: Tools, folder: Path, problem: Problem, code: str) -> float:
    """CPU seconds of compiling and simulating the benchmark's own files."""
    files = {"answer.sv": code, "bench.sv": without_dumps(problem.testbench), "reference.sv": problem.reference}
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for command in (tools.build(problem.bench_top, "program.vvp", [*files]), tools.simulate("program.vvp")):
        subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def judge_seconds(judge_processes: list[psutil.Process]) -> float:
    """CPU seconds of this process and of the judge's so far, with all that these ran; not what was run by hand."""
    mine = resource.getrusage(resource.RUSAGE_SELF)
    total = mine.ru_utime + mine.ru_stime
    for process in judge_processes:
        times = process.cpu_times()
        total += times.user + times.system + times.children_user + times.children_system
    return total


def measure(level: Level, problems: list[Problem], samples: int, cache: Path) -> list[LevelRow]:
    """One row for each kind of answers."""
    rows = []
    with (
        VerilogJudge(JudgeConfig(sandbox=level, cache_dir=str(cache), workers=1)) as judge,
        tempfile.TemporaryDirectory() as folder,
    ):
        golden = judge.prepare(problems).golden
        short = [p for p in problems if not golden[p.name].failure and (golden[p.name].samples or 0) <= LONGEST_BENCH]
        for problem in short:  # the worker makes the benches ready
            judge.submit(problem, f"```verilog\n{reference_as_answer(problem)}\n```", official=False).result()
        judge_processes = psutil.Process().children(recursive=True)  # looked for once: that takes longer than a verdict
        for kind in KINDS:
            given, hand, spent, passed = answers(short, kind, samples), [], 0.0, 0
            programs: dict[str, list[float]] = {}
            for problem, code in given:
                hand.append(1e3 * by_hand(judge.tools, Path(folder), problem, code))
                before = judge_seconds(judge_processes)
                verdict = judge.submit(problem, f"```verilog\n{code}```", official=False).result()
                spent += 1e3 * (judge_seconds(judge_processes) - before)
                programs.setdefault(problem.name, []).append(1e3 * verdict.cpu_seconds)
                passed += verdict.passed
            count = len(given)
            own = (spent - sum(map(sum, programs.values()))) / count
            typical = median(map(mean, programs.values()))
            row = LevelRow(level, kind, count, passed, typical, own, spent / count, median(hand))
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
    return rows


def lines_of(rows: list[LevelRow]) -> Iterator[str]:
    """The lines of the table."""
    cells = [
        [
            *(row.level, row.kind, row.verdicts, row.passed, f"{row.verdict_ms:.1f}", f"{row.mean_ms:.1f}"),
            *(f"{row.by_hand_ms:.1f}", f"{row.verdict_ms / row.by_hand_ms:.2f}", f"{2e3 / row.verdict_ms:.0f}"),
        ]
        for row in rows
    ]
    return table(HEADS, cells, "llrrrrrrr")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=Path, required=True, help="a clone of verilog-eval")
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("outputs/bench_evaluation"), help="for the self-check's file")
    args, stamp = parser.parse_args(), measured()
    problems = VerilogEval().load(args.problems)
    rows: list[LevelRow] = []
    for level in (Level.BUBBLEWRAP, Level.LANDLOCK):
        try:
            rows += measure(level, problems, args.samples, args.work)
        except UserError as refusal:
            print(refusal, file=sys.stderr)
    with VerilogJudge(JudgeConfig(workers=1, cache_dir=str(args.work))) as judge:
        simulator = judge.tools.name
    print("\n".join([f"{stamp} {simulator}.", "", *lines_of(rows)]))


if __name__ == "__main__":
    main()
