"""Frozen base weights in bfloat16 and quantised (`lora.quantize`): the loss of the tiny model, and the time of a layer.

    python -m benchmarks.int8 loss [--updates 40] [--seeds 3]
    python -m benchmarks.int8 time [--slice v5p-8]

`loss` trains `model=tiny` on the default run's rows, on a CPU: each way from the same adapters, on the same rows in the
same order, for the same updates. `time` compiles the training step of five sliding layers of 31B for TPU slices, to the
end, without a TPU, and reads what a layer takes from the compiler's schedule.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.pages import measured
from benchmarks.step import PACKED, lengths, packed_fill
from gemma4_tpu.markdown import table

BF16 = "bfloat16"
WAYS: dict[str, tuple[str | None, str]] = {
    "float32": (None, "float32"), "bf16": (None, BF16), "int8": ("int8", BF16), "int8_compute": ("int8_compute", BF16),
    "nf4": ("nf4", BF16),
}  # fmt: skip
"""Name → `lora.quantize` and `trainer.compute_dtype`."""
LAYERS = 5
"""Unlike any other loop of the step, so that the loops over layers are known by their rounds."""
MODEL, MACHINES = "gemma4_31b", ("v5e-4", "v5p-8", "v6e-4")
TIMED = ("bf16", "int8_compute")
SHOWN = {
    "frozen products": ("base_products",), "LoRA": ("lora",), "attention": ("attention", "attention_glue"),
    "elementwise": ("elementwise",), "collectives waited for": ("collectives_exposed",), "copies": ("copies",),
}  # fmt: skip
"""Column → parts of the schedule."""


# ── loss ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Losses:
    """Of one run, in nats per target token."""

    before: float
    """Held out, before the first update."""
    after: float
    """Held out, after the last."""
    training: float
    """Mean over the last ten updates."""


def runs(way: str, updates: int, seeds: Sequence[int], *words: str) -> list[Losses]:
    """The default run's first updates, once for each seed of adapters and row order.

    Args:
      way: a key of `WAYS`.
      updates: number of them; the learning rate ends at zero.
      seeds: values of `trainer.seed`.
      *words: more overrides.
    """
    import jax

    from gemma4_tpu.config.load import load
    from gemma4_tpu.data.build import build_data
    from gemma4_tpu.data.tokenizer import load_tokenizer
    from gemma4_tpu.hardware import MeshSizes
    from gemma4_tpu.models import sharding
    from gemma4_tpu.models.base import resolve_base
    from gemma4_tpu.step.objective_kinds import rows_of
    from gemma4_tpu.step.train_step import compiled_functions
    from gemma4_tpu.train import TRAIN
    from gemma4_tpu.training.batches import make_batches
    from gemma4_tpu.training.recipe import Recipe
    from gemma4_tpu.training.setup import set_up, to_mesh

    quantize, dtype = WAYS[way]
    mesh, found, functions, data = sharding.make_mesh(1, 1, jax.devices()[:1]), [], None, None
    for seed in seeds:
        config = load(
            [f"lora.quantize={quantize or 'null'}", f"trainer.compute_dtype={dtype}", f"trainer.max_updates={updates}",
             "trainer.remat=none", f"trainer.seed={seed}", *words], TRAIN,
        ).root  # fmt: skip
        base = resolve_base(config.model)
        data = data or build_data(config.data, load_tokenizer(base.tokenizer_folder), rows_of(config.objective))
        batches = make_batches(data, config.data, config.trainer, mesh)
        recipe = Recipe(
            arch=base.arch, hardware=config.hardware, lora=config.lora, optimizer=config.optimizer,
            trainer=config.trainer, mesh=MeshSizes(1, 1, 1), rows=batches.rows, length=max(batches.lengths),
            updates=updates,
        )  # fmt: skip
        job = set_up(base, recipe, mesh)
        train, evaluate = functions = functions or compiled_functions(job.step, job.state)
        held_out = [to_mesh(batch.arrays, mesh) for batch in batches.heldout]

        def loss(trained: Any, frozen: Any = job.base, rows: Any = held_out, evaluate: Any = evaluate) -> float:
            sums = [evaluate(trained, frozen, batch) for batch in rows]
            return float(sum(s for s, *_ in sums) / sum(n for _, n, *_ in sums))

        state, before, each = job.state, loss(job.state.trained), []
        for update in batches.source.updates(lambda: None):
            state, metrics = train(state, job.base, to_mesh(update.arrays, mesh))
            each.append(float(metrics.loss))
        batches.source.close()
        found.append(Losses(before, loss(state.trained), mean(each[-10:])))
    return found


# ── time ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def layer(machine: str, quantize: str | None) -> dict[str, float]:
    """Seconds of one sliding layer, forward and backward, by part (`planning.schedule.PARTS`), on each chip."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_compile, args=(there, machine, quantize), daemon=True)
    process.start()
    there.close()
    try:
        return here.recv()
    finally:
        process.join()


