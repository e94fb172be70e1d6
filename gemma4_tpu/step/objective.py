"""What a step minimises besides the cross-entropy of given answers: a function of the likelihoods of single tokens.

An objective names the fields that its batches have beyond those of every batch, sums a loss over the rows of one
microbatch, and says what the sum over all of them is divided by: once, over the whole update.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax

REFERENCE = "reference"
"""Key of the frozen weights under which a copy of the trained values stands that the reference is made of; where there
is none, the reference is the base without adapters."""
REFERENCE_NLL = "reference_nll"
"""float32 [B, T]: negative log-likelihoods under the reference; the step adds them to `rows` of who asks for them."""
TEACHER = "teacher"
"""Key of the frozen weights under which those of a teacher stand: `params`, and `lora` where it has adapters."""


class Mean(NamedTuple):
    """A figure as two sums; what is reported is their quotient over a whole update, or the held-out set."""

    total: jax.Array
    """float32 scalar."""
    weight: jax.Array
    """float32 or int32 scalar, such as a number of tokens; nothing is reported where it comes to 0."""


Stats = dict[str, Mean]
"""Name, as in `metrics.jsonl` → figure; the same names for all rows."""


class Objective(ABC):
    """Base class; instances are hashable, as the step is that holds them."""

    fields: ClassVar[Mapping[str, Any]] = {}
    """Name → dtype of what batches have besides `step.train_step.Batch`: [M, B, T], so that a value of a whole segment
    stands at each of its tokens; zeros where there is padding."""
    reference: ClassVar[bool] = False
    """Whether `loss` reads `REFERENCE_NLL`, for which the step runs the reference forward, too."""
    on_policy: ClassVar[bool] = False
    """Whether its batches are the policy's own answers."""

    @property
    def values(self) -> tuple[int, ...]:
        """Dims of such a field behind [M, B, T], where a token has several values."""
        return ()

    @property
    def heldout(self) -> Objective | None:
        """Of one that is on-policy: what held-out rows, whose answers are given, are scored by; None: cross-entropy."""
        return None

    @abstractmethod
    def loss(self, nll: jax.Array, rows: Mapping[str, jax.Array]) -> tuple[jax.Array, Stats]:
        """The loss, summed over rows, and what there is to tell of it.

        Args:
          nll: float32 [B, T], negative log-likelihood of every target; where `target_mask` is False too, so mask it.
          rows: arrays [B, T] of one microbatch, some of which may be padding throughout.
        """

    @abstractmethod
    def denominator(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """What the sum over all microbatches is divided by, from the whole batch [M, B, T]: a scalar, at least 0."""


def means(sums: Mapping[str, Any]) -> dict[str, float]:
    """Name → quotient of the two sums (total, weight), as far as there is one."""
    return {name: float(total) / float(weight) for name, (total, weight) in sums.items() if float(weight)}
