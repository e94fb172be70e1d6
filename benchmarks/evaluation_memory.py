"""Whether a judge that serves for long holds its memory: distinct completions, a share of them again, in one process.

    python -m benchmarks.evaluation_memory [--verdicts 100000] [--simulated 1.0] [--workers 2] [--out rows.jsonl]

Answers to the package's own problems: right ones, mutants, ones that don't compile, ones that print, and none at all.
All but the share `--simulated` of them are spoilt by a system task, which the workers' scanner refuses: those go the
whole way but for the simulator, so that 100,000 verdicts take minutes. First the service's memory of verdicts, which is
bounded, is filled with such ones. Then every thousand verdicts a row is printed: memory of the service and of its
workers (resident, MiB), open files, and what is in /dev/shm and in the temporary folder under the judge's name.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from gemma4_tpu.evals.judge_server import REMEMBERED
from gemma4_tpu.evals.problems import Problem
from gemma4_tpu.evals.reward import JudgeProcess
from gemma4_tpu.evals.verilog.mutants import mutants
from gemma4_tpu.evals.verilog.smoke import VerilogSmoke
from gemma4_tpu.evals.verilog.verdict import reference_as_answer
from gemma4_tpu.evals.verilog.work_folder import MEMORY_FOLDER, PREFIX

EVERY, BATCH = 1000, 250
AGAIN = 0.1
"""Share of samples that were judged not long before."""


def samples(problems: list[Problem], seed: int, simulated: float) -> Iterator[tuple[str, str]]:
    """(problem's name, completion), without end; each text is new, but for the share `AGAIN`."""
    rng = random.Random(seed)
    past: list[tuple[str, str]] = []
    number = 0
    while True:
        if past and rng.random() < AGAIN:
            yield rng.choice(past)
            continue
        problem = rng.choice(problems)
        right = reference_as_answer(problem)
        spoilt = mutants(right)
        code = rng.choice(
            [
                right, right, rng.choice(spoilt) if spoilt else right, right.replace("endmodule", "", 1),
                right.replace("endmodule", 'initial $display("Mismatches: 0 in 20 samples");\nendmodule', 1), "",
            ]
        )  # fmt: skip
        if rng.random() >= simulated:
            code = right.replace("endmodule", f'initial $fopen("{number}");\nendmodule', 1)
        number += 1
        past = [*past[-999:], (problem.name, f"Number {number}.\n\n```verilog\n{code}\n// {number}\n```\n")]
        yield past[-1]


def usage(judge: JudgeProcess) -> dict[str, float]:
    """What the judge's processes hold now."""
    service = psutil.Process(judge.pid)
    workers = [child for child in service.children() if "spawn_main" in " ".join(child.cmdline())]
    own = [service, *workers]
    left = [
        path for place in (MEMORY_FOLDER, Path(tempfile.gettempdir())) for path in place.glob(f"{PREFIX}{judge.pid}_*")
    ]
    return {
        "service_mib": service.memory_info().rss / 2**20,
        "workers_mib": sum(worker.memory_info().rss for worker in workers) / 2**20,
        "processes": len(own),
        "open_files": sum(process.num_fds() for process in own),
        "files_in_folder": sum(1 for folder in left for _ in folder.rglob("*")),
        "folders": len(left),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verdicts", type=int, default=100_000)
    parser.add_argument("--simulated", type=float, default=1.0, help="share of samples that are not refused before")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="rows as JSON lines")
    args = parser.parse_args()
    problems = VerilogSmoke().load()
    refused, asked = samples(problems, args.seed + 1, 0.0), samples(problems, args.seed, args.simulated)
    started, passed = time.monotonic(), 0
    with JudgeProcess("eval=verilog_smoke", f"eval.judge.workers={args.workers}") as judge:
        for _ in range(0, 5 * REMEMBERED // 4, BATCH):  # some of them come again
            judge([next(refused) for _ in range(BATCH)])
        for done in range(0, args.verdicts + 1, BATCH):
            if done % EVERY == 0:
                row = {"verdicts": done, "seconds": round(time.monotonic() - started), "passed": passed, **usage(judge)}
                print(json.dumps({key: round(value, 1) for key, value in row.items()}), flush=True)
                if args.out:
                    with args.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
            passed += sum(row["passed"] for row in judge([next(asked) for _ in range(BATCH)]))


if __name__ == "__main__":
    main()
