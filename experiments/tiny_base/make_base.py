"""Pretrain the embedded tiny base: `python experiments/tiny_base/make_base.py`.

Full training of `tiny` from random weights, by the project's own pipeline and step, in two stages: source files of
synthetic Verilog (modules with comments on their ports and behaviour), then the same with one conversation in four
texts that goes the other way round (module in, specification out), so that chat markup and the words of prompts are
known. No prompt is ever answered with a module, and none of the held-out modules is among them. Saves
`model.safetensors` in bfloat16, named as transformers names its tensors.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from experiments.verilog_smoke.families import draw_designs
from experiments.verilog_smoke.prompts import document, explanation
from gemma4_tpu.assets import ROOT
from gemma4_tpu.config.machines import HardwareConfig, MeshConfig
from gemma4_tpu.config.schema import DataConfig, LoraConfig, ModelConfig, OptimizerConfig, TrainerConfig
from gemma4_tpu.data.examples import Examples, ExamplesBuilder, Origin
from gemma4_tpu.data.pipeline import Pipeline
from gemma4_tpu.data.tokenizer import load_tokenizer
from gemma4_tpu.hardware import MeshSizes
from gemma4_tpu.models.base import resolve_base
from gemma4_tpu.models.layout import Layout
from gemma4_tpu.models.names import name_map
from gemma4_tpu.models.params import by_name
from gemma4_tpu.training.programs import Programs
from gemma4_tpu.training.recipe import Recipe
from gemma4_tpu.training.setup import set_up, start_mesh, to_mesh

SEQUENCE_LENGTH = 256
ROWS_PER_UPDATE = 8
TRAINER = TrainerConfig(remat="none", compute_dtype="float32")


@dataclass(frozen=True, kw_only=True)
class ReadingStage:
    """What the base reads, and for how long."""

    seed: int
    texts: int
    conversations_every: int | None
    """One in this many texts is a conversation; None: none is."""
    ports: float
    """Share of source files with a comment on their ports."""
    behaviour: float
    """Share of source files with a comment on what they do."""
    updates: int
    learning_rate: float
    warmup_updates: int


STAGES = (
    ReadingStage(
        seed=0, texts=12_000, conversations_every=None, ports=0.6, behaviour=0.8,
        updates=700, learning_rate=4e-3, warmup_updates=30,
    ),
    ReadingStage(
        seed=1, texts=4_000, conversations_every=4, ports=0.85, behaviour=0.9,
        updates=120, learning_rate=2e-3, warmup_updates=10,
    ),
)  # fmt: skip

log = logging.getLogger(__name__)


def make_texts(stage: ReadingStage, tokenizer: Any) -> list[str]:
    """Texts on training designs; held-out modules are not among them."""
    rng = Random(f"{stage.seed}-documents")
    texts = []
    for number, design in enumerate(islice(draw_designs(rng, heldout=False), stage.texts), start=1):
        if stage.conversations_every and number % stage.conversations_every == 0:
            texts.append(tokenizer.apply_chat_template(explanation(design, rng), tokenize=False))
        else:
            texts.append(f"<bos>{document(design, rng, ports=stage.ports, behaviour=stage.behaviour)}<eos>")
    return texts


def encode(texts: list[str], tokenizer: Any) -> Examples:
    """Every text, each of its tokens a target."""
    builder = ExamplesBuilder([1.0])
    for row, ids in enumerate(tokenizer(texts, add_special_tokens=False)["input_ids"], start=1):
        builder.add(np.array(ids, np.int32), np.ones(len(ids), bool), 0, Origin("texts", row))
    return builder.build({})


def pretrain(stage: ReadingStage, examples: Examples, start: str) -> tuple[Any, Layout]:
    """Trains every weight of the model that `start` names; returns the parameters and their layout."""
    base = resolve_base(ModelConfig(name="tiny", path=start, tokenizer="embedded:tiny"))
    mesh = start_mesh(HardwareConfig(), MeshConfig(), base.arch)
    data = DataConfig(sequence_length=SEQUENCE_LENGTH)
    pipeline = Pipeline(
        examples=examples, data=data, rows_per_update=ROWS_PER_UPDATE, seed=stage.seed, max_updates=stage.updates
    )
    optimizer = OptimizerConfig(
        learning_rate=stage.learning_rate, warmup_updates=stage.warmup_updates, end_fraction=0.05, b2=0.98,
        weight_decay=0.01,
    )  # fmt: skip
    recipe = Recipe(
        arch=base.arch, hardware=HardwareConfig(), lora=LoraConfig(enabled=False), optimizer=optimizer,
        trainer=TRAINER, mesh=MeshSizes(**mesh.shape), rows=ROWS_PER_UPDATE, length=SEQUENCE_LENGTH,
        updates=stage.updates,
    )  # fmt: skip
    job = set_up(base, recipe, mesh)
    programs = Programs(job.step, job.state, pipeline.lengths)
    state, started = job.state, time.perf_counter()
    for done, update in enumerate(pipeline, start=1):
        state, metrics = programs.train(state, job.base, to_mesh(update.arrays, mesh))
        if done % 50 == 0 or done == stage.updates:
            loss, seconds = float(metrics.loss), time.perf_counter() - started
            log.info("update %d of %d, epoch %.2f: loss %.4f, %.0f s", done, stage.updates, update.epoch, loss, seconds)
    pipeline.close()
    return state.trained, job.step.model.layout


def save(params: Any, layout: Layout, folder: Path) -> Path:
    """Writes `model.safetensors` in bfloat16, named and laid out as `Gemma4ForCausalLM` saves it."""
    tensors = name_map(layout.arch)
    saved = {}
    for name, array in by_name(params, layout).items():
        for hf_name, value in tensors[name].to_hf(np.asarray(array)).items():
            saved[f"model.{hf_name}"] = np.ascontiguousarray(value.astype(ml_dtypes.bfloat16))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(saved, folder / "model.safetensors", metadata={"format": "pt"})
    return folder / "model.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "tiny", help="folder to write to")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    tokenizer = load_tokenizer(str(ROOT / "tiny"))
    args.out.mkdir(parents=True, exist_ok=True)
    if args.out != ROOT / "tiny":
        shutil.copy(ROOT / "tiny" / "config.json", args.out)
    start = "random:0"
    for stage in STAGES:
        examples = encode(make_texts(stage, tokenizer), tokenizer)
        log.info("%d texts, %d tokens", len(examples), len(examples.tokens))
        path = save(*pretrain(stage, examples, start), args.out)
        log.info("%s: %.1f MB", path, path.stat().st_size / 1e6)
        start = str(args.out)


if __name__ == "__main__":
    main()
