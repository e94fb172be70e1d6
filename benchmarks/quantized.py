"""Loss of short runs of the tiny model with its frozen weights, and their products, in few bits.

    python -m benchmarks.quantized [--updates 30]

The default run's model, adapters and learning rate, with one row an update; the runs differ in `lora.quantize` only.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

from benchmarks.pages import measured
from gemma4_tpu import api
from gemma4_tpu.markdown import table
from gemma4_tpu.tracking.metrics import read_metrics
from gemma4_tpu.tracking.result import Result

WAYS = {"float32": (), "`int8_compute`": ("lora.quantize=int8_compute",)}
"""The first is what the others are compared with."""
SHORT = (
    "data.max_rows=160", "data.heldout=[]", "data.heldout_fraction=0.05", "trainer.global_batch_sequences=1",
    "trainer.remat=none", "trainer.eval_every=0",
)  # fmt: skip
LAST = 5
"""Updates whose mean loss is told."""


def trained(words: tuple[str, ...], updates: int, run: Path) -> tuple[list[float], float, float]:
    """Losses of the updates of a run, and of held-out rows before and after it."""
    with redirect_stdout(sys.stderr):
        api.train(*SHORT, *words, f"trainer.max_updates={updates}", f"run_dir={run}")
    result = Result.read(run / "result.json")
    assert result.heldout_loss_first is not None and result.heldout_loss_last is not None
    losses = [row["loss"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row]
    return losses, result.heldout_loss_first, result.heldout_loss_last


def main() -> None:
    """Trains each and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=30)
    asked = parser.parse_args()
    stamp, rows, plain = measured("jax"), [], None
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, words) in enumerate(WAYS.items()):
            losses, before, after = trained(words, asked.updates, Path(folder) / str(number))
            plain = plain or losses
            apart = max(abs(a - b) for a, b in zip(losses, plain, strict=True))
            mean = sum(losses[-LAST:]) / LAST
            rows.append([name, f"{before:.4f}", f"{after:.4f}", f"{mean:.4f}", f"{apart:.4f}"])
    heads = [
        "frozen weights and products", "held-out loss before", f"after {asked.updates} updates",
        f"loss of the last {LAST} updates", "furthest from the first line, of all updates",
    ]  # fmt: skip
    print("\n".join([stamp, "", *table(heads, rows, "lrrrr")]))


if __name__ == "__main__":
    main()
