"""Causal attention over packed rows: sliding or global, grouped queries, segments kept apart.

All implementations take the same arguments and give the same values; `einsum` is the reference.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gemma4_tpu.models.remat import CONTEXT, keep

MASKED = -2.3819763e38  # Gemma's value for a masked score: finite in bfloat16 and float32


def rope(x: jax.Array, positions: jax.Array, base: float, proportion: float) -> jax.Array:
    """Rotary position embedding on the first `proportion` of the head width. x [B, T, N, H], positions [B, T]."""
    half = x.shape[-1] // 2
    rotated = int(proportion * x.shape[-1] // 2)
    exponents = (2.0 / x.shape[-1]) * jnp.arange(rotated, dtype=jnp.float32)
    inverse = jnp.pad(1.0 / base**exponents, (0, half - rotated))  # [H/2]; zero angle: not rotated
    angles = positions[..., None, None].astype(jnp.float32) * inverse  # [B, T, 1, H/2]
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def mask(segments_q: jax.Array, segments_k: jax.Array, distance: jax.Array, window: int | None) -> jax.Array:
    """Which keys a query sees: none ahead of it, only its own segment and, in sliding layers, `window` tokens.

    Args:
      segments_q: [..., Q] segment ids of the queries.
      segments_k: [..., S] segment ids of the keys.
      distance: [Q, S] places from key to query. Places in the row serve for positions, because a segment lies in one
        piece.
      window: tokens a query sees, itself included; None: all before it.

    Returns:
      [..., Q, S] bool.
    """
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    return seen & (segments_q[..., :, None] == segments_k[..., None, :])


def einsum_attention(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, window: int | None) -> jax.Array:
    """Softmax attention by plain matrix products, scores in float32; the reference for every other path.

    Sliding layers work on blocks of `window` tokens, each of which sees itself and the block before it, so that their
    scores take [B, N, T, 2·window] instead of [B, N, T, T].

    Args:
      q: [B, T, N, H].
      k: [B, T, K, H]; N is a multiple of K.
      v: as k.
      segment_ids: [B, T] int32.
      window: tokens that a query sees, itself included; None: all before it.

    Returns:
      [B, T, N, H].
    """
    t = q.shape[1]
    if window is None or t <= 2 * window:
        places = jnp.arange(t)
        seen = mask(segment_ids, segment_ids, places[:, None] - places[None, :], window)
        return keep(_attend(q, k, v, seen), CONTEXT)
    blocks = -(-t // window)
    padding = blocks * window - t
    q, k, v, segment_ids = (
        jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)) for x in (q, k, v, segment_ids)
    )

    def block(x: jax.Array) -> jax.Array:  # [B, T, …] → [B, blocks, window, …]
        return x.reshape(x.shape[0], blocks, window, *x.shape[2:])

    def with_previous(x: jax.Array, before_first: int) -> jax.Array:  # [B, T, …] → [B, blocks, 2·window, …]
        x = block(x)
        first = jnp.full_like(x[:, :1], before_first)
        return jnp.concatenate([jnp.concatenate([first, x[:, :-1]], axis=1), x], axis=2)

    distance = window + jnp.arange(window)[:, None] - jnp.arange(2 * window)[None, :]
    seen = mask(block(segment_ids), with_previous(segment_ids, -1), distance, window)  # nothing is of segment -1
    out = jax.vmap(_attend, in_axes=1, out_axes=1)(block(q), with_previous(k, 0), with_previous(v, 0), seen)
    return keep(out.reshape(q.shape)[:, :t], CONTEXT)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array) -> jax.Array:
    """Q [B, Q, N, H], k and v [B, S, K, H], seen [B, Q, S] → [B, Q, N, H]."""
    b, t, n, h = q.shape
    kv = k.shape[2]
    grouped = q.reshape(b, t, kv, n // kv, h)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32)
    scores = jnp.where(seen[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(b, t, n, h)
