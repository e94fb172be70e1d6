"""GRPO and its kin: the policy's own answers, weighed by how much better than their group they were rewarded.

Per token −min(r·A, clip(r)·A), with r the token's probability now over that at which it was drawn; summed over all
tokens of the update and divided once by their number: an answer's tokens weigh the same, whatever its length (DAPO).
No KL to a reference: the updates are on-policy, and how far each one moves is watched (`rollouts/certificate.py`).
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
    """Clipped policy gradient; its batches have `fields` besides those of every batch."""

    clip_low: float
    """A token whose probability has fallen by more than this share gives no gradient that lowers it further."""
    clip_high: float
    """The same for tokens that rise."""
    max_drift: float
    """Answers with a negative advantage give no gradient once the policy has moved away from them by more than so many
    nats per token, as it has when it is not the one that drew them."""

    fields: ClassVar[Mapping[str, Any]] = {OLD_LOGPROBS: jnp.float32, ADVANTAGES: jnp.float32, COPIES: jnp.float32}
    """Log-probability at which the token was drawn; advantage of its answer; how many equal answers it stands for."""
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
        """Tokens of all answers that are trained on, equal ones counted each."""
        return jnp.where(batch["target_mask"], batch[COPIES], 0.0).sum()


@dataclass(frozen=True)
class ExpertIteration(Objective):
    """The cross-entropy of the policy's own answers that were rewarded: rejection-sampled fine-tuning."""

    on_policy: ClassVar[bool] = True

    def loss(self, nll: jax.Array, rows: Mapping[str, jax.Array]) -> tuple[jax.Array, Stats]:
        """See `Objective`."""
        return jnp.where(rows["target_mask"], nll, 0.0).sum(), {}

    def denominator(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Tokens of the answers that are trained on."""
        return batch["target_mask"].sum(dtype=jnp.int32)


def _sequence_mean(values: jax.Array, mask: jax.Array, segments: jax.Array) -> jax.Array:
    """[B, T]: at each token the mean of `values` over the targets of its segment."""
    sums = jax.vmap(partial(jax.ops.segment_sum, num_segments=values.shape[1] + 1))
    total, count = (sums(jnp.where(mask, x, 0.0), segments) for x in (values, jnp.ones_like(values)))
    return jnp.take_along_axis(total / jnp.maximum(count, 1.0), segments, axis=1)
