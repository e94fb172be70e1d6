"""Attention for rows whose tokens are split over the `cp` axis: what a chip needs of the other chips' tokens.

Everything else in a layer works on each token by itself. Attention needs

- in sliding layers, the keys and values of the `window - 1` tokens before a chip's own: its halo, sent by the previous
  chip, or by several if chips hold fewer tokens than that;
- in global layers, those of the whole row, gathered for one layer at a time. Gemma 4 has few global layers, with one
  key head per eight query heads, so this takes less memory than the residual streams that the step keeps (31B at
  131,072 tokens: 1 GiB over tp), and one kernel call processes all queries of a chip. A ring would keep only a chip's
  share, for the same number of bytes sent, but would have to merge the softmax of its steps, which the kernel's
  backward pass does not support.

If tokens stayed in order, the chip with the last tokens of a row would take twice the average time in a global layer.
So each row is cut into 2·cp parts, and chip i processes the queries of parts i and 2·cp - 1 - i: every chip then has
the same number of token pairs. Queries travel there, and the output travels back (`exchange`).

These functions run inside `shard_map`, on a chip's own arrays. S: tokens per chip, T/cp.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gemma4_tpu.models.chunked import attention_of
from gemma4_tpu.models.sharding import CP, TP, activation_spec

NOBODYS = -1
"""Segment of non-existent keys: those of the halo before a row's first token. Padding is 0."""

Sent = list[tuple[int, int]]
"""(from, to) pairs of chips on the axis."""


def with_halo(x: jax.Array, tokens: int, axis: int) -> jax.Array:
    """[…, S, …] → […, tokens + S, …], with zeros before the start of a row."""
    own, parts = x.shape[axis], jax.lax.axis_size(CP)
    pieces = []
    for distance in range(-(-tokens // own), 0, -1):
        size = min(own, tokens - (distance - 1) * own)
        last = jax.lax.slice_in_dim(x, own - size, own, axis=axis)
        sent = [(i, i + distance) for i in range(parts - distance)]
        pieces.append(jax.lax.ppermute(last, CP, sent) if sent else jnp.zeros_like(last))
    return jnp.concatenate([*pieces, x], axis=axis)


def segments_with_halo(segment_ids: jax.Array, tokens: int) -> jax.Array:
    """[B, S] → [B, tokens + S], with `NOBODYS` before the start of a row."""
    return with_halo(segment_ids - NOBODYS, tokens, axis=1) + NOBODYS


def whole(x: jax.Array, axis: int) -> jax.Array:
    """[…, S, …] → […, T, …]."""
    return jax.lax.all_gather(x, CP, axis=axis, tiled=True)


def exchange(x: jax.Array, axis: int, *, back: bool = False) -> jax.Array:
    """[…, S, …] of a chip's own tokens → of the tokens whose queries it processes in global layers; `back` inverts
    this.
    """
    halves = jnp.split(x, 2, axis=axis)
    moves = _moves(jax.lax.axis_size(CP))
    if back:
        first, second = moves
        moves = [(there, here) for here, there in first], [(there, here) for here, there in second]
    return jnp.concatenate(
        [jax.lax.ppermute(half, CP, sent) for half, sent in zip(halves, moves, strict=True)], axis=axis
    )


def exchanged_places(length: int, parts: int) -> np.ndarray:
    """int32 [T]: the position in its row of each token after the exchange, chip by chip."""
    order = np.empty((parts, 2), np.int32)  # the first and second part of the row on each chip
    for half, sent in enumerate(_moves(parts)):
        for here, there in sent:
            order[there, half] = 2 * here + half
    return np.arange(length, dtype=np.int32).reshape(2 * parts, -1)[order.reshape(-1)].reshape(-1)


def _moves(parts: int) -> tuple[Sent, Sent]:
    """Destinations of the first and second halves of all chips: part p of 2·parts goes to chip p, or 2·parts - 1 - p.

    One of parts p and 2·parts - 1 - p is even and the other odd, so that each chip receives one first and one second
    half.
    """
    first, second = (
        [(i, min(p, 2 * parts - 1 - p)) for i, p in enumerate(range(half, 2 * parts, 2))] for half in (0, 1)
    )
    return first, second


def blockwise_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, window: int | None, *, mesh: Mesh
) -> jax.Array:
    """Like `chunked.chunked_attention`, for rows split over `cp`.

    Queries stay where they are: in global layers the chip with a row's end works longest.
    """
    heads = activation_spec("BTNH", q.shape, mesh)
    keys = P(*heads[:2], TP if k.shape[2] % mesh.shape[TP] == 0 and heads[2] else None, None)
    specs = heads, keys, keys, P(*heads[:2])

    @partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)
    def attend_here(q, k, v, segments):
        if window is None:
            before = jax.lax.axis_index(CP) * q.shape[1]
            k, v, of_keys = whole(k, 1), whole(v, 1), whole(segments, 1)
        else:
            before = window - 1
            k, v, of_keys = with_halo(k, before, 1), with_halo(v, before, 1), segments_with_halo(segments, before)
        return attention_of(q, k, v, segments, of_keys, jnp.int32(before), window)

    return attend_here(q, k, v, segment_ids)
