"""Causal attention over packed rows: sliding or global, grouped queries, segments kept apart.

All implementations take the same arguments and give the same values; `einsum` is the reference.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

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


def mask(segment_ids: jax.Array, window: int | None) -> jax.Array:
    """[B, T, T] bool: query t sees key s if s ≤ t, both are of one segment and, in sliding layers, t - s < window.

    Distances by place in the row equal distances by position, because a segment lies in one piece.
    """
    t = jnp.arange(segment_ids.shape[1])
    distance = t[:, None] - t[None, :]
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    return seen[None] & (segment_ids[:, :, None] == segment_ids[:, None, :])


def einsum_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, window: int | None
) -> jax.Array:
    """Softmax attention with [B, N, T, T] scores in float32. q [B, T, N, H]; k, v [B, T, K, H]; result as q."""
    b, t, n, h = q.shape
    kv = k.shape[2]
    grouped = q.reshape(b, t, kv, n // kv, h)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask(segment_ids, window)[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(b, t, n, h)
