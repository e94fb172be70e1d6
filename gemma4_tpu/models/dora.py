"""DoRA (arXiv 2402.09353): A and B adapt a weight's direction, and the length of each of its rows is trained.

A row holds the inputs' weights for one output. It becomes magnitude · (W + scale·A·B) / ‖W + scale·A·B‖, where the norm
counts as a constant in the backward pass (section 4.3, as in PEFT).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from gemma4_tpu.models.adapted import Adapted
from gemma4_tpu.models.weights import Weight


def of_pieces(weight: Weight, x: jax.Array, pieces: tuple[int, ...]) -> jax.Array:
    """Selects the adapted pieces [c', …] from the pieces [c, …] of a weight, or of its output."""
    if len(pieces) == len(weight.hf_names):
        return x
    return jnp.stack([x[i] for i in pieces])


def norms(weight: Weight, how: Adapted, base: jax.Array, lora_a: jax.Array, lora_b: jax.Array) -> jax.Array:
    """‖W + scale·A·B‖ of each row, float32, with the dims `weight.outputs`; a constant in the backward pass.

    These are the initial magnitudes. The sum is never formed: its squared norm is ‖W‖² + 2·scale·W·(A·B) +
    scale²·‖A·B‖², and W·A has only r columns.

    Args:
      weight: its row in `weights.py`.
      how: how it is adapted.
      base: W, dense, with its dims in memory.
      lora_a: A.
      lora_b: B, of the adapted pieces.
    """
    (a, b), out = weight.adapter_dims, weight.outputs
    lora_a, lora_b = (jax.lax.stop_gradient(x.astype(jnp.float32)) for x in (lora_a, lora_b))
    base = of_pieces(weight, base, how.pieces)
    crossed = jnp.einsum(
        f"{weight.dims},{a}->r{out}", base, lora_a.astype(base.dtype), preferred_element_type=jnp.float32
    )
    gram = jnp.einsum(f"{a},{a.replace('r', 'z')}->rz", lora_a, lora_a)
    added = jnp.einsum(f"rz,{b.replace('r', 'z')}->r{out}", gram, lora_b)
    grown = jnp.sum(lora_b * (2 * how.scale * crossed + how.scale**2 * added), axis=0)
    return jnp.sqrt(jnp.maximum(squared_lengths(weight, base) + grown, 0.0))


def squared_lengths(weight: Weight, base: jax.Array) -> jax.Array:
    """‖W‖² of each row, float32."""
    inputs = tuple(i for i, dim in enumerate(weight.dims) if dim in weight.inputs)
    return jnp.sum(jnp.square(base.astype(jnp.float32)), axis=inputs)


def turned(weight: Weight, how: Adapted, magnitude: jax.Array, norm: jax.Array, y: jax.Array) -> jax.Array:
    """Returns y = x·W + scale·x·A·B, rescaled to the trained row lengths.

    Args:
      weight: its row in `weights.py`.
      how: how it is adapted.
      magnitude: with the dims `weight.outputs`, of the adapted pieces.
      norm: `norms`.
      y: of all pieces, stacked along the first dim if there are several.
    """
    ratio = magnitude / norm
    ratio = ratio[:, None, None] if "c" in weight.outputs else ratio  # [c, B, T, …]: rows and tokens come after c
    change = of_pieces(weight, y, how.pieces) * (ratio - 1).astype(
        y.dtype
    )  # a ratio near 1 would lose too much to rounding
    return y + change if len(change) == len(y) else y.at[jnp.asarray(how.pieces)].add(change)


def scaled(weight: Weight, merged: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
    """W + scale·A·B [dims in memory], rescaled to the trained row lengths."""
    inputs = tuple(i for i, dim in enumerate(weight.dims) if dim in weight.inputs)
    norm = np.sqrt(np.sum(np.square(merged), axis=inputs))
    return merged * np.expand_dims(magnitude / norm, inputs)