def _compile(pipe: Any, machine: str, quantize: str | None) -> None:
    from gemma4_tpu.planning.topology import set_environment

    set_environment()

    from gemma4_tpu.architectures import ARCHITECTURES, SLIDING
    from gemma4_tpu.config.schema import HardwareConfig, LoraConfig, OptimizerConfig, TrainerConfig
    from gemma4_tpu.data.packing import pack
    from gemma4_tpu.hardware import SLICES, MeshSizes
    from gemma4_tpu.planning.answers import answers
    from gemma4_tpu.planning.calibration import ScheduleRates
    from gemma4_tpu.planning.schedule import from_plain
    from gemma4_tpu.planning.walk import walk
    from gemma4_tpu.training.recipe import Recipe

    arch = replace(
        ARCHITECTURES[MODEL], num_layers=LAYERS, layer_types=(SLIDING,) * LAYERS, vocab_size=2048
    )  # fmt: skip
    wanted = SLICES[machine]
    recipe = Recipe(
        arch=arch, hardware=HardwareConfig(name=machine), lora=LoraConfig(rank=64, alpha=64, quantize=quantize),
        optimizer=OptimizerConfig(), trainer=TrainerConfig(remat="products", attention="splash"),
        mesh=MeshSizes(1, 1, wanted.chips), rows=1, length=PACKED, updates=1000,
    )  # fmt: skip
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        *_, (_, told) = answers(recipe, wanted, Path(folder) / "dump", to_the_end=True)
    drawn = lengths(9_959)
    fill = packed_fill(drawn, [drawn[row] for row in pack(drawn, PACKED)][:500])
    loops = [op for op in from_plain(told["compiled"]["schedule"]) if op.body and op.trips == LAYERS]
    assert len(loops) == 2, f"{len(loops)} loops of {LAYERS} rounds: expected one forward, one backward"
    parts = {"cpu_seconds": time.process_time() - started}
    walked = walk(loops, ScheduleRates.of(wanted), lambda mask: fill.share_visited(mask, PACKED))
    parts |= {name: spent / LAYERS for name, spent in walked.parts.items()}
    pipe.send(parts | {"seconds": walked.seconds / LAYERS})


# ── what is printed ───────────────────────────────────────────────────────────────────────────────────────────────────


def loss_page(updates: int, seeds: int) -> list[str]:
    """Each way's losses, means over seeds, and its difference from bf16's of the same seed: mean (least to most)."""
    found: dict[str, list[Losses]] = {}
    for way in WAYS:
        found[way] = runs(way, updates, range(seeds))
        print(way, *found[way], sep="\n  ", file=sys.stderr, flush=True)
    rows = []
    for way, each in found.items():
        cells = [f"`{way}`" if WAYS[way][0] else way]
        for name in ("before", "after", "training"):
            values = [getattr(one, name) for one in each]
            gaps = [value - getattr(one, name) for value, one in zip(values, found["bf16"], strict=True)]
            cells += [f"{mean(values):.4f}", "" if way == "bf16" else _signed(gaps)]
        rows.append(cells)
    after = [one.after for one in found["bf16"]]
    apart = "− bf16's"
    heads = ["frozen weights", "held out, before", apart, f"after {updates} updates", apart, "training", apart]
    return [
        *table(heads, rows, "lrrrrrr"),
        f"Between seeds, bf16's held-out loss after {updates} updates differs by {max(after) - min(after):.4f}.",
    ]  # fmt: skip


def _signed(gaps: list[float]) -> str:
    """`+0.0012 (+0.0010 to +0.0014)`; one figure where all are alike."""
    told = [f"{round(gap, 4) + 0.0:+.4f}".replace("-", "−") for gap in (mean(gaps), min(gaps), max(gaps))]
    return told[0] if told[1] == told[2] else f"{told[0]} ({told[1]} to {told[2]})"


def time_page(machines: Sequence[str]) -> list[str]:
    """A line for each slice and way."""
    rows = []
    for machine in machines:
        plain: float | None = None
        for way in TIMED:
            found = layer(machine, WAYS[way][0])
            plain = plain or found["seconds"]
            cells = [machine, f"`{way}`" if WAYS[way][0] else way, f"{1e3 * found['seconds']:.2f}"]
            cells.append("" if way == "bf16" else f"{found['seconds'] / plain - 1:+.1%}".replace("-", "−"))
            cells += [f"{1e3 * sum(found.get(part, 0.0) for part in group):.2f}" for group in SHOWN.values()]
            rows.append(cells)
            print(" | ".join(cells), f"({found['cpu_seconds']:.0f} CPU s)", file=sys.stderr, flush=True)
    heads = ["slice", "frozen weights", "ms per layer", "against bf16", *SHOWN]
    return list(table(heads, rows, "ll" + "r" * (len(heads) - 2)))


def main() -> None:
    """Prints a block of `int8.md`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("loss", "time"))
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--slice", action="append", choices=MACHINES)
    asked = parser.parse_args()
    if asked.what == "loss":
        stamp, lines = measured("jax"), loss_page(asked.updates, asked.seeds)
    else:
        stamp, lines = measured("jax", "libtpu", word="Estimated"), time_page(asked.slice or MACHINES)
    print("\n".join([stamp, "", *lines]))


if __name__ == "__main__":
    main()
