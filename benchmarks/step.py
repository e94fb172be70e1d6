"""The train step by the TPU compiler: ours, packed, and the published recipe's (`seed_recipe.py`).

    python -m benchmarks.step [--model gemma4_31b] [--slice v5p-8]

Lengths are those of the recipe's data (log-normal, mean 922, 99th percentile 2,553). The recipe pads each example to
3,072; ours packs them into rows of 4,096. Only real tokens count. Both run on a CPU in `training.py`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.pages import measured
from gemma4_tpu.markdown import table

if TYPE_CHECKING:
    from gemma4_tpu.planning.fill import Fill

PADDED, PACKED = 3072, 4096
MEAN_LOG, SIGMA_LOG = 6.7067, 0.4895


def lengths(count: int, seed: int = 0) -> np.ndarray:
    """Token counts of `count` examples that fit into the recipe's rows."""
    drawn = np.random.default_rng(seed).lognormal(MEAN_LOG, SIGMA_LOG, 2 * count).astype(int)
    return drawn[(drawn > 1) & (drawn <= PADDED)][:count]


def packed_fill(drawn: np.ndarray, rows: list[np.ndarray]) -> Fill:
    """What attention skips in `rows`, each with the token counts of its examples; `drawn`: of all examples."""
    from gemma4_tpu.planning.fill import Fill

    each, whole = float(drawn.mean()), float(np.mean([row.sum() for row in rows]))
    return Fill(
        examples=len(drawn), mean_tokens=each, segment_tokens=each, real_tokens_per_update=whole, fill=1.0,
        length_share=1.0, updates=0, source="", rows=rows,
    )  # fmt: skip


WAYS = {
    "the recipe's, rows padded to 3,072": ("recipe", PADDED),
    "the recipe's, rows padded to 4,096": ("recipe", PACKED),
    "ours, `remat=decoder`": ("decoder", PACKED),
    "ours, `remat=products`": ("products", PACKED),
}


def compare(model: str, slice_name: str, rank: int) -> list[str]:
    """Compiles both for a slice, one row per microbatch, all chips on the tp axis; each in a process of its own."""
    heads = [
        "step", "real tokens", "HBM GiB", "temporaries GiB", "TFLOP: products + kernels", "per real token",
        "HBM traffic GB", "per real token", "lower + compile s",
    ]  # fmt: skip
    rows = []
    context = multiprocessing.get_context("spawn")
    for name, (way, length) in WAYS.items():
        ours, theirs = context.Pipe()
        process = context.Process(target=_compile, args=(theirs, way, length, model, slice_name, rank), daemon=True)
        process.start()
        theirs.close()
        try:
            rows.append([name, *ours.recv()])
        except EOFError:
            sys.exit(f"{name}: the compiling process ended without an answer")
        finally:
            process.kill()  # it would go on to generate code
        print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    return list(table(heads, rows, "lrrrrrrrr"))


def _compile(pipe, way: str, length: int, model: str, slice_name: str, rank: int) -> None:
    """Sends one line of the table, without its name."""
    from gemma4_tpu.planning.topology import absent_devices, set_environment

    set_environment()

    from benchmarks import seed_recipe
    from gemma4_tpu.architectures import ARCHITECTURES
    from gemma4_tpu.config.machines import HardwareConfig
    from gemma4_tpu.config.schema import LoraConfig, OptimizerConfig, TrainerConfig
    from gemma4_tpu.data.packing import pack
    from gemma4_tpu.hardware import SLICES, MeshSizes
    from gemma4_tpu.models import sharding
    from gemma4_tpu.planning import compile as planning
    from gemma4_tpu.planning import counts, hlo, program
    from gemma4_tpu.training.recipe import Recipe

    arch, wanted = ARCHITECTURES[model], SLICES[slice_name]
    mesh = sharding.make_mesh(1, wanted.chips, absent_devices(wanted))
    drawn = lengths(9_959)
    start = time.perf_counter()
    if way == "recipe":
        rows = [drawn[[i]] for i in range(len(drawn))]
        train, given = seed_recipe.absent_step(arch, mesh, length, rank)
        lowered = train.lower(*given)
    else:
        rows = [drawn[row] for row in pack(drawn, length)]
        lowered = planning.lower_step(
            planning.shapes(
                Recipe(
                    arch=arch, hardware=HardwareConfig(), lora=LoraConfig(rank=rank, alpha=rank),
                    optimizer=OptimizerConfig(), trainer=TrainerConfig(remat=way, attention="splash"),
                    mesh=MeshSizes(1, 1, wanted.chips), rows=1, length=length, updates=1000,
                ),
                mesh,
            )
        )  # fmt: skip
    tokens = float(drawn.sum() / len(rows))
    limit = planning.hbm_limit_bytes(mesh.devices.flat[0])
    with tempfile.TemporaryDirectory() as folder:
        compiled = program.until_assigned(lowered, Path(folder), limit)
        seconds = time.perf_counter() - start
        total = counts.count(hlo.parse(compiled.text))
        fill = packed_fill(drawn, rows[:500])
        skipped = sum(flops * (1 - fill.share_visited(mask, length)) for mask, flops in total.attention_flops.items())
    pipe.send(
        [
            f"{tokens:,.0f}", f"{compiled.peak_bytes / 2**30:.1f}",
            f"{(compiled.peak_bytes - compiled.argument_bytes) / 2**30:.1f}",
            f"{total.matmul_flops / 1e12:.1f} + {(total.kernel_flops - skipped) / 1e12:.1f}",
            f"{(total.flops - skipped) / tokens / 1e12:.4f}", f"{total.traffic.hbm / 1e9:.0f}",
            f"{total.traffic.hbm / tokens / 1e9:.3f}", f"{seconds:.0f}",
        ]
    )  # fmt: skip


def main() -> None:
    """Compiles every step and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gemma4_31b")
    parser.add_argument("--slice", default="v5p-8")
    parser.add_argument("--rank", type=int, default=64)
    asked = parser.parse_args()
    stamp = measured("jax", "libtpu", word="Estimated")
    print("\n".join([stamp, "", *compare(asked.model, asked.slice, asked.rank)]))


if __name__ == "__main__":
    main()
