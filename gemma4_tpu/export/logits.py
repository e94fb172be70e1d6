"""Compares logits of base, LoRA and merged model on fixed prompts, in float32, with the forward pass of training."""

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

from gemma4_tpu.data.tokenizer import load_limit, tokenizer_limit
from gemma4_tpu.errors import UserError
from gemma4_tpu.export.probe_prompts import from_logits
from gemma4_tpu.export.trained import Trained
from gemma4_tpu.models import lora as adapters
from gemma4_tpu.models import sharding, token_rows
from gemma4_tpu.models.gemma4 import Model, hidden_states, logits
from gemma4_tpu.models.layout import Leaf, build_tree, get
from gemma4_tpu.models.names import full_name
from gemma4_tpu.models.params import load_params
from gemma4_tpu.models.tensorfile import Checkpoint
from gemma4_tpu.models.weights import EMBEDDING

log = logging.getLogger(__name__)

PROMPTS = (
    "module counter(input clk, input rst, output reg [7:0] q);\n  always @(posedge clk)\n    if (rst) q <= 0;\n",
    "Write a Verilog module that adds two 8-bit numbers and sets a flag when the sum overflows.",
    "The three laws of thermodynamics say that energy is conserved, that entropy does not fall, and",
    "def fibonacci(n: int) -> int:\n    return n if n < 2 else",
)
TOKENS = 48
GIVEN_TOKENS = 512
"""Tokens compared of each prompt in a file."""
FLOAT32_BOUND = 2e-3  # relative rms that a different order of summation in float32 explains; measured: under 1e-4


@dataclass(frozen=True)
class LogitParity:
    """Comparison of the LoRA model with the merged model over real positions; differences are rms relative to the LoRA
    model's logits.

    Rounding the merged weights to the base's dtype changes the logits by an amount that depends on the model (a large
    one if a router decides differently). So it is measured: `rounded` is the LoRA model with its weights merged and
    rounded in memory, without any of the export's code. The exported file must agree with that.
    """

    dtype: str
    """Dtype of the merged weights; the comparison itself is in float32."""
    tokens: int
    prompts: str
    """`text`, or `random` tokens if there is no tokenizer."""
    merged_to_rounded: float
    """The difference that the export itself causes."""
    bound: float
    """Largest `merged_to_rounded` that passes: float32 arithmetic, or a fifth of `rounded_to_lora`, because a value
    halfway between two representable ones can be rounded either way.
    """
    merged_to_lora: float
    """The difference that users of the merged model see."""
    rounded_to_lora: float
    """The part of it due to rounding."""
    base_to_lora: float
    """The effect of training."""
    max_abs_difference: float
    """Largest absolute difference of a logit, merged to LoRA."""
    mean_kl_nats: float
    """KL(LoRA ‖ merged) per position."""
    base_mean_kl_nats: float
    """KL(LoRA ‖ base) per position."""
    top1_agreement: float
    """Share of positions at which merged and LoRA model prefer the same token."""
    differs_from_base: bool
    """Whether the merged model's logits differ from the base's."""
    passed: bool
    probes: tuple[dict[str, Any], ...]
    """Prompts on which merged and base model prefer different tokens (see `export/probe_prompts.py`)."""


def compare_logits(trained: Trained, merged: Checkpoint) -> LogitParity:
    """Runs the models one after the other, with one in memory at a time."""
    arch = trained.base.arch
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    model = Model(layout=trained.layout, compute_dtype=jnp.float32, mesh=mesh)
    tokens, mask, kind = prompts_of(trained)
    places = sharding.places(model.layout, mesh)

    def dtype(name: str) -> Any:
        """Dtype of a weight on disk; that of norms can differ from that of matrices."""
        return merged.dtype(full_name(trained.prefix, trained.tensors[name].hf_names[0]))

    def run(params: Any, adapter: Any = None) -> np.ndarray:
        return np.asarray(forward(model, params, adapter, tokens, mask))[mask > 0]  # [positions, V]

    params = load_params(trained.checkpoint, arch, model.layout, places, np.float32)
    base = run(params)
    for leaf in model.layout.trained_in_full():
        _put(params, leaf, values(trained, leaf))
    table, rows = params["embedder"], trained.token_rows
    if rows:
        new = jnp.asarray(trained.state.read(token_rows.NAME))
        table["input_embedding"] = token_rows.put(table["input_embedding"], rows, new)
    tuned = run(params, stacked(trained, adapters.leaves(model.layout)) or None)
    for leaf in model.layout.trained_in_full():
        _put(params, leaf, _rounded(get(params, leaf.path), dtype(leaf.tunix_names[0])))
    for adapter in adapters.adapters(model.layout):
        _merge_in_place(params, trained, adapter, dtype(adapter.base.tunix_names[0]))
    if rows:
        table["input_embedding"] = token_rows.put(table["input_embedding"], rows, _rounded(new, dtype(EMBEDDING)))
    rounded = run(params)
    del params, table
    final = run(load_params(merged, arch, model.layout, places, np.float32))
    probes = from_logits(tokens, mask, base, final)
    largest = max(trained.tensors.values(), key=lambda tensor: math.prod(tensor.hf_shape))
    return _compare(base, tuned, rounded, final, dtype(largest.name), kind, tuple(probes))


