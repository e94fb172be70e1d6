"""Training on this machine's CPU: ours, the published recipe's, transformers + PEFT, padded and packed, and TRL.

    python -m benchmarks.training [--updates 12] [--rank 64] [--trl PYTHON]

The same tiny Gemma 4 checkpoint, float32, one device, LoRA on all linear weights, Adam at 1e-3, the same examples
once, in the same order: text of the package's Verilog rows, cut to a quarter of the lengths of the recipe's data
(log-normal, mean 922, 99th percentile 2,553). An update has eight examples, or two packed rows with about as many
tokens. Each way runs in a process of its own; `--trl` names a Python with TRL and this package. Seconds are medians
over updates, the first two left out; only real tokens count; the held-out loss is per token of sixteen other examples,
before and after.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pages import measured
from benchmarks.step import PACKED, PADDED, lengths
from gemma4_tpu.markdown import table

SCALE = 4
PADDED_TO, PACKED_TO = PADDED // SCALE, PACKED // SCALE
PER_UPDATE, PACKED_ROWS, HELD_OUT, RATE = 8, 2, 16, 1e-3
LINEAR = r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)$"
TRL = "TRL's SFTTrainer + PEFT, packed"
Examples = list[np.ndarray]


@dataclass(frozen=True)
class Outcome:
    """What one way did."""

    real_tokens_per_second: float
    seconds_per_update: float
    peak_rss_bytes: int
    loss_before: float
    loss_after: float
    trained_tokens: int


def corpus(count: int) -> tuple[Examples, Examples]:
    """`count` training examples and the held-out ones, as token ids of random lengths."""
    from gemma4_tpu.data.sources import read_rows
    from gemma4_tpu.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer("embedded:tiny")
    ids: list[int] = []
    for row in read_rows("embedded:verilog_smoke/train.jsonl.gz"):
        ids += tokenizer.apply_chat_template(row.value["messages"], tokenize=True, return_dict=True)["input_ids"]
    stream, at, examples = np.array(ids, np.int32), 0, []
    for length in lengths(count + HELD_OUT) // SCALE + 2:
        at = at if at + length <= len(stream) else 0
        examples.append(stream[at : at + length])
        at += length
    return examples[HELD_OUT:], examples[:HELD_OUT]


def packed(examples: Examples, rows_per_update: int = PACKED_ROWS) -> list[dict[str, np.ndarray]]:
    """[M, 1, T] arrays of each update; rows that do not fill an update are left out."""
    from gemma4_tpu.data.packing import pack

    rows = pack([len(ids) - 1 for ids in examples], PACKED_TO)
    updates = []
    for first in range(0, len(rows) - rows_per_update + 1, rows_per_update):
        shape = rows_per_update, 1, PACKED_TO
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


def outcome(tokens: list[int], times: list[float], before: float, after: float) -> Outcome:
    """Medians over updates; `times` has one more entry than `tokens`. The first two updates don't count."""
    seconds = np.diff(times)[2:]
    return Outcome(
        float(np.median(np.array(tokens)[2:] / seconds)), float(np.median(seconds)),
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, before, after, sum(tokens),
    )  # fmt: skip


def ours(examples: Examples, held_out: Examples, rank: int) -> Outcome:
    """Two packed rows per update, one per microbatch."""
    import jax

    from gemma4_tpu.config.machines import HardwareConfig
    from gemma4_tpu.config.schema import LoraConfig, ModelConfig, OptimizerConfig, TrainerConfig
    from gemma4_tpu.hardware import MeshSizes
    from gemma4_tpu.models import sharding
    from gemma4_tpu.models.base import resolve_base
    from gemma4_tpu.step.train_step import compiled_functions
    from gemma4_tpu.training.recipe import Recipe
    from gemma4_tpu.training.setup import set_up, to_mesh

    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    base = resolve_base(ModelConfig(path="embedded:tiny"))
    optimizer = OptimizerConfig(learning_rate=RATE, schedule="constant", warmup_updates=0)
    lora, trainer = LoraConfig(rank=rank, alpha=rank), TrainerConfig(remat="none")
    recipe = Recipe(
        arch=base.arch, hardware=HardwareConfig(), lora=lora, optimizer=optimizer, trainer=trainer,
        mesh=MeshSizes(1, 1, 1), rows=1, length=PACKED_TO, updates=1000,
    )  # fmt: skip
    job = set_up(base, recipe, mesh)
    train, evaluate = compiled_functions(job.step, job.state)
    state = job.state

    def loss() -> float:
        sums = [evaluate(state.trained, job.base, to_mesh(rows, mesh)) for rows in packed(held_out, 1)]
        return float(sum(s for s, _, _ in sums) / sum(n for _, n, _ in sums))

    before = loss()
    tokens, times = [], [time.perf_counter()]
    for arrays in packed(examples):
        state, metrics = train(state, job.base, to_mesh(arrays, mesh))
        jax.block_until_ready(metrics)
        times.append(time.perf_counter())
        tokens.append(int(arrays["target_mask"].sum()))
    return outcome(tokens, times, before, loss())


