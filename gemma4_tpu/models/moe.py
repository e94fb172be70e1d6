"""The mixture-of-experts block of 26B-A4B: route each token to its experts, run them grouped, add up.

The router reads the raw residual; the experts read the normed input (as in transformers; Tunix 0.1.7 feeds the router
the normed input).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Params = dict[str, Any]


def route(p: Params, residual: jax.Array, experts_per_token: int) -> tuple[jax.Array, jax.Array]:
    """Experts of each token and their weights. residual [S, D] → ids [S, k], weights [S, k] float32.

    Scores are computed in float32: a tie broken otherwise picks another expert.
    """
    x = residual.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
    x = x * p["router_scale"].astype(jnp.float32) * x.shape[-1] ** -0.5
    probabilities = jax.nn.softmax(x @ p["router_logits"].astype(jnp.float32), axis=-1)
    weights, ids = jax.lax.top_k(probabilities, experts_per_token)
    weights = weights / weights.sum(axis=-1, keepdims=True)
    return ids, weights * p["per_expert_scale"].astype(jnp.float32)[ids]


def run_experts(p: Params, x: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
    """Weighted sum of each token's experts. x [S, D], ids and weights [S, k] → [S, D].

    Tokens are sorted by expert, so that `ragged_dot` multiplies each expert's rows with its own matrix.
    """
    experts, _, hidden, dim = p["gating_einsum"].shape
    k = ids.shape[1]
    order = jnp.argsort(ids.reshape(-1), stable=True)  # [S*k] places in expert order
    group_sizes = jnp.bincount(ids.reshape(-1), length=experts).astype(jnp.int32)
    rows = x[order // k]  # [S*k, D]
    gate_up = p["gating_einsum"].reshape(experts, 2 * hidden, dim).swapaxes(1, 2)
    both = jax.lax.ragged_dot(rows, gate_up.astype(x.dtype), group_sizes)  # [S*k, 2F]
    act = jax.nn.gelu(both[:, :hidden], approximate=True) * both[:, hidden:]
    out = jax.lax.ragged_dot(act, p["linear"].astype(x.dtype), group_sizes)  # [S*k, D]
    out = out * weights.reshape(-1)[order].astype(out.dtype)[:, None]
    return jnp.zeros_like(out).at[order].set(out, unique_indices=True).reshape(-1, k, dim).sum(axis=1)


def moe(p: Params, residual: jax.Array, normed: jax.Array, experts_per_token: int) -> jax.Array:
    """residual, normed [B, T, D] → [B, T, D]."""
    flat = residual.reshape(-1, residual.shape[-1])
    ids, weights = route(p, flat, experts_per_token)
    return run_experts(p, normed.reshape(flat.shape), ids, weights).reshape(residual.shape)