def _merge_in_place(params: Any, trained: Trained, adapter: adapters.Adapter, dtype: Any) -> None:
    """Replaces a stacked weight [R, …] of the tree with base plus adapter, rounded to `dtype`."""
    leaf, how, read = adapter.base, adapter.how, trained.state.read
    whole = np.array(get(params, leaf.path))
    for of_layer, *names in zip(whole, *(part.tunix_names for part in adapter.leaves), strict=True):
        where = list(how.pieces) if len(leaf.weight.hf_names) > 1 else slice(None)
        of_layer[where] = adapters.merged(leaf.weight, how, of_layer[where], [read(name) for name in names])
    _put(params, leaf, _rounded(jnp.asarray(whole), dtype))


def _put(params: Any, leaf: Leaf, value: jax.Array) -> None:
    get(params, leaf.path[:-1])[leaf.path[-1]] = value


def _rounded(value: jax.Array, dtype: Any) -> jax.Array:
    return value.astype(dtype).astype(jnp.float32)


def _compare(
    base: np.ndarray, tuned: np.ndarray, rounded: np.ndarray, final: np.ndarray, dtype: Any, kind: str,
    probes: tuple[dict[str, Any], ...],
) -> LogitParity:  # fmt: skip
    """Compares logits [positions, V] of base, LoRA model, rounded LoRA model, and the merged model on disk."""
    size = _rms(tuned)
    off, rounding = _rms(final - rounded) / size, _rms(rounded - tuned) / size
    bound = max(FLOAT32_BOUND, rounding / 5)
    differs = bool(np.any(final != base))
    return LogitParity(
        dtype=np.dtype(dtype).name,
        tokens=len(tuned),
        prompts=kind,
        merged_to_rounded=off,
        bound=bound,
        merged_to_lora=_rms(final - tuned) / size,
        rounded_to_lora=rounding,
        base_to_lora=_rms(base - tuned) / size,
        max_abs_difference=float(np.abs(final - tuned).max()),
        mean_kl_nats=_mean_kl(tuned, final),
        base_mean_kl_nats=_mean_kl(tuned, base),
        top1_agreement=float(np.mean(tuned.argmax(-1) == final.argmax(-1))),
        differs_from_base=differs,
        passed=bool(off <= bound) and differs,
        probes=probes,
    )


@partial(jax.jit, static_argnums=0)
def forward(model: Model, params: Any, lora: Any, tokens: Any, mask: Any) -> jax.Array:
    """Logits [B, T, V] of tokens [B, T]; mask [B, T] is 1 for real tokens."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return logits(model, params, hidden_states(model, params, lora, tokens, mask, positions))


def stacked(trained: Trained, leaves: Any) -> Any:
    """The trained values as the tree that the forward pass takes."""
    return build_tree((leaf.path, values(trained, leaf)) for leaf in leaves)


def values(trained: Trained, leaf: Leaf) -> jax.Array:
    """The trained values of one array."""
    parts = [trained.state.read(name) for name in leaf.tunix_names]
    return jnp.asarray(np.stack(parts) if leaf.stacked else parts[0], jnp.float32)


def prompts_of(trained: Trained, path: str | None = None) -> tuple[np.ndarray, np.ndarray, str]:
    """Tokens [B, T], segment ids [B, T] (1 = real), and their origin: `text`, `random` or the file.

    Args:
      trained: the run; without a tokenizer the tokens are random.
      path: a file with one prompt per line; None: `PROMPTS`.

    Raises:
      UserError: the file contains no prompt, or there is no tokenizer for it.
    """
    texts, length = (PROMPTS, TOKENS) if path is None else (given_prompts(path), GIVEN_TOKENS)
    tokenizer = Path(trained.base.tokenizer_folder) / "tokenizer.json"
    if tokenizer.is_file():
        from tokenizers import Tokenizer

        folder = trained.base.tokenizer_folder
        with load_limit(folder):
            encode = Tokenizer.from_file(str(tokenizer)).encode
        with tokenizer_limit(folder, sum(map(len, texts))):
            rows = [encode(text).ids[:length] for text in texts]
    elif path is not None:
        raise UserError(f"export.prompts={path}: there is no {tokenizer} to tokenize them; leave it out")
    else:
        rng = np.random.default_rng(0)
        rows = [rng.integers(3, trained.base.arch.vocab_size, TOKENS - 4 * i).tolist() for i in range(len(texts))]
    tokens = np.zeros((len(rows), max(map(len, rows)) if path else TOKENS), np.int32)
    mask = np.zeros_like(tokens)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)], mask[row, : len(ids)] = ids, 1
    return tokens, mask, path or ("text" if tokenizer.is_file() else "random")


def given_prompts(path: str) -> list[str]:
    """The non-empty lines of a file.

    Raises:
      UserError: the file can't be read, or has none.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"export.prompts={path}: can't be read ({error}); give a file of UTF-8 text") from None
    if not (found := [line for line in lines if line.strip()]):
        raise UserError(f"export.prompts={path}: contains no prompt; write one per line")
    return found


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def _mean_kl(first: np.ndarray, second: np.ndarray) -> float:
    """Mean KL(first ‖ second) of the distributions given by logits [positions, V], in nats per position."""
    p, q = log_softmax(first), log_softmax(second)
    return float(np.mean(np.sum(np.exp(p) * (p - q), axis=-1)))


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """Over the last dim, in float64."""
    shifted = scores.astype(np.float64) - scores.max(-1, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))
