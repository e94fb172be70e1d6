"""Attention block by block in plain JAX, on any backend: memory grows with the length of a row, not with its square.

The softmax is summed online (FlashAttention, arXiv 2205.14135), over blocks of keys that a block of queries can see:
none ahead of it, none outside its window, none of other examples. The backward pass makes the scores again, from one
number for each query. Fused kernels keep scores on the chip; here each block's pass through memory once.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gemma4_tpu.models.attention import MASKED, mask
from gemma4_tpu.models.remat import CONTEXT, keep

BLOCK = 512
"""Tokens in a block, at most."""
NO_QUERY, NO_KEY = -2, -3
"""Segments of what only fills a block."""
Pair = tuple[jax.Array, jax.Array]
"""Gradients of keys and of values."""


def chunked_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, window: int | None
) -> jax.Array:
    """As `attention.einsum_attention`."""
    return attention_of(q, k, v, segment_ids, segment_ids, jnp.int32(0), window)


def attention_of(
    q: jax.Array, k: jax.Array, v: jax.Array, of_q: jax.Array, of_k: jax.Array, before: jax.Array,
    window: int | None, block: int = BLOCK,
) -> jax.Array:  # fmt: skip
    """Attention of queries to keys that begin earlier.

    Args:
      q: [B, Q, N, H].
      k: [B, S, K, H]; N is a multiple of K.
      v: as k.
      of_q: [B, Q] segment ids of the queries.
      of_k: [B, S] segment ids of the keys.
      before: int32, keys before that of the first query; before + Q is at most S.
      window: tokens that a query sees, itself included; None: all before it.
      block: tokens in a block, at most.

    Returns:
      [B, Q, N, H].
    """
    b, length, heads, width = q.shape
    size = min(block, length)
    group = heads // k.shape[2]
    given = _Blocks(
        _cut(q, size).reshape(-1, b, size, k.shape[2], group, width).transpose(0, 1, 3, 4, 2, 5),
        _cut(k, size).swapaxes(2, 3),
        _cut(v, size).swapaxes(2, 3),
        _cut(of_q, size, NO_QUERY),
        _cut(of_k, size, NO_KEY),
    )
    out = _attend(window, given, before)  # [blocks, B, K, G, size, H]
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(b, -1, heads, width)[:, :length]


class _Blocks(NamedTuple):
    """Queries and keys, cut; `size` tokens in each block of either."""

    q: jax.Array
    """[blocks, B, K, G, size, H]"""
    k: jax.Array
    """[blocks, B, K, size, H]"""
    v: jax.Array
    of_q: jax.Array
    """[blocks, B, size]"""
    of_k: jax.Array


def _cut(x: jax.Array, size: int, filling: int = 0) -> jax.Array:
    """[B, T, …] → [blocks, B, size, …]."""
    missing = -x.shape[1] % size
    x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2), constant_values=filling)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _visited(given: _Blocks, before: jax.Array, window: int | None) -> tuple[jax.Array, jax.Array]:
    """For each block of queries the first block of keys that it visits, and the one after the last.

    Blocks in between may hold other examples (rows differ); the mask sees to these.
    """
    size, count = given.of_q.shape[-1], len(given.of_k)
    start = before + size * jnp.arange(len(given.of_q))  # the key of each block's first query
    stop = jnp.minimum((start + size - 1) // size + 1, count)
    first = jnp.zeros_like(stop) if window is None else jnp.maximum(start - window + 1, 0) // size
    # Examples follow each other and padding (0) ends a row, so that few blocks' ranges of segments meet.
    of_q, of_k = (jnp.where(x == 0, jnp.iinfo(jnp.int32).max, x) for x in (given.of_q, given.of_k))
    meet = (of_q.min(-1)[:, None] <= of_k.max(-1)[None]) & (of_k.min(-1)[None] <= of_q.max(-1)[:, None])
    numbers = jnp.arange(count)
    possible = meet.any(-1) & (numbers >= first[:, None]) & (numbers < stop[:, None])
    return jnp.where(possible.any(-1), possible.argmax(-1), stop - 1), stop


def _scores(given: _Blocks, i: jax.Array, j: jax.Array, before: jax.Array, window: int | None) -> jax.Array:
    """Of block i of queries with block j of keys, float32 [B, K, G, size, size]."""
    size = given.of_q.shape[-1]
    places = jnp.arange(size)
    distance = (before + i * size + places)[:, None] - (j * size + places)[None, :]
    seen = mask(given.of_q[i], given.of_k[j], distance, window)
    scores = jnp.einsum("bkgqh,bksh->bkgqs", given.q[i], given.k[j], preferred_element_type=jnp.float32)
    return jnp.where(seen[:, None, None], scores, MASKED)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(window: int | None, given: _Blocks, before: jax.Array) -> jax.Array:
    return _forward(window, given, before)[0]


def _forward(window: int | None, given: _Blocks, before: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Attention's output as `given.q`, and the logarithm of each query's sum [blocks, B, K, G, size]."""
    first, stop = _visited(given, before, window)

    def of_queries(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        def add(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            most, total, out = carry
            scores = _scores(given, i, j, before, window)
            higher = jnp.maximum(most, scores.max(-1))
            weights, shrunk = jnp.exp(scores - higher[..., None]), jnp.exp(most - higher)
            added = jnp.einsum(
                "bkgqs,bksh->bkgqh", weights.astype(given.v.dtype), given.v[j], preferred_element_type=jnp.float32
            )
            return higher, total * shrunk + weights.sum(-1), out * shrunk[..., None] + added

        shape = given.q.shape[1:]
        begun = (jnp.full(shape[:-1], -math.inf), jnp.zeros(shape[:-1]), jnp.zeros(shape))
        most, total, out = jax.lax.fori_loop(first[i], stop[i], add, begun)
        return (out / total[..., None]).astype(given.q.dtype), most + jnp.log(total)

    return jax.lax.map(of_queries, jnp.arange(len(given.q)))


def _kept(window: int | None, given: _Blocks, before: jax.Array) -> tuple[jax.Array, tuple]:
    out, logs = (keep(x, CONTEXT) for x in _forward(window, given, before))
    return out, (given, before, out, logs)


def _backward(window: int | None, kept: tuple, g: jax.Array) -> tuple[_Blocks, None]:
    given, before, out, logs = kept
    first, stop = _visited(given, before, window)
    along = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)  # what normalising takes off

    def of_queries(grads: Pair, i: jax.Array) -> tuple[Pair, jax.Array]:
        own = g[i]

        def add(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            dq, dk, dv = carry
            weights = jnp.exp(_scores(given, i, j, before, window) - logs[i][..., None])
            of_v = _product("bkgqs,bkgqh->bksh", weights.astype(own.dtype), own)
            of_weights = _product("bkgqh,bksh->bkgqs", own, given.v[j])
            of_scores = (weights * (of_weights - along[i][..., None])).astype(own.dtype)
            of_k = _product("bkgqs,bkgqh->bksh", of_scores, given.q[i])
            dq = dq + _product("bkgqs,bksh->bkgqh", of_scores, given.k[j])
            return dq, dk.at[j].add(of_k), dv.at[j].add(of_v)

        dq, dk, dv = jax.lax.fori_loop(first[i], stop[i], add, (jnp.zeros(own.shape), *grads))
        return (dk, dv), dq.astype(given.q.dtype)

    begun = jnp.zeros(given.k.shape), jnp.zeros(given.v.shape)
    (dk, dv), dq = jax.lax.scan(of_queries, begun, jnp.arange(len(given.q)))
    return _Blocks(dq, dk.astype(given.k.dtype), dv.astype(given.v.dtype), None, None), None  # type: ignore[arg-type]


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


_attend.defvjp(_kept, _backward)
