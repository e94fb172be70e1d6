"""Objectives over pairs of answers to one prompt, one chosen and one rejected.

Both are adjacent in a row, as segments 2p - 1 (chosen) and 2p (rejected) of its p-th pair.
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
      segment_ids: int32 [B, T]; 0 is padding, whose values count in no sum.

    Returns:
      float32 [B, T // 2, 2]: the chosen and the rejected side of each pair that a row has room for.
    """
    rows, length = values.shape
    numbers = jnp.arange(1, 2 * (length // 2) + 1)[:, None]
    # [B, S, T] is fused into the sum, never stored. Unlike a scatter, it has the same order of summation everywhere.
    own = jnp.where(segment_ids[:, None, :] == numbers, values[:, None, :], 0.0)
    return own.sum(axis=-1).reshape(rows, length // 2, 2)


def _sums_forward(values, segment_ids):
    return pair_sums(values, segment_ids), segment_ids


def _sums_backward(segment_ids, g):  # otherwise the comparison [B, S, T] would be kept for it
    g = g.reshape(len(g), -1)
    each = jnp.take_along_axis(g, jnp.clip(segment_ids - 1, 0, g.shape[1] - 1), axis=1)
    return jnp.where(segment_ids > 0, each, 0.0), None


pair_sums.defvjp(_sums_forward, _sums_backward)


class Preference(Objective):
    """Base of all objectives over pairs: the mean is over pairs."""

    def denominator(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """int32: number of pairs, counted at the start of their chosen sides."""
        starts = (batch["positions"] == 0) & (batch["segment_ids"] % 2 == 1)
        return starts.sum(dtype=jnp.int32)


class _Pairs:
    """Common quantities of losses over pairs; arrays [B, P, 2] hold the chosen and the rejected side of each pair."""

    def __init__(self, nll: jax.Array, rows: Mapping[str, jax.Array]):
        self._nll, self._rows = nll, rows
        self.logp = self._summed(-nll)
        """Log-likelihoods of the answers, in nats."""
        self.tokens = self._summed(jnp.ones_like(nll))
        """Target tokens."""
        self._there = self.tokens[..., 0] > 0

    def gained(self) -> jax.Array:
        """[B, P, 2]: log-likelihood gained over the reference, in nats."""
        return self._summed(self._rows[REFERENCE_NLL] - self._nll)

    def total(self, each: jax.Array) -> jax.Array:
        """Sum of a value [B, P] over the existing pairs."""
        return jnp.where(self._there, each, 0.0).sum()

    def told(self, margin: jax.Array, rewards: jax.Array | None = None) -> Stats:
        """The figures that every objective over pairs reports, from its margins [B, P] and, if any, its rewards."""
        each = {
            "accuracy": (margin > 0) + 0.5 * (margin == 0),  # a tie counts half
            "margin": margin,
            "chosen_logp": self.logp[..., 0],
            "rejected_logp": self.logp[..., 1],
        }
        if rewards is not None:
            each |= {"chosen_reward": rewards[..., 0], "rejected_reward": rewards[..., 1]}
        pairs = self._there.sum(dtype=jnp.float32)
        return jax.lax.stop_gradient({name: Mean(self.total(value), pairs) for name, value in each.items()})

    def _summed(self, values: jax.Array) -> jax.Array:
        return pair_sums(jnp.where(self._rows["target_mask"], values, 0.0), self._rows["segment_ids"])


@dataclass(frozen=True)
class Dpo(Preference):
    """Direct preference optimisation (arXiv 2305.18290), with label smoothing as in cDPO."""

    beta: float
    label_smoothing: float = 0.0
    reference: ClassVar[bool] = KINDS["dpo"].reference

    def loss(self, nll: jax.Array, rows: Mapping[str, jax.Array]) -> tuple[jax.Array, Stats]:
        """-log σ(margin), where the margin is β times what chosen gained over rejected, in nats."""
        pairs = _Pairs(nll, rows)
        rewards = self.beta * pairs.gained()
        margin, smoothed = rewards[..., 0] - rewards[..., 1], self.label_smoothing
        each = -(1 - smoothed) * jax.nn.log_sigmoid(margin) - smoothed * jax.nn.log_sigmoid(-margin)
        return pairs.total(each), pairs.told(margin, rewards)


@dataclass(frozen=True)
class Ipo(Preference):
    """Identity preference optimisation (arXiv 2310.12036), on log-likelihoods per target token, as in TRL."""

    beta: float
    reference: ClassVar[bool] = KINDS["ipo"].reference

    def loss(self, nll: jax.Array, rows: Mapping[str, jax.Array]) -> tuple[jax.Array, Stats]:
        """(nats per token that chosen gained over rejected - 1 / 2β)²; the margin is β times the gain."""
        pairs = _Pairs(nll, rows)
        gained = pairs.gained() / jnp.maximum(pairs.tokens, 1.0)
        gap = gained[..., 0] - gained[..., 1]
        each = jnp.square(gap - 1 / (2 * self.beta))
        return pairs.total(each), pairs.told(self.beta * gap, self.beta * gained)


@dataclass(frozen=True)
class Orpo(Preference):
    """Odds-ratio preference optimisation (arXiv 2403.07691): fine-tuning on the chosen answers and preference in one
    loss.
    """

    beta: float

    def loss(self, nll: jax.Array, rows: Mapping[str, jax.Array]) -> tuple[jax.Array, Stats]:
        """Mean cross-entropy of the chosen answer - β · log σ(log of the ratio of both sides' odds), the margin."""
        pairs = _Pairs(nll, rows)
        there = pairs.tokens > 0
        # Per-token mean, as in the paper; a missing side has odds that get no gradient.
        logp = jnp.where(there, pairs.logp / jnp.maximum(pairs.tokens, 1.0), -1.0)
        odds = logp - jnp.log(-jnp.expm1(jnp.minimum(logp, -1e-6)))  # finite even if an answer is certain
        margin = odds[..., 0] - odds[..., 1]
        each = -logp[..., 0] - self.beta * jax.nn.log_sigmoid(margin)
        return pairs.total(each), pairs.told(margin)
