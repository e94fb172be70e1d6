"""GRPO and expert iteration: the policy's own answers, weighted by how much better than their group they were rewarded.

Per token −min(r·A, clip(r)·A), with r the ratio of the token's current probability to that at which it was drawn;
summed over all tokens of the update and divided once by their number, so that every token has the same weight, whatever
its answer's length (DAPO). There is no KL to a reference: updates are on-policy, and the certificate watches how far
each one moves the policy (`rollouts/certificate.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from gemma4_tpu.step.objective import Mean, Objective, Stats

OLD_LOGPROBS, ADVANTAGES, COPIES = "old_logprobs", "advantages", "copies"


@dataclass(frozen=True)
class Grpo(Objective):
    """Clipped policy gradient; its batches have additional `fields`."""

    clip_low: float
    """A token whose probability has fallen by more than this share gets no gradient that lowers it further."""
    clip_high: float
    """The same for rising probabilities."""
    max_drift: float
    """Answers with a negative advantage get no gradient once the policy has moved away from them by more than this, in
    nats per token, which happens if another policy drew them.
    """

    fields: ClassVar[Mapping[str, Any]] = {OLD_LOGPROBS: jnp.float32, ADVANTAGES: jnp.float32, COPIES: jnp.float32}
    """Log-probability at which the token was drawn; advantage of its answer; number of identical answers it
    represents.
    """
    on_policy: ClassVar[bool] = True

    def loss(self, nll: jax.Array, rows: Mapping[str, jax.Array]) -> tuple[jax.Array, Stats]:
        """See `Objective`."""
        mask, gain = rows["target_mask"], rows[ADVANTAGES]
        copies = jnp.where(mask, rows[COPIES], 0.0)
        moved = jnp.where(mask, -nll - rows[OLD_LOGPROBS], 0.0)  # log r
        ratio = jnp.exp(moved)
        bounded = jnp.clip(ratio, 1 - self.clip_low, 1 + self.clip_high)
        surrogate = jnp.minimum(ratio * gain, bounded * gain)
        kept = (gain >= 0) | (_sequence_mean(-moved, mask, rows["segment_ids"]) <= self.max_drift)
        clipped = jnp.where(gain > 0, ratio > 1 + self.clip_high, ratio < 1 - self.clip_low) & (gain != 0)
        tokens = copies.sum()
        return -jnp.where(kept, copies * surrogate, 0.0).sum(), {
            "clipped": Mean((copies * clipped).sum(), tokens),
            "drifted": Mean((copies * ~kept).sum(), tokens),
        }

    def denominator(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Tokens of all trained answers, counting each copy."""
        return jnp.where(batch["target_mask"], batch[COPIES], 0.0).sum()


@dataclass(frozen=True)
class ExpertIteration(Objective):
    """Cross-entropy of the policy's own rewarded answers: rejection-sampled fine-tuning."""

    on_policy: ClassVar[bool] = True

    def loss(self, nll: jax.Array, rows: Mapping[str, jax.Array]) -> tuple[jax.Array, Stats]:
        """See `Objective`."""
        return jnp.where(rows["target_mask"], nll, 0.0).sum(), {}

    def denominator(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Tokens of the trained answers."""
        return batch["target_mask"].sum(dtype=jnp.int32)


def _sequence_mean(values: jax.Array, mask: jax.Array, segments: jax.Array) -> jax.Array:
    """[B, T]: at each token, the mean of `values` over the targets of its segment."""
    sums = jax.vmap(partial(jax.ops.segment_sum, num_segments=values.shape[1] + 1))
    total, count = (sums(jnp.where(mask, x, 0.0), segments) for x in (values, jnp.ones_like(values)))
    return jnp.take_along_axis(total / jnp.maximum(count, 1.0), segments, axis=1)
