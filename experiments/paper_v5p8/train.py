"""The paper's TPU recipe as published, its faults included, so that it can be repeated and compared with.

    python -m experiments.paper_v5p8.train                                # the tiny model on CPU, a minute
    python -m experiments.paper_v5p8.train --model <31B checkpoint> --data <CodeV-R1 rows> --tp 4     # a v5p-8

Tunix's PeftTrainer, Qwix's adapters, einsum attention, all layers computed again, every row padded. README.md lists
what is wrong with it, and what was chosen where the paper's text, the only source, leaves a choice.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh
from tunix.models.gemma4 import model as tunix
from tunix.sft import peft_trainer

from benchmarks import seed_recipe
from gemma4_tpu.config.schema import ModelConfig
from gemma4_tpu.data.codev import to_messages
from gemma4_tpu.data.drops import RowDropped
from gemma4_tpu.data.sources import read_rows
from gemma4_tpu.data.tokenizer import load_tokenizer
from gemma4_tpu.models import sharding
from gemma4_tpu.models.base import Base, resolve_base
from gemma4_tpu.models.layout import Layout
from gemma4_tpu.models.params import by_name, load_params
from gemma4_tpu.models.tunix_bridge import fill

LENGTH, RANK, PEAK, WARMUP, ROWS = 3072, 64, 1e-4, 100, seed_recipe.ROWS_PER_UPDATE
TURN, END = "<start_of_turn>", "<end_of_turn>\n"  # Gemma 3's: Gemma 4's tokenizer reads them as ordinary text


def encode(tokenizer: Any, user: str, answer: str) -> tuple[list[int], list[bool]]:
    """(ids, whether each is trained on). The mask's offset counts BOS and EOS of each piece that was encoded alone."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    pieces = [f"{TURN}user\n", user, f"{END}{TURN}model\n"]
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    whole = [begin, *(token for piece in pieces for token in ids(piece)), *ids(f"{answer}{END}"), end]
    offset = sum(len([begin, *ids(piece), end]) for piece in pieces)
    return whole, [position > offset for position in range(len(whole))]


def batches(data: str, tokenizer: Any, length: int, max_rows: int) -> list[peft_trainer.TrainingInput]:
    """One row each, right-padded to `length`; rows that are longer are dropped."""
    rows, dropped = [], 0
    for row in read_rows(data):
        try:
            messages = row.value["messages"] if "messages" in row.value else to_messages(row.value)
        except RowDropped:
            dropped += 1
            continue
        user = next(turn["content"] for turn in messages if turn["role"] == "user")  # system messages are left out
        ids, trained = encode(tokenizer, user, messages[-1]["content"])
        if len(ids) > length:
            dropped += 1
            continue
        tokens, mask = np.zeros((1, length), np.int32), np.zeros((1, length), bool)
        tokens[0, : len(ids)], mask[0, : len(ids)] = ids, trained
        rows.append(peft_trainer.TrainingInput(input_tokens=tokens, input_mask=mask))
        if len(rows) == max_rows:
            break
    print(f"{len(rows)} rows of {length} tokens, {dropped} dropped")
    return rows


def model_input(row: peft_trainer.TrainingInput) -> dict[str, jax.Array]:
    """What Tunix's default loss takes: attention to all tokens but padding, loss by the mask."""
    real = peft_trainer.TrainingInput(input_tokens=row.input_tokens, input_mask=row.input_tokens != 0)
    return seed_recipe.model_input(real) | {"input_mask": row.input_mask}


def load(base: Base, mesh: Mesh, rank: int) -> nnx.Module:
    """Tunix's model in bfloat16 with Qwix's adapters, which take the base's dtype.

    Weights come by our loader: Tunix 0.1.7's knows one of the two ways in which Hugging Face names Gemma 4's tensors.
    """
    layout = Layout.of(base.arch)
    shardings = sharding.places(layout, mesh)
    params = load_params(base.checkpoint, base.arch, layout, shardings, jnp.bfloat16)
    with mesh:
        model = fill(by_name(params, layout), base.arch, jnp.bfloat16)
        model = seed_recipe.adapted(model, rank, mesh.shape["fsdp"])
    model.config.remat_config = tunix.RematConfig.DECODER
    return model


def main() -> None:
    """Trains one epoch and prints the mean loss of the first and the last updates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder with the Hugging Face checkpoint; none: the tiny one of the package")
    parser.add_argument("--data", help="CodeV-R1 rows or conversations; none: those of the package")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=Path("outputs/paper_v5p8"))
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=False)

    tiny = asked.model is None
    base = resolve_base(ModelConfig(path="embedded:tiny") if tiny else ModelConfig(path=asked.model))
    length, limit = (asked.length, asked.rows) if not tiny else (min(asked.length, 256), min(asked.rows, 80))
    tokenizer = load_tokenizer(base.tokenizer_folder)
    rows = batches(asked.data or "embedded:verilog_smoke/train.jsonl.gz", tokenizer, length, limit)
    updates = len(rows) // ROWS

    devices = jax.devices()
    axes = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((len(devices) // asked.tp, asked.tp), ("fsdp", "tp"), axis_types=axes)
    model = load(base, mesh, 8 if tiny else RANK)
    schedule = optax.warmup_cosine_decay_schedule(0.0, PEAK, min(WARMUP, updates // 10), updates)
    settings = peft_trainer.TrainingConfig(
        eval_every_n_steps=1_000_000_000, gradient_accumulation_steps=ROWS, pbar_description=None,
        checkpoint_root_directory=str((asked.out / "checkpoints").absolute()),
        checkpointing_options=ocp.CheckpointManagerOptions(save_interval_steps=100, max_to_keep=3),
    )  # fmt: skip
    trainer = peft_trainer.PeftTrainer(model, optax.adamw(schedule), settings)
    trainer.with_gen_model_input_fn(model_input)

    started = time.perf_counter()
    with mesh:
        trainer.train(rows)
    seconds = time.perf_counter() - started
    losses = [float(loss) for loss in trainer.metrics_logger.get_metric_history("", "loss", "train")]
    result = {"updates": updates, "rows": len(rows), "seconds": round(seconds, 1), "losses": losses}
    (asked.out / "result.json").write_text(json.dumps(result, indent=1))
    few = max(1, len(losses) // 5)
    print(f"{updates} updates, {seconds / len(rows):.2f} s per sample, compilation included")
    print(f"loss of the first updates {np.mean(losses[:few]):.3f}, of the last {np.mean(losses[-few:]):.3f}")


if __name__ == "__main__":
    main()
