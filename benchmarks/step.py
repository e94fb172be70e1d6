"""The train step side by side: ours, packed, and the published recipe's (`seed_recipe.py`), in one process.

    python -m benchmarks.step cpu [--model tiny] [--updates 5]         runs both on this machine's CPU
    python -m benchmarks.step tpu [--model gemma4_31b] [--slice v5p-8] compiles both for a slice that is not there

Lengths are those of the recipe's data (log-normal, mean 922, 99th percentile 2,553), tokens are random. The recipe pads
each example to 3,072; ours packs them into rows of 4,096. On a CPU all lengths are a quarter of that. Only real tokens
count. `--out` appends the table to a file.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

PADDED, PACKED = 3072, 4096
MEAN_LOG, SIGMA_LOG = 6.7067, 0.4895
CPU_SCALE = 4  # on a CPU all lengths are divided by this


def lengths(count: int, seed: int = 0) -> np.ndarray:
    """Token counts of `count` examples that fit into the recipe's rows."""
    drawn = np.random.default_rng(seed).lognormal(MEAN_LOG, SIGMA_LOG, 2 * count).astype(int)
    return drawn[(drawn > 1) & (drawn <= PADDED)][:count]


def on_cpu(model: str, updates: int, rank: int) -> list[str]:
    """Runs both on the CPU, fp32, one device; updates of about eight examples each."""
    import jax
    import jax.numpy as jnp

    from benchmarks import seed_recipe
    from gemma4_tpu.architectures import ARCHITECTURES
    from gemma4_tpu.models.layout import Layout

    arch = ARCHITECTURES[model]
    rng = np.random.default_rng(1)
    examples = [
        rng.integers(1, arch.vocab_size, n, dtype=np.int32)
        for n in lengths(seed_recipe.ROWS_PER_UPDATE * (updates + 1)) // CPU_SCALE + 2
    ]
    results = {way: run(arch, rank, examples) for way, run in (("recipe", _run_recipe), ("ours", _run_ours))}
    parameters = sum(np.prod(leaf.array_shape) for leaf in Layout.of(arch).leaves())
    print(f"{model}: {parameters:,} parameters, {jnp.zeros(()).devices()}, JAX {jax.__version__}")
    names = {"recipe": "Tunix's PeftTrainer as the recipe uses it", "ours": "ours, packed"}
    return [
        "| step | real tokens/s | seconds per update | ratio |",
        "|---|---:|---:|---:|",
        *(
            f"| {names[way]} | {rate:,.0f} | {seconds:.2f} | {rate / results['recipe'][0]:.2f}× |"
            for way, (rate, seconds) in results.items()
        ),
    ]


def _median(tokens: list[int], times: list[float]) -> tuple[float, float]:
    """(real tokens per second, seconds), medians over updates; the first one compiles and does not count."""
    seconds = np.diff(times)[1:]
    return float(np.median(np.array(tokens)[1:] / seconds)), float(np.median(seconds))


def _run_ours(arch, rank: int, examples: list[np.ndarray]) -> tuple[float, float]:
    """Two packed rows per update, one per microbatch: about as many tokens as eight examples."""
    import jax

    from gemma4_tpu.config.schema import LoraConfig, ModelConfig, OptimizerConfig, TrainerConfig
    from gemma4_tpu.models import sharding
    from gemma4_tpu.models.base import resolve_base
    from gemma4_tpu.step.train_step import compiled_functions
    from gemma4_tpu.training.job import build_job, to_mesh

    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    base = resolve_base(ModelConfig(name=arch.name, path="random:0"))
    job = build_job(base, LoraConfig(rank=rank, alpha=rank), OptimizerConfig(), TrainerConfig(remat="none"), mesh, 100)
    train, _ = compiled_functions(job.step, job.state)
    state, tokens, times = job.state, [], [time.perf_counter()]
    for arrays in _packed(examples):
        state, metrics = train(state, job.base, to_mesh(arrays, mesh))
        jax.block_until_ready(metrics)
        times.append(time.perf_counter())
        tokens.append(int((arrays["segment_ids"] > 0).sum()))
    return _median(tokens, times)


