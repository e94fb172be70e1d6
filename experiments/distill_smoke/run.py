"""The whole of this experiment: teacher, start, distillation, supervised tuning on as many tokens, and the results.

    python -m experiments.distill_smoke.run [--out outputs/distill_smoke]

Leaves `record.json` in the output folder; what has ended is not repeated.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from experiments.distill_smoke.divergence import divergences
from experiments.small_runs import SmallRuns
from gemma4_tpu.tracking.files import write_json

TEACHER_UPDATES, START_UPDATES, UPDATES = 120, 8, 16
"""Of the distillation each is one of 16 rows, the answers to 12 prompts × 2; of the others, of 4 rows."""
HELDOUT_PROMPTS, NEW_TOKENS = 100, 96


def train(runs: SmallRuns) -> dict[str, str]:
    """Teacher, start, and both ways on from there."""
    teacher = runs.train("teacher", f"trainer.max_updates={TEACHER_UPDATES}", "optimizer.learning_rate=4e-3")
    start = runs.train("start", "lora.rank=2", f"trainer.max_updates={START_UPDATES}", "optimizer.warmup_updates=0")
    further = [
        f"lora.start={start}", "lora.rank=2", "optimizer.warmup_updates=2", "trainer.global_batch_sequences=16",
        "trainer.microbatches=4",
    ]  # fmt: skip
    distilled = runs.train(
        "distilled", *further, f"trainer.max_updates={UPDATES}", "objective=distill", f"objective.teacher={teacher}",
        "rollouts.prompts=12", "rollouts.samples=2", "rollouts.slots=24", f"rollouts.new_tokens={NEW_TOKENS}",
        "rollouts.max_kl=null",
    )  # fmt: skip
    # Rows of given answers are full: as many updates as bring as many target tokens to learn from.
    per_update = runs.result("start").target_tokens / START_UPDATES * 4  # of 4 rows there
    same = round(runs.result("distilled").target_tokens / per_update)
    tuned = runs.train("tuned", *further, f"trainer.max_updates={same}")
    return {"teacher": teacher, "start": start, "distilled": distilled, "tuned": tuned}


def measure(runs: SmallRuns) -> dict[str, Any]:
    """What `record.json` holds."""
    places = train(runs)
    students = [name for name in places if name != "teacher"]
    found = divergences(
        [places[name] for name in students], places["teacher"], prompts=HELDOUT_PROMPTS, new_tokens=NEW_TOKENS
    )  # fmt: skip
    pairs = [("distilled", "start"), ("tuned", "start"), ("distilled", "tuned")]
    return {"divergence": {name: found[places[name]] for name in students}, **runs.record([*places], pairs)}


def main() -> None:
    """Runs what is missing, and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("outputs/distill_smoke"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    record = measure(SmallRuns(out))
    write_json(out / "record.json", record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
