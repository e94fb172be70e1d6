"""Cross-entropy over a vocabulary of 262,144 without materialising [B, T, V]: summed, or per token.

The loss is a *sum* over target tokens, so that microbatches add up exactly; the caller divides once by the count. The
forward pass iterates over chunks of T, and computes the gradient with respect to the hidden states while a chunk's
logits exist: two passes over the vocabulary (logits, gradient) where checkpointing would need three. `token_nll`
returns the loss per token, for objectives whose weights are known only once all tokens are scored. Losses other than
the cross-entropy plug in as a `Score` (`token_losses`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gemma4_tpu.models.gemma4 import softcap
from gemma4_tpu.models.sharding import TP, constrain, token_parts

Score = Callable[[jax.Array, Any, Any], tuple[jax.Array, jax.Array]]
"""`score(logits [B, c, V] float32, a chunk of per-token data, shared data)` → loss [B, c] and its gradient with respect
to the logits [B, c, V].
"""


@dataclass(frozen=True)
class Head:
    """How hidden states become logits, and which of their gradients are wanted; static."""

    cap: float | None
    """Softcap of the logits."""
    chunk_tokens: int
    """Tokens per row, or per part of a row that `cp` splits, whose logits are materialised at a time (rounded down to
    divide T evenly).
    """
    trained_rows: tuple[int, ...] | None = None
    """Also compute the gradient with respect to these rows of the table (`()`: all); None: it is frozen."""
    mesh: Mesh | None = None
    """For sharding constraints; None: there are none."""


def cross_entropy(logits: jax.Array, targets: jax.Array, _: Any) -> tuple[jax.Array, jax.Array]:
    """A `Score`: negative log-likelihood of `targets` [B, c] int32."""
    top = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    exponentials = jnp.exp(logits - top)
    denominator = exponentials.sum(axis=-1, keepdims=True)
    # [B, c, V], fused into the sums; a gather by target would cross the chips that split the vocabulary
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    target_score = jnp.where(is_target, logits, 0.0).sum(axis=-1)
    nll = jnp.log(denominator[..., 0]) + top[..., 0] - target_score
    return nll, exponentials / denominator - is_target


def chunk_length(length: int, wanted: int) -> int:
    """The largest divisor of `length` that is at most `wanted`."""
    return next(c for c in range(min(length, max(wanted, 1)), 0, -1) if length % c == 0)


def _parts(length: int, mesh: Mesh | None) -> int:
    """Number of parts into which the `cp` and `tp` axes split T in the residual stream."""
    parts = token_parts(mesh) * mesh.shape[TP] if mesh is not None else 1
    return parts if length % parts == 0 else 1


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def summed_cross_entropy(
    hidden: jax.Array, table: jax.Array, targets: jax.Array, target_mask: jax.Array, head: Head
) -> jax.Array:
    """Sum of negative log-likelihoods of the target tokens.

    Args:
      hidden: [B, T, D] final hidden states.
      table: [V, D] embedding table, which is also the output layer.
      targets: [B, T] int32 next tokens.
      target_mask: [B, T] bool; only these count.
      head: how the table is used.

    Returns:
      float32 scalar.
    """
    return _forward(hidden, table, targets, None, target_mask, cross_entropy, head)[0]


def token_nll(hidden: jax.Array, table: jax.Array, targets: jax.Array, head: Head) -> jax.Array:
    """Negative log-likelihood of every target in nats, float32 [B, T], including padding; see `token_losses`."""
    return token_losses(hidden, table, targets, None, cross_entropy, head)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def token_losses(hidden: jax.Array, table: jax.Array, beside: Any, common: Any, score: Score, head: Head) -> jax.Array:
    """A loss over the vocabulary for every token.

    A frozen table takes the same two passes over the vocabulary as `summed_cross_entropy`. The gradient of a trained
    table is a product over tokens whose weights only the backward pass knows, so it iterates over the chunks again:
    four passes in total.

    Args:
      hidden: as for `summed_cross_entropy`.
      table: as for `summed_cross_entropy`.
      beside: tree of [B, T, …], per-token data for the score; gets no gradient.
      common: shared data for the score; gets no gradient.
      score: the loss.
      head: as for `summed_cross_entropy`.

    Returns:
      float32 [B, T], including padding.
    """
    return _forward(hidden, table, beside, common, None, score, head)[0]


def _forward(hidden, table, beside, common, target_mask, score, head, *, hidden_grad=False, table_grad=False):
    """Loss and the requested gradients, one chunk of T at a time; without a mask, the loss per token.

    `target_mask` can hold weights if only gradients are requested.
    """
    cap, mesh, trained_rows = head.cap, head.mesh, head.trained_rows if table_grad else None
    b, t, _ = hidden.shape
    parts = _parts(t, mesh)
    c = chunk_length(t // parts, head.chunk_tokens * token_parts(mesh) // parts)
    weights = constrain(table.astype(hidden.dtype), "VD", mesh)  # gathered over fsdp once, not per chunk

    # Each chunk takes c tokens from every chip's part of T: consecutive chunks of T would be on one chip after the
    # other.
    def split(x):  # [B, T, …] → [chunks, B, parts·c, …]
        x = x.reshape(b, parts, t // parts // c, c, *x.shape[2:])
        return jnp.moveaxis(x, 2, 0).reshape(t // parts // c, b, parts * c, *x.shape[4:])

    def join(x):  # the inverse of split
        x = x.reshape(t // parts // c, b, parts, c, *x.shape[3:])
        return jnp.moveaxis(x, 0, 2).reshape(b, t, *x.shape[4:])

    def body(carry, chunk):
        total, d_table = carry
        h, y, m = chunk  # [B, c, D], [B, c, …], [B, c]
        h = constrain(h, "BTD", mesh)
        raw = jnp.einsum("bcd,vd->bcv", h, weights, preferred_element_type=jnp.float32)
        capped = softcap(constrain(raw, "BTV", mesh), cap)
        losses, d_capped = score(capped, y, common)
        each = losses if m is None else None
        if m is not None:
            total += jnp.where(m, losses, 0.0).sum()
        d_hidden = None
        if hidden_grad:
            d_capped = d_capped if m is None else d_capped * m[..., None]
            d_raw = d_capped if cap is None else d_capped * (1.0 - jnp.square(capped / cap))
            d_raw = d_raw.astype(hidden.dtype)
            d_hidden = constrain(jnp.einsum("bcv,vd->bcd", d_raw, weights), "BSD", mesh)
            if trained_rows is not None:
                d_raw = d_raw[..., jnp.asarray(trained_rows)] if trained_rows else d_raw
                d_table += jnp.einsum("bcv,bcd->vd", d_raw, h, preferred_element_type=jnp.float32)
        return (total, d_table), (each, d_hidden)

    gradient = () if trained_rows is None else (len(trained_rows) or len(table), table.shape[1])
    start = jnp.zeros((), jnp.float32), jnp.zeros(gradient, jnp.float32)
    chunks = split(hidden), jax.tree.map(split, beside), None if target_mask is None else split(target_mask)
    (total, d_table), (each, d_hidden) = jax.lax.scan(body, start, chunks)
    if hidden_grad:
        d_hidden = join(d_hidden)
    if trained_rows:
        d_table = jnp.zeros(table.shape, jnp.float32).at[jnp.asarray(trained_rows)].set(d_table)
    loss = total if each is None else join(each)
    return loss, d_hidden, None if trained_rows is None else d_table.astype(table.dtype)


def _vjp_forward(hidden, table, targets, target_mask, head):
    total, d_hidden, d_table = _forward(
        hidden, table, targets, None, target_mask, cross_entropy, head, hidden_grad=True, table_grad=True
    )
    return total, (d_hidden, d_table)


def _vjp_backward(head, residuals, g):
    d_hidden, d_table = residuals
    d_hidden = (d_hidden * g).astype(d_hidden.dtype)
    return d_hidden, None if d_table is None else (d_table * g).astype(d_table.dtype), None, None


summed_cross_entropy.defvjp(_vjp_forward, _vjp_backward)


def _token_vjp_forward(hidden, table, beside, common, score, head):
    frozen = head.trained_rows is None
    losses, d_hidden, _ = _forward(hidden, table, beside, common, None, score, head, hidden_grad=frozen)
    return losses, d_hidden if frozen else (hidden, table, beside, common)


def _token_vjp_backward(score, head, residuals, g):
    if head.trained_rows is None:
        return (residuals * g[..., None]).astype(residuals.dtype), None, None, None
    hidden, table, beside, common = residuals
    _, d_hidden, d_table = _forward(
        hidden, table, beside, common, g, score, head, hidden_grad=True, table_grad=True
    )  # fmt: skip
    return d_hidden, d_table, None, None


token_losses.defvjp(_token_vjp_forward, _token_vjp_backward)