def recipe(examples: Examples, held_out: Examples, rank: int) -> Outcome:
    """Tunix's PeftTrainer: eight padded rows per update, one per microbatch, every layer computed again.

    An update ends where the next one's rows are asked for.
    """
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx
    from tunix.models.gemma4 import model as tunix
    from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, _default_loss_fn

    from benchmarks import seed_recipe
    from gemma4_tpu.config.schema import ModelConfig
    from gemma4_tpu.models import sharding
    from gemma4_tpu.models.base import resolve_base
    from gemma4_tpu.models.layout import Layout
    from gemma4_tpu.models.params import by_name, load_params
    from gemma4_tpu.models.tunix_bridge import fill

    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    base = resolve_base(ModelConfig(path="embedded:tiny"))
    layout = Layout.of(base.arch)
    places = sharding.places(layout, mesh)
    with mesh:
        params = load_params(base.checkpoint, base.arch, layout, places, jnp.float32)
        model = seed_recipe.adapted(fill(by_name(params, layout), base.arch, jnp.float32), rank, 1)
    model.config.remat_config = tunix.RematConfig.DECODER

    @nnx.jit
    def of_row(model: Any, row: Any) -> jax.Array:
        return _default_loss_fn(model, **seed_recipe.model_input(row))

    def loss() -> float:
        rows, sizes = seed_recipe.padded(held_out, PADDED_TO + 2), [len(ids) - 1 for ids in held_out]
        with mesh:
            return float(sum(of_row(model, row) * n for row, n in zip(rows, sizes, strict=True)) / sum(sizes))

    before = loss()
    settings = TrainingConfig(
        eval_every_n_steps=1_000_000, gradient_accumulation_steps=PER_UPDATE, max_inflight_computations=1,
        pbar_description=None,
    )  # fmt: skip
    trainer = PeftTrainer(model, optax.adam(RATE), settings).with_gen_model_input_fn(seed_recipe.model_input)
    times: list[float] = []

    def rows():
        for number, row in enumerate(seed_recipe.padded(examples, PADDED_TO + 2)):
            if number % PER_UPDATE == 0:
                jax.block_until_ready(nnx.state(model, nnx.LoRAParam))
                times.append(time.perf_counter())
            yield row

    with mesh:
        trainer.train(rows())
    jax.block_until_ready(nnx.state(model, nnx.LoRAParam))
    times.append(time.perf_counter())
    return outcome(_by_update(examples), times, before, loss())


def _by_update(examples: Examples) -> list[int]:
    sizes = [len(ids) - 1 for ids in examples]
    return [sum(sizes[i : i + PER_UPDATE]) for i in range(0, len(sizes), PER_UPDATE)]


def _torch_model(rank: int) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from gemma4_tpu import assets

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(
        assets.resolve("embedded:tiny"), dtype=torch.float32, trust_remote_code=False
    )
    model.config.use_cache = False  # with a cache, transformers does not look for packed examples: they see each other
    adapter = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=LINEAR, task_type="CAUSAL_LM")
    return get_peft_model(model, adapter)


def _torch_batch(rows: Examples) -> dict[str, Any]:
    """Right-padded to the longest."""
    import torch

    length = max(len(ids) for ids in rows)
    tokens = torch.zeros((len(rows), length), dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for i, ids in enumerate(rows):
        tokens[i, : len(ids)], mask[i, : len(ids)] = torch.from_numpy(ids.astype(np.int64)), 1
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


def _torch_loss(model: Any, held_out: Examples) -> float:
    import torch

    with torch.no_grad():
        losses = [float(model(**_torch_batch([ids])).loss) * (len(ids) - 1) for ids in held_out]
    return sum(losses) / sum(len(ids) - 1 for ids in held_out)


def _torch_train(model: Any, updates: list[tuple[list[dict[str, Any]], int]], held_out: Examples) -> Outcome:
    """Each update is (microbatches, target tokens); the loss is a mean over the update's tokens."""
    import torch

    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=RATE)
    before = _torch_loss(model, held_out)
    times = [time.perf_counter()]
    for microbatches, total in updates:
        for batch in microbatches:
            (model(**batch, num_items_in_batch=torch.tensor(total)).loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter())
    return outcome([total for _, total in updates], times, before, _torch_loss(model, held_out))


def peft_padded(examples: Examples, held_out: Examples, rank: int) -> Outcome:
    """Transformers + PEFT: eight examples in one batch, padded to the longest of them."""
    updates = [
        ([_torch_batch(examples[i : i + PER_UPDATE])], tokens)
        for i, tokens in zip(range(0, len(examples), PER_UPDATE), _by_update(examples), strict=True)
    ]
    return _torch_train(_torch_model(rank), updates, held_out)


