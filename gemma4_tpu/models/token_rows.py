"""Rows of the embedding that are trained by themselves: those of `model.new_tokens`, in addition to the adapters.

Like PEFT's `trainable_token_indices`: the rows of the input table and of the output matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from gemma4_tpu.models.layout import Layout, Leaf
from gemma4_tpu.models.weights import BY_NAME, EMBEDDING

NAME = "embedder.token_rows"
PATH = tuple(NAME.split("."))


def trained_alone(layout: Layout, ids: Sequence[int]) -> tuple[int, ...]:
    """Those of the rows `ids` that are trained by themselves; none if the whole table is trained."""
    return () if EMBEDDING in layout.in_full else tuple(ids)


def leaf(layout: Layout, count: int) -> Leaf:
    """The array of `count` rows, [t, D]."""
    return Leaf(PATH, (NAME,), (count, layout.arch.embed_dim), False, BY_NAME[EMBEDDING], "td")


def take(table: jax.Array, ids: Sequence[int]) -> jax.Array:
    """These rows [t, D] of the table [V, D], in float32."""
    return table[jnp.asarray(ids)].astype(jnp.float32)


def put(table: jax.Array, ids: Sequence[int], rows: jax.Array) -> jax.Array:
    """The table [V, D] with these rows [t, D]."""
    return table.at[jnp.asarray(ids)].set(rows.astype(table.dtype))
