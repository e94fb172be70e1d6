"""Logits of base, LoRA and merged model on fixed prompts, in float32, by the forward pass that training ran."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gemma4_tpu.export.trained import Trained
from gemma4_tpu.models import lora as adapters
from gemma4_tpu.models import sharding
from gemma4_tpu.models.gemma4 import Model, hidden_states, logits
from gemma4_tpu.models.layout import Layout, Leaf, build_tree
from gemma4_tpu.models.load import load_params
from gemma4_tpu.models.tensorfile import Checkpoint

log = logging.getLogger(__name__)

PROMPTS = (
    "module counter(input clk, input rst, output reg [7:0] q);\n  always @(posedge clk)\n    if (rst) q <= 0;\n",
    "Write a Verilog module that adds two 8-bit numbers and sets a flag when the sum overflows.",
    "The three laws of thermodynamics say that energy is conserved, that entropy does not fall, and",
    "def fibonacci(n: int) -> int:\n    return n if n < 2 else",
)
TOKENS = 48
_FLOAT32_BOUND = 2e-3  # of float32 against float32: two orders of summation through every layer; measured: under 1e-4


@dataclass(frozen=True)
class LogitParity:
    """LoRA model against merged model; differences over real positions only."""

    dtype: str
    """Of the merged weights; the comparison itself is in float32."""
    tokens: int
    prompts: str
    """`text`, or `random` tokens where there is no tokenizer."""
    relative_rms: float
    """rms(merged − LoRA) / rms(LoRA)."""
    bound: float
    """What rounding the weights explains of it."""
    base_relative_rms: float
    """rms(base − LoRA) / rms(LoRA): the effect of the training."""
    max_abs_difference: float
    mean_kl_nats: float
    """KL(LoRA ‖ merged) per position."""
    base_mean_kl_nats: float
    """KL(LoRA ‖ base) per position."""
    top1_agreement: float
    """Share of positions at which both prefer the same token."""
    differs_from_base: bool
    """The merged model's logits are not the base's."""
    passed: bool


def compare_logits(trained: Trained, merged: Checkpoint) -> LogitParity:
    """Runs the three models one after the other; one of them is in memory at a time."""
    arch = trained.base.arch
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), (sharding.FSDP, sharding.TP))
    model = Model(
        arch=arch, compute_dtype=jnp.float32, lora_scale=trained.scale if trained.lora.enabled else 1.0, mesh=mesh
    )
    tokens, mask, kind = _prompts(trained)
    forward = jax.jit(partial(_logits, model))
    load = partial(_load, model.layout, mesh)
    base = load(trained.checkpoint)
    of_base = np.asarray(forward(base, None, tokens, mask))
    if trained.lora.enabled:
        of_lora = np.asarray(
            forward(base, _stacked(trained, adapters.leaves(model.layout, trained.lora)), tokens, mask)
        )
    else:
        of_lora = np.asarray(forward(_stacked(trained, model.layout.leaves()), None, tokens, mask))
    del base
    of_merged = np.asarray(forward(load(merged), None, tokens, mask))
    dtype = merged.dtype(trained.prefix + next(iter(trained.tensors.values())).hf_names[0])
    rows = mask > 0
    return _compare(of_base[rows], of_lora[rows], of_merged[rows], dtype, arch.num_layers, kind)


def _compare(base: np.ndarray, lora: np.ndarray, merged: np.ndarray, dtype: Any, layers: int, kind: str) -> LogitParity:
    """Logits [positions, V] of the three models."""
    size = _rms(lora)
    relative = _rms(merged - lora) / size
    bound = rounding_bound(dtype, layers)
    differs = bool(np.any(merged != base))
    return LogitParity(
        dtype=np.dtype(dtype).name,
        tokens=len(lora),
        prompts=kind,
        relative_rms=relative,
        bound=bound,
        base_relative_rms=_rms(base - lora) / size,
        max_abs_difference=float(np.abs(merged - lora).max()),
        mean_kl_nats=_mean_kl(lora, merged),
        base_mean_kl_nats=_mean_kl(lora, base),
        top1_agreement=float(np.mean(lora.argmax(-1) == merged.argmax(-1))),
        differs_from_base=differs,
        passed=bool(relative <= bound) and differs,
    )


def rounding_bound(dtype: Any, layers: int) -> float:
    """Largest relative rms difference of logits that rounding every weight once explains.

    A rounded weight is off by at most eps/2 of its value. Such errors are independent, so a layer's output is off by at
    most eps/2 of its size, and the two blocks of each of L layers add up like √(2L); twice that for what the
    non-linearities add.
    """
    import ml_dtypes

    return max(_FLOAT32_BOUND, float(ml_dtypes.finfo(dtype).eps) * math.sqrt(2 * layers))


def _logits(model: Model, params: Any, lora: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return logits(model, params, hidden_states(model, params, lora, tokens, mask, positions))


def _load(layout: Layout, mesh: Mesh, checkpoint: Checkpoint) -> Any:
    places = layout.tree(lambda x: sharding.named(mesh, x.tunix_names[0], x.shape, stacked=x.stacked))
    return load_params(checkpoint, layout.arch, layout, places, np.float32)


def _stacked(trained: Trained, leaves: Any) -> Any:
    """The trained values as the tree that the forward pass takes."""

    def array(leaf: Leaf) -> jax.Array:
        parts = [trained.state.read(name) for name in leaf.tunix_names]
        return jnp.asarray(np.stack(parts) if leaf.stacked else parts[0], jnp.float32)

    return build_tree((leaf.path, array(leaf)) for leaf in leaves)


def _prompts(trained: Trained) -> tuple[np.ndarray, np.ndarray, str]:
    """Tokens [B, T] and segment ids [B, T] (1 = real)."""
    folder, vocab_size = Path(trained.base.tokenizer_folder), trained.base.arch.vocab_size
    tokens = np.zeros((len(PROMPTS), TOKENS), np.int32)
    mask = np.zeros_like(tokens)
    kind = "text"
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        encode = Tokenizer.from_file(str(folder / "tokenizer.json")).encode
        rows = [encode(prompt).ids[:TOKENS] for prompt in PROMPTS]
    else:
        kind = "random"
        rng = np.random.default_rng(0)
        rows = [rng.integers(3, vocab_size, TOKENS - 4 * i).tolist() for i in range(len(PROMPTS))]
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)], mask[row, : len(ids)] = ids, 1
    return tokens, mask, kind


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def _mean_kl(first: np.ndarray, second: np.ndarray) -> float:
    """KL(first ‖ second) of the distributions that logits [positions, V] stand for, in nats per position."""
    p, q = _log_softmax(first), _log_softmax(second)
    return float(np.mean(np.sum(np.exp(p) * (p - q), axis=-1)))


def _log_softmax(scores: np.ndarray) -> np.ndarray:
    shifted = scores.astype(np.float64) - scores.max(-1, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))
