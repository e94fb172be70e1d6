"""Causal attention over packed rows: sliding or global, with grouped queries and separate segments.

All implementations take the same arguments and return the same values; `einsum` is the reference.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gemma4_tpu.models.remat import CONTEXT, keep

MASKED = -2.3819763e38  # Gemma's value for a masked score: finite in bfloat16 and float32
GLOBAL_BLOCKS, GLOBAL_LEAST = 8, 128
"""Global layers use at most this many blocks of queries, with at least this many tokens each."""
WINDOW_BLOCKS, WINDOW_LEAST = 4, 32
"""Sliding layers use this many blocks per window, with at least this many tokens each."""


def rope(x: jax.Array, positions: jax.Array, base: float, proportion: float = 1.0, factor: float = 1.0) -> jax.Array:
    """Rotary position embedding of the first `proportion` of the head width, with frequencies divided by `factor`.

    x [B, T, N, H], positions [B, T].
    """
    half = x.shape[-1] // 2
    rotated = int(proportion * x.shape[-1] // 2)
    exponents = (2.0 / x.shape[-1]) * jnp.arange(rotated, dtype=jnp.float32)
    inverse = jnp.pad(1.0 / (base**exponents * factor), (0, half - rotated))  # [H/2]; a zero angle does not rotate
    angles = positions[..., None, None].astype(jnp.float32) * inverse  # [B, T, 1, H/2]
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def mask(segments_q: jax.Array, segments_k: jax.Array, distance: jax.Array, window: int | None) -> jax.Array:
    """Which keys a query sees: no later ones, only its own segment and, in sliding layers, `window` tokens.

    Args:
      segments_q: [..., Q] segment ids of the queries.
      segments_k: [..., S] segment ids of the keys.
      distance: [Q, S] distance from key to query within the row, which equals the difference of positions because
        segments are contiguous.
      window: tokens a query sees, itself included; None: all before it.

    Returns:
      [..., Q, S] bool.
    """
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    return seen & (segments_q[..., :, None] == segments_k[..., None, :])


def einsum_attention(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, window: int | None) -> jax.Array:
    """Softmax attention by plain matrix products, with scores in float32; the reference for every other implementation.

    Queries are processed in blocks. In global layers, each block sees the keys up to its end, about half of [B, N, T,
    T] in total; in sliding layers, the keys of its own and a few earlier blocks, a little more than a window.

    Args:
      q: [B, T, N, H].
      k: [B, T, K, H]; N is a multiple of K.
      v: as k.
      segment_ids: [B, T] int32.
      window: tokens that a query sees, itself included; None: all before it.

    Returns:
      [B, T, N, H].
    """
    if window is None or q.shape[1] <= 2 * window:
        return keep(_upto_end(q, k, v, segment_ids, window), CONTEXT)
    return keep(_banded(q, k, v, segment_ids, window), CONTEXT)


def _upto_end(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, window: int | None) -> jax.Array:
    """Each block of queries attends to the keys up to its own end."""
    t = q.shape[1]
    size = max(GLOBAL_LEAST, -(-t // GLOBAL_BLOCKS))
    places, parts = jnp.arange(t), []
    for start in range(0, t, size):
        own, upto = slice(start, start + size), slice(0, start + size)
        distance = places[own, None] - places[None, upto]
        seen = mask(segment_ids[:, own], segment_ids[:, upto], distance, window)
        parts.append(attend(q[:, own], k[:, upto], v[:, upto], seen))
    return jnp.concatenate(parts, axis=1)


def _banded(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, window: int) -> jax.Array:
    """All blocks of queries at once, each attending to its own keys and those of the blocks within its window."""
    t = q.shape[1]
    size = max(WINDOW_LEAST, -(-window // WINDOW_BLOCKS))
    blocks, reach = -(-t // size), -(-(window - 1) // size)
    padding = blocks * size - t
    q, k, v, segment_ids = (
        jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)) for x in (q, k, v, segment_ids)
    )

    def block(x: jax.Array) -> jax.Array:  # [B, T, …] → [B, blocks, size, …]
        return x.reshape(x.shape[0], blocks, size, *x.shape[2:])

    def with_earlier(x: jax.Array, before_first: int) -> jax.Array:  # [B, T, …] → [B, blocks, (reach + 1) · size, …]
        x = block(x)
        x = jnp.concatenate([jnp.full_like(x[:, :1], before_first)] * reach + [x], axis=1)
        return jnp.concatenate([x[:, i : i + blocks] for i in range(reach + 1)], axis=2)

    distance = reach * size + jnp.arange(size)[:, None] - jnp.arange((reach + 1) * size)[None, :]
    seen = mask(block(segment_ids), with_earlier(segment_ids, -1), distance, window)  # no token has segment -1
    out = jax.vmap(attend, in_axes=1, out_axes=1)(block(q), with_earlier(k, 0), with_earlier(v, 0), seen)
    return out.reshape(q.shape)[:, :t]


def attend(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array) -> jax.Array:
    """Attention of q [B, Q, N, H] to k and v [B, S, K, H] where seen [B, Q, S] → [B, Q, N, H]."""
    b, t, n, h = q.shape
    s, kv = k.shape[1:3]
    group = n // kv
    # heads first, queries of a group adjacent: these products need no transposed copy of the scores
    queries = q.reshape(b, t, kv, group, h).transpose(0, 2, 3, 1, 4).reshape(b, kv, group * t, h)
    keys, values = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # [B, K, S, H]
    scores = jnp.einsum("bkqh,bksh->bkqs", queries, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(seen[:, None, None], scores.reshape(b, kv, group, t, s), MASKED)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    out = jnp.einsum("bkqs,bksh->bkqh", weights.astype(v.dtype).reshape(b, kv, group * t, s), values)
    # divide after the products, where arrays are small: the gradient then does not reduce over the scores either
    out = out.reshape(b, kv, group, t, h) / weights.sum(axis=-1)[..., None]
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, n, h).astype(v.dtype)
