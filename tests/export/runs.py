"""Run folders as training leaves them, with random trained values instead of a training."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from gemma4_tpu.architectures import from_hf_config
from gemma4_tpu.config.outputs import CheckpointConfig
from gemma4_tpu.config.schema import LoraConfig, ModelConfig, OptimizerConfig
from gemma4_tpu.models import lora as adapters
from gemma4_tpu.models import sharding, token_rows
from gemma4_tpu.models.base import Base
from gemma4_tpu.models.layout import Layout, build_tree
from gemma4_tpu.models.match import match
from gemma4_tpu.models.names import name_map
from gemma4_tpu.step.optimizer import make_optimizer
from gemma4_tpu.step.train_step import TrainState
from gemma4_tpu.training.began import FOLDER
from gemma4_tpu.training.checkpoint import Checkpoints


def make_run(
    folder: Path,
    base: Path,
    *,
    lora: LoraConfig | None = None,
    updates: tuple[int, ...] = (3,),
    best: int | None = None,
    name: str = "tiny",
    seed: int = 0,
    size: float = 0.05,
    new_tokens: tuple[str, ...] = (),
    trained: Any = None,
    initial: Any = None,
) -> Path:
    """A run folder with a checkpoint after each of `updates`; the trained values differ from update to update.

    Args:
      folder: where the run goes.
      base: checkpoint folder of the base.
      lora: None: rank 4; `enabled=False` trains every weight.
      updates: that have a checkpoint.
      best: `heldout_update_best` as the last checkpoint remembers it.
      name: `model.name`; must be a key of `ARCHITECTURES` when the run is opened.
      seed: of the values.
      size: of the values in B (or the change of each weight).
      new_tokens: `model.new_tokens`.
      trained: values instead of random ones, the same after each update.
      initial: with `lora.init`, what the adapters began as.
    """
    lora = lora or LoraConfig(rank=4, alpha=8.0)
    arch = from_hf_config(json.loads((base / "config.json").read_text()), name=name)
    layout = Layout.of(arch, lora)
    leaves = adapters.trained_leaves(layout, len(new_tokens))
    place = Base(arch, str(base), None, str(base), new_tokens)
    (folder / "checkpoints").mkdir(parents=True)
    mesh = sharding.make_mesh(1, 1)
    saver = Checkpoints(folder / "checkpoints", CheckpointConfig(keep=9), leaves, mesh)
    optimizer = make_optimizer(OptimizerConfig(), 10, leaves)
    for update in updates:
        tree = trained or _values(leaves, place, seed + update, size)
        state = TrainState(tree, optimizer.init(tree), jnp.int32(update), jax.random.key(1))
        saver.save(state, {"pipeline": {}, "totals": {"heldout_update_best": best}})
    if initial:
        saver.save_initial(FOLDER, initial, adapters.factors(layout))
    saver.wait()
    saver.close()
    config = {
        "model": asdict(ModelConfig(name=name, path=str(base), new_tokens=[*new_tokens])),
        "lora": asdict(lora),
        "name": "train",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "provenance.json").write_text(json.dumps({"fingerprints": {"base": place.fingerprint}}))
    return folder


def _values(leaves, base: Base, seed: int, size: float):
    rng = np.random.default_rng(seed)

    def array(leaf):
        noise = rng.standard_normal(leaf.array_shape).astype(np.float32)
        if "_lora_" in leaf.tunix_names[0]:
            is_b = leaf.tunix_names[0].endswith("lora_b")
            return jnp.asarray(noise * (size if is_b else 1 / np.sqrt(np.prod(leaf.shape[:-1]))))
        if leaf.path == token_rows.PATH:
            return jnp.asarray(noise * size)
        return jnp.asarray(_of_base(base, leaf) + size * noise)

    return build_tree((leaf.path, array(leaf)) for leaf in leaves)


def _of_base(base: Base, leaf) -> np.ndarray:
    checkpoint = base.checkpoint
    prefix = match(base.arch, {n: checkpoint.shape(n) for n in checkpoint.names()}, "").prefix
    tensors = name_map(base.arch)
    parts = [
        tensors[name].from_hf(lambda hf, index, shape: checkpoint.read(prefix + hf, index, shape)).astype(np.float32)
        for name in leaf.tunix_names
    ]
    return np.stack(parts) if leaf.stacked else parts[0]
