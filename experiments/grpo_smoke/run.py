"""The whole of this experiment: a start from few reference answers, four ways to continue, and the results.

    python -m experiments.grpo_smoke.run [--out outputs/grpo_smoke]

Leaves `record.json` in the output folder; what has ended is not repeated.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from experiments.grpo_smoke.compute import passes
from experiments.small_runs import SmallRuns
from experiments.verilog_smoke.make_data import make_problems, write_jsonl_gz
from experiments.verilog_smoke.prompts import answer, chat_row
from gemma4_tpu.tracking.files import write_json
from gemma4_tpu.tracking.metrics import read_metrics

PROBLEMS, ANSWERED = 1000, 400
"""Training problems, and how many of them have a reference answer; of the others there are test benches alone."""
START_UPDATES = 160
UPDATES = {"grpo": 20, "expert_iteration": 25}
"""By objective; each is of 16 prompts × 8 answers that have something to teach. That they cost as much is the record's
to say."""
TUNED = {"tuned": "few", "tuned_on_all": "all"}
"""Run → which rows."""
ON_POLICY = [
    "rollouts.prompts=16", "rollouts.samples=8", "rollouts.slots=64", "rollouts.new_tokens=128",
    "rollouts.validation_prompts=32", "trainer.global_batch_sequences=80", "trainer.microbatches=20",
    "optimizer.learning_rate=2e-3", "optimizer.schedule=constant", "optimizer.warmup_updates=3",
]  # fmt: skip


def make_data(out: Path) -> dict[str, Path]:
    """The few rows with answers, the rows of all problems, and the problems that have only their benches."""
    made = make_problems(0, PROBLEMS, heldout=False)
    rows = [chat_row(problem.id, problem.prompt, answer(design)) for design, problem in made]
    contents = {
        "few": rows[:ANSWERED], "all": rows, "problems": [problem.to_row() for _, problem in made[ANSWERED:]]
    }  # fmt: skip
    places = {name: out / f"{name}.jsonl.gz" for name in contents}
    for name, content in contents.items():
        write_jsonl_gz(places[name], content)
    return places


def train(runs: SmallRuns, data: dict[str, Path]) -> dict[str, float]:
    """Start and ways on; the passes over a token that each way has spent."""
    few, problems = f"data.train={data['few']}", data["problems"]
    start = runs.train("start", few, f"trainer.max_updates={START_UPDATES}")
    for name, updates in UPDATES.items():
        runs.train(
            name, few, f"lora.start={start}", f"objective={name}", f"rollouts.problems_path={problems}", *ON_POLICY,
            f"trainer.max_updates={updates}",
        )  # fmt: skip
    budget = passes(runs.out / "grpo", problems)
    updates = round(budget / passes(runs.out / "start", problems) * START_UPDATES)  # every one is of full rows
    for name, rows in TUNED.items():
        runs.train(name, f"data.train={data[rows]}", f"lora.start={start}", f"trainer.max_updates={updates}")
    return {name: passes(runs.out / name, problems) for name in (*UPDATES, *TUNED)}


def main() -> None:
    """Runs what is missing, and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("outputs/grpo_smoke"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    runs = SmallRuns(out)
    spent = train(runs, make_data(out))
    others = [name for name in spent if name != "grpo"]
    pairs = [(name, "start") for name in spent] + [("grpo", name) for name in others]
    record = {"token_passes": spent, "validation": validation(out), **runs.record(["start", *spent], pairs)}
    write_json(out / "record.json", record)
    print(json.dumps(record, indent=1))


def validation(out: Path) -> dict[str, list[dict[str, Any]]]:
    """Of what samples: rewards on training problems that were set aside, over the updates."""
    return {
        name: [{key: value for key, value in row.items() if key != "rewards"} for row in rows]
        for name in UPDATES
        if (rows := read_metrics(out / name / "validation.jsonl"))
    }


if __name__ == "__main__":
    main()
