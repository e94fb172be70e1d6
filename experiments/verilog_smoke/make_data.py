"""Make the embedded `verilog_smoke` data: `python -m experiments.verilog_smoke.make_data [--mutants]`.

Writes `train.jsonl.gz`, `heldout.jsonl.gz` (chat rows) and `heldout_problems.jsonl.gz` (with test benches). Every
problem is simulated; one whose reference does not pass its own bench is dropped and counted. The same seed gives the
same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import logging
from collections import Counter
from pathlib import Path
from random import Random

from experiments.verilog_smoke.design import Design, MadeProblem
from experiments.verilog_smoke.families import FAMILIES, draw_designs
from experiments.verilog_smoke.prompts import answer, chat_row, specification
from experiments.verilog_smoke.simulate import all_pass
from experiments.verilog_smoke.testbench import make_testbench
from gemma4_tpu.assets import ROOT
from gemma4_tpu.evals.verilog.mutants import mutants

log = logging.getLogger(__name__)


def make_problems(seed: int, count: int, *, heldout: bool) -> list[tuple[Design, MadeProblem]]:
    """`count` problems without repeats (fewer if the families run out), the families taking turns. Not simulated."""
    rng = Random(f"{seed}-{'heldout' if heldout else 'train'}")
    numbers: Counter[str] = Counter()
    made = []
    for design in itertools.islice(draw_designs(rng, heldout=heldout), count):
        numbers[design.family] += 1
        made.append(
            (
                design,
                MadeProblem(
                    id=f"{'heldout' if heldout else 'train'}_{design.family}_{numbers[design.family]:04d}",
                    family=design.family,
                    prompt=specification(design, rng),
                    reference=design.module(),
                    testbench=make_testbench(design),
                ),
            )
        )
    return made


def keep_correct(made: list[tuple[Design, MadeProblem]]) -> list[tuple[Design, MadeProblem]]:
    """Those whose reference passes its own test bench; the others are counted in the log by family."""
    verdicts = all_pass((p.reference, p.reference, p.testbench) for _, p in made)
    dropped = Counter(p.family for (_, p), good in zip(made, verdicts, strict=True) if not good)
    log.info("%d problems simulated, %d dropped %s", len(made), sum(dropped.values()), dict(dropped) or "")
    return [pair for pair, good in zip(made, verdicts, strict=True) if good]


def kill_rate(problems: list[MadeProblem]) -> dict[str, tuple[int, int]]:
    """(killed, mutants) by family and under `all`."""
    cases = [(p, mutant) for p in problems for mutant in mutants(p.reference)]
    survived = all_pass((mutant, p.reference, p.testbench) for p, mutant in cases)
    killed: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for (problem, mutant), alive in zip(cases, survived, strict=True):
        for key in (problem.family, "all"):
            total[key] += 1
            killed[key] += not alive
        if alive:
            log.debug("survivor of %s:\n%s", problem.id, mutant)
    return {key: (killed[key], total[key]) for key in total}


def write_jsonl_gz(path: Path, rows: list[dict]) -> None:
    """Compressed JSON lines, without a time stamp, so that equal rows give equal bytes."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))
    log.info("%s: %d rows, %.0f KB", path.name, len(rows), path.stat().st_size / 1e3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "verilog_smoke", help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-rows", type=int, default=4000)
    parser.add_argument("--heldout-rows", type=int, default=200)
    parser.add_argument("--problems", type=Path, help="write only the training rows' problems with their benches, here")
    parser.add_argument("--mutants", action="store_true", help="also report how many mutants the held-out benches kill")
    parser.add_argument("--verbose", action="store_true", help="show surviving mutants")
    args = parser.parse_args()
    logging.basicConfig(level=logging.DEBUG if args.verbose else logging.INFO, format="%(message)s")

    train = keep_correct(make_problems(args.seed, args.train_rows, heldout=False))
    if args.problems:  # to learn from the judge: they do not travel with the package
        write_jsonl_gz(args.problems, [p.to_row() for _, p in train])
        return
    args.out.mkdir(parents=True, exist_ok=True)
    heldout = keep_correct(make_problems(args.seed, args.heldout_rows, heldout=True))
    for name, pairs in (("train", train), ("heldout", heldout)):
        write_jsonl_gz(args.out / f"{name}.jsonl.gz", [chat_row(p.id, p.prompt, answer(d)) for d, p in pairs])
    write_jsonl_gz(args.out / "heldout_problems.jsonl.gz", [p.to_row() for _, p in heldout])
    log.info("%d families", len(FAMILIES))
    if args.mutants:
        for family, (killed, total) in sorted(kill_rate([p for _, p in heldout]).items()):
            log.info("mutants killed, %s: %d of %d", family, killed, total)


if __name__ == "__main__":
    main()