def _packed(examples: list[np.ndarray], rows_per_update: int = 2) -> list[dict[str, np.ndarray]]:
    """[M, 1, T] arrays of each update; rows that do not fill an update are left out."""
    from gemma4_tpu.data.packing import pack

    rows = pack([len(ids) - 1 for ids in examples], PACKED // CPU_SCALE)
    updates = []
    for first in range(0, len(rows) - rows_per_update + 1, rows_per_update):
        shape = rows_per_update, 1, PACKED // CPU_SCALE
        arrays = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
        arrays["target_mask"] = np.zeros(shape, bool)
        for r, members in enumerate(rows[first : first + rows_per_update]):
            at = 0
            for s, ids in enumerate(examples[member] for member in members):
                part = r, 0, slice(at, at + len(ids) - 1)
                arrays["tokens"][part], arrays["targets"][part] = ids[:-1], ids[1:]
                arrays["segment_ids"][part], arrays["positions"][part] = s + 1, np.arange(len(ids) - 1)
                arrays["target_mask"][part] = True
                at += len(ids) - 1
        updates.append(arrays)
    return updates


def _run_recipe(arch, rank: int, examples: list[np.ndarray]) -> tuple[float, float]:
    """Eight padded rows per update, one per microbatch. An update ends where the next one's rows are asked for."""
    import jax
    import optax
    from flax import nnx
    from tunix.models.gemma4 import model as tunix
    from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

    from benchmarks import seed_recipe
    from gemma4_tpu.models.tunix_bridge import tunix_config

    per_update = seed_recipe.ROWS_PER_UPDATE
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    config = tunix_config(arch)
    with mesh:
        model = seed_recipe.adapted(tunix.Gemma4(config, rngs=nnx.Rngs(0)), rank, 1)
    config.remat_config = tunix.RematConfig.DECODER
    settings = TrainingConfig(
        eval_every_n_steps=1_000_000, gradient_accumulation_steps=per_update, max_inflight_computations=1,
        pbar_description=None,
    )  # fmt: skip
    trainer = PeftTrainer(model, optax.adamw(1e-4), settings).with_gen_model_input_fn(seed_recipe.model_input)
    times: list[float] = []

    def rows():
        for number, row in enumerate(seed_recipe.padded(examples, PADDED // CPU_SCALE + 2)):
            if number % per_update == 0:
                jax.block_until_ready(nnx.state(model, nnx.LoRAParam))
                times.append(time.perf_counter())
            yield row

    with mesh:
        trainer.train(rows())
    jax.block_until_ready(nnx.state(model, nnx.LoRAParam))
    times.append(time.perf_counter())
    sizes = [len(ids) - 1 for ids in examples]
    tokens = [sum(sizes[i : i + per_update]) for i in range(0, len(sizes), per_update)]
    return _median(tokens, times)


WAYS = {
    "the recipe's, rows padded to 3,072": ("recipe", PADDED),
    "the recipe's, rows padded to 4,096": ("recipe", PACKED),
    "ours, `remat=decoder`": ("decoder", PACKED),
    "ours, `remat=products`": ("products", PACKED),
}


def on_tpu(model: str, slice_name: str, rank: int) -> list[str]:
    """Compiles both for a slice, one row per microbatch, all chips on the tp axis; each in a process of its own."""
    lines = [
        "| step | real tokens | HBM GiB | temporaries GiB | TFLOP: products + kernels | per real token | HBM traffic GB"
        " | per real token | lower + compile s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    context = multiprocessing.get_context("spawn")
    for name, (way, length) in WAYS.items():
        ours, theirs = context.Pipe()
        process = context.Process(target=_compile, args=(theirs, way, length, model, slice_name, rank), daemon=True)
        process.start()
        theirs.close()
        try:
            lines.append(f"| {name} | {ours.recv()} |")
        except EOFError:
            sys.exit(f"{name}: the compiling process ended without an answer")
        finally:
            process.kill()  # it would go on to generate code
        print(lines[-1], flush=True)
    return lines


def _compile(pipe, way: str, length: int, model: str, slice_name: str, rank: int) -> None:
    """Sends one line of the table, without its name."""
    from gemma4_tpu.planning.topology import absent_devices, set_environment

    set_environment()

    from benchmarks import seed_recipe
    from gemma4_tpu.architectures import ARCHITECTURES
    from gemma4_tpu.config.schema import LoraConfig, OptimizerConfig, TrainerConfig
    from gemma4_tpu.data.packing import pack
    from gemma4_tpu.hardware import SLICES
    from gemma4_tpu.models import sharding
    from gemma4_tpu.planning import compile as planning
    from gemma4_tpu.planning import counts, hlo, program
    from gemma4_tpu.planning.fill import Fill

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
                arch, LoraConfig(rank=rank, alpha=rank), OptimizerConfig(),
                TrainerConfig(remat=way, attention="splash"), mesh, rows=1, length=length, updates=1000,
            )
        )  # fmt: skip
    tokens = float(drawn.sum() / len(rows))
    limit = planning.hbm_limit_bytes(mesh.devices.flat[0])
    with tempfile.TemporaryDirectory() as folder:
        compiled = program.until_assigned(lowered, Path(folder), limit)
        seconds = time.perf_counter() - start
        total = counts.count(hlo.parse(compiled.text))
        fill = Fill(len(drawn), 0.0, 0.0, 0.0, 1.0, 0, "", rows[:500])
        skipped = sum(flops * (1 - fill.share_visited(mask, length)) for mask, flops in total.attention_flops.items())
    pipe.send(
        f"{tokens:,.0f} | {compiled.peak_bytes / 2**30:.1f}"
        f" | {(compiled.peak_bytes - compiled.argument_bytes) / 2**30:.1f}"
        f" | {total.matmul_flops / 1e12:.1f} + {(total.kernel_flops - skipped) / 1e12:.1f}"
        f" | {(total.flops - skipped) / tokens / 1e12:.4f}"
        f" | {total.traffic.hbm / 1e9:.0f} | {total.traffic.hbm / tokens / 1e9:.3f} | {seconds:.0f}"
    )


def main() -> None:
    """Runs the asked-for comparison and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("where", choices=("cpu", "tpu"))
    parser.add_argument("--model")
    parser.add_argument("--slice", default="v5p-8")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    if asked.where == "cpu":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        lines = on_cpu(asked.model or "tiny", asked.updates, asked.rank)
    else:
        lines = on_tpu(asked.model or "gemma4_31b", asked.slice, asked.rank)
    load = os.getloadavg()[0]
    machine = f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} CPU cores ({platform.machine()}), load {load:.1f}"
    text = "\n".join([*lines, "", f"*{machine}*", ""])
    print(text)
    if asked.out:
        with asked.out.open("a", encoding="utf-8") as file:
            file.write(text)


if __name__ == "__main__":
    main()
