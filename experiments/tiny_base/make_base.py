"""Pretrain the embedded tiny base: `python experiments/tiny_base/make_base.py`.

Full training of `tiny` from random weights, by the project's own pipeline and step, on source files of synthetic
Verilog: modules with comments on their ports and behaviour. No question, no chat markup, no module named `TopModule`,
and none of the held-out modules. Saves `model.safetensors` in bfloat16, named as transformers names its tensors.
"""

from __future__ import annotations

import argparse
import logging
import time
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from gemma4_tpu.assets import ROOT
from gemma4_tpu.config.schema import (
    DataConfig,
    HardwareConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainerConfig,
)
from gemma4_tpu.data.examples import Examples, ExamplesBuilder, Origin
from gemma4_tpu.data.pipeline import Pipeline
from gemma4_tpu.models.base import resolve_base
from gemma4_tpu.models.layout import Layout
from gemma4_tpu.models.load import by_name
from gemma4_tpu.models.names import name_map
from gemma4_tpu.training.job import build_job, start_mesh, to_mesh
from gemma4_tpu.training.programs import Programs
from gemma4_tpu.verilog_smoke.families import draw_designs
from gemma4_tpu.verilog_smoke.prompts import document

SEQUENCE_LENGTH = 256
ROWS_PER_UPDATE = 8
OPTIMIZER = OptimizerConfig(learning_rate=4e-3, b2=0.98, weight_decay=0.01, warmup_updates=30, end_fraction=0.05)
TRAINER = TrainerConfig(remat="none", compute_dtype="float32")

log = logging.getLogger(__name__)


def make_documents(seed: int, count: int) -> list[str]:
    """Source files of training designs; held-out modules are not among them."""
    rng = Random(f"{seed}-documents")
    return [document(design, rng) for design in islice(draw_designs(rng, heldout=False), count)]


def encode(documents: list[str], tokenizer: Tokenizer) -> Examples:
    """Every document between `<bos>` and `<eos>`, each of its tokens a target."""
    builder = ExamplesBuilder([1.0])
    eos = tokenizer.token_to_id("<eos>")
    for row, text in enumerate(documents, start=1):
        ids = np.array([*tokenizer.encode(text).ids, eos], np.int32)
        builder.add(ids, np.ones(len(ids), bool), 0, Origin("documents", row))
    return builder.build({})


def pretrain(examples: Examples, seed: int, updates: int) -> tuple[Any, Layout]:
    """Trains every weight; returns the parameters and their layout."""
    base = resolve_base(ModelConfig(name="tiny", path=f"random:{seed}"))
    mesh = start_mesh(HardwareConfig(), MeshConfig(), base.arch)
    data = DataConfig(sequence_length=SEQUENCE_LENGTH)
    pipeline = Pipeline(examples=examples, data=data, rows_per_update=ROWS_PER_UPDATE, seed=seed, max_updates=updates)
    job = build_job(base, LoraConfig(enabled=False), OPTIMIZER, TRAINER, mesh, updates)
    programs = Programs(job.step, job.state, pipeline.lengths)
    state, started = job.state, time.perf_counter()
    for done, update in enumerate(pipeline, start=1):
        state, metrics = programs.train(state, job.base, to_mesh(update.arrays, mesh))
        if done % 50 == 0 or done == updates:
            seconds = time.perf_counter() - started
            log.info(
                "update %d of %d, epoch %.2f: loss %.4f, %.0f s", done, updates, update.epoch, metrics.loss, seconds
            )
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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--documents", type=int, default=12_000)
    parser.add_argument("--updates", type=int, default=700)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    tokenizer = Tokenizer.from_file(str(ROOT / "tiny" / "tokenizer.json"))
    examples = encode(make_documents(args.seed, args.documents), tokenizer)
    log.info("%d documents, %d tokens", len(examples), len(examples.tokens))
    path = save(*pretrain(examples, args.seed, args.updates), args.out)
    log.info("%s: %.1f MB", path, path.stat().st_size / 1e6)


if __name__ == "__main__":
    main()