def peft_packed(examples: Examples, held_out: Examples, rank: int) -> Outcome:
    """Transformers + PEFT: our packed rows; positions that begin anew tell transformers where examples do."""
    import torch

    def batch(arrays: dict[str, np.ndarray], row: int) -> dict[str, Any]:
        real = int(arrays["target_mask"][row, 0].sum())  # packed rows end in padding, which is left out
        tokens, targets, positions = (
            torch.from_numpy(arrays[name][row, :, :real].astype(np.int64))
            for name in ("tokens", "targets", "positions")
        )
        return {"input_ids": tokens, "position_ids": positions, "shift_labels": targets, "labels": targets}

    updates = [
        ([batch(arrays, row) for row in range(PACKED_ROWS)], int(arrays["target_mask"].sum()))
        for arrays in packed(examples)
    ]
    return _torch_train(_torch_model(rank), updates, held_out)


def trl_packed(examples: Examples, held_out: Examples, rank: int) -> Outcome:
    """TRL's SFTTrainer with its own packing (best fit), one row per microbatch."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from gemma4_tpu.data.tokenizer import load_tokenizer

    model = _torch_model(rank)
    tokens, times = [], [time.perf_counter()]
    settings = SFTConfig(
        output_dir=tempfile.mkdtemp(), max_length=PACKED_TO, packing=True, report_to=[], use_cpu=True, bf16=False,
        per_device_train_batch_size=1, gradient_accumulation_steps=PACKED_ROWS, gradient_checkpointing=False, seed=0,
        num_train_epochs=1, learning_rate=RATE, lr_scheduler_type="constant", max_grad_norm=0.0, optim="adamw_torch",
        weight_decay=0.0, adam_epsilon=1e-8, save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip

    class UpdateClock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    class Counted(SFTTrainer):
        def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **more: Any) -> torch.Tensor:
            counts.append(int(((inputs["labels"] != -100) & (inputs["position_ids"] > 0)).sum()))
            return super().training_step(model, inputs, *rest, **more)

    counts: list[int] = []
    rows = Dataset.from_list([{"input_ids": ids.tolist()} for ids in examples])
    trainer = Counted(
        model, settings, train_dataset=rows, processing_class=load_tokenizer("embedded:tiny"), callbacks=[UpdateClock()]
    )
    before = _torch_loss(model, held_out)
    times[0] = time.perf_counter()
    trainer.train()
    updates = len(times) - 1
    tokens = [sum(counts[i * PACKED_ROWS : (i + 1) * PACKED_ROWS]) for i in range(updates)]
    return outcome(tokens, times, before, _torch_loss(model, held_out))


def ours_by_eigen(examples: Examples, held_out: Examples, rank: int) -> Outcome:
    """Ours, with products by Eigen: with such narrow ones it is faster than YNNPACK, the default of JAX 0.10."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_experimental_ynn_fusion_type=invalid"
    return ours(examples, held_out, rank)


WAYS: dict[str, Callable[[Examples, Examples, int], Outcome]] = {
    "Tunix's PeftTrainer as the recipe uses it": recipe,
    "transformers + PEFT, padded": peft_padded,
    "transformers + PEFT, packed": peft_packed,
    TRL: trl_packed,
    "ours, packed": ours,
    "ours, packed, products by Eigen": ours_by_eigen,
}


def _measured(name: str, answer: str, updates: int, rank: int) -> None:
    examples, held_out = corpus(PER_UPDATE * updates)
    Path(answer).write_text(json.dumps(asdict(WAYS[name](examples, held_out, rank))))


def measure(name: str, python: str, words: list[str]) -> Outcome:
    """One way, in a process of its own."""
    with tempfile.NamedTemporaryFile("r", suffix=".json") as answer:
        command = [python, "-m", "benchmarks.training", *words, "--way", name, answer.name]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
        if subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, stdout=sys.stderr).returncode:
            sys.exit(f"{name}: ended without a result")
        return Outcome(**json.load(answer))


def main() -> None:
    """Runs every way and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--trl", help="a Python with TRL and this package")
    parser.add_argument("--way", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.way:
        return _measured(*asked.way, asked.updates, asked.rank)
    stamp = measured("jax", "google-tunix", "transformers", "peft", "torch")
    words = ["--updates", str(asked.updates), "--rank", str(asked.rank)]
    pythons = {name: asked.trl if name == TRL else sys.executable for name in WAYS}
    found = {name: measure(name, python, words) for name, python in pythons.items() if python}
    first = next(iter(found.values())).real_tokens_per_second
    heads = ["way", "real tokens/s", "ratio", "seconds per update", "peak RSS GiB", "tokens trained", "held-out loss"]
    rows = [
        [
            name, f"{one.real_tokens_per_second:,.0f}", f"{one.real_tokens_per_second / first:.2f}×",
            f"{one.seconds_per_update:.2f}", f"{one.peak_rss_bytes / 2**30:.2f}", f"{one.trained_tokens:,}",
            f"{one.loss_before:.3f} → {one.loss_after:.3f}",
        ]
        for name, one in found.items()
    ]  # fmt: skip
    print("\n".join([stamp, "Medians over updates, excluding the first two.", "", *table(heads, rows, "lrrrrrr")]))
    return None


if __name__ == "__main__":
    main()
