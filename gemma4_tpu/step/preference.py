"""Objectives over pairs of answers to one prompt, a chosen and a rejected one.

Both lie side by side in a row, as segments 2p - 1 (chosen) and 2p (rejected) of its p-th pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from gemma4_tpu.step.objective import REFERENCE_NLL, Mean, Objective, Stats
from gemma4_tpu.step.objective_kinds import KINDS


@jax.custom_vjp
def pair_sums(values: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Sums over each segment of packed pairs.

    Args:
      values: float32 [B, T].
      segment_ids: int32 [B, T]; 0 is padding, whose values belong to no sum.

    Returns:
      float32 [B, T // 2, 2]: of the chosen and the rejected side of each pair that a row has room for.
    """
    rows, length = values.shape
    numbers = jnp.arange(1, 2 * (length // 2) + 1)[:, None]
    # [B, S, T], which is never in memory: it is made while it is summed. Unlike a scatter it has one order everywhere.
    own = jnp.where(segment_ids[:, None, :] == numbers, values[:, None, :], 0.0)
    return own.sum(axis=-1).reshape(rows, length // 2, 2)


def _sums_forward(values, segment_ids):
    return pair_sums(values, segment_ids), segment_ids


def _sums_backward(segment_ids, g):  # without this the comparison [B, S, T] would be kept for it
    g = g.reshape(len(g), -1)
    each = jnp.take_along_axis(g, jnp.clip(segment_ids - 1, 0, g.shape[1] - 1), axis=1)
    return jnp.where(segment_ids > 0, each, 0.0), None


pair_sums.defvjp(_sums_forward, _sums_backward)


def target_counts(rows: Mapping[str, jax.Array]) -> jax.Array:
    """float32 [B, T // 2, 2]: target tokens of both sides of each pair; 0 where there is none."""
    return pair_sums(rows["target_mask"].astype(jnp.float32), rows["segment_ids"])


class Preference(Objective):
    """What all objectives over pairs have in common: the mean is over pairs."""

    def denominator(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """int32: pairs. A pair begins where its chosen side does."""
        starts = (batch["positions"] == 0) & (batch["segment_ids"] % 2 == 1)
        return starts.sum(dtype=jnp.int32)


@dataclass(frozen=True)
class Dpo(Preference):
    """Direct preference optimisation (arXiv 2305.18290), with label smoothing as in cDPO."""

    beta: float
    label_smoothing: float = 0.0
    reference: ClassVar[bool] = KINDS["dpo"].reference

    def loss(self, nll: jax.Array, rows: Mapping[str, jax.Array]) -> tuple[jax.Array, Stats]:
        """-log σ(margin), where the margin is β times what chosen gained over rejected, in nats."""
        mask, segments = rows["target_mask"], rows["segment_ids"]
        gained = pair_sums(jnp.where(mask, rows[REFERENCE_NLL] - nll, 0.0), segments)  # log π - log π_ref
        there = target_counts(rows)[..., 0] > 0  # [B, P]
        margin = self.beta * (gained[..., 0] - gained[..., 1])
        smoothed = self.label_smoothing
        each = -(1 - smoothed) * jax.nn.log_sigmoid(margin) - smoothed * jax.nn.log_sigmoid(-margin)
        return jnp.where(there, each, 0.0).sum(), _told(nll, rows, there, margin, self.beta * gained)


def _told(
    nll: jax.Array, rows: Mapping[str, jax.Array], there: jax.Array, margin: jax.Array, rewards: jax.Array
) -> Stats:
    """What there is to tell of pairs: means over those that are `there` [B, P], `rewards` [B, P, 2] of their sides."""
    logp = -pair_sums(jnp.where(rows["target_mask"], nll, 0.0), rows["segment_ids"])
    pairs = there.sum(dtype=jnp.float32)
    each = {
        "accuracy": (margin > 0) + 0.5 * (margin == 0),  # where both are as likely, no side has won
        "margin": margin,
        "chosen_logp": logp[..., 0],
        "rejected_logp": logp[..., 1],
        "chosen_reward": rewards[..., 0],
        "rejected_reward": rewards[..., 1],
    }
    return jax.lax.stop_gradient({name: Mean(jnp.where(there, x, 0.0).sum(), pairs) for name, x in each.items()})
