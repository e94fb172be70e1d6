"""What a step minimises instead of the cross-entropy of given answers: a function of the likelihoods of single tokens.

An objective names the additional fields of its batches, sums a loss over the rows of one microbatch, and defines the
denominator of the sum over all of them: divided once, over the whole update.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax

REFERENCE = "reference"
"""Key of the frozen weights that holds a copy of the trained values for the reference; without it, the reference is the
base without adapters.
"""
REFERENCE_NLL = "reference_nll"
"""float32 [B, T]: negative log-likelihoods under the reference; the step adds them to `rows` for objectives that need
them.
"""
TEACHER = "teacher"
"""Key of the teacher's weights among the frozen ones: `params`, and `lora` if it has adapters."""


class Mean(NamedTuple):
    """A figure as two sums; what is reported is their quotient over a whole update, or the held-out set."""

    total: jax.Array
    """float32 scalar."""
    weight: jax.Array
    """float32 or int32 scalar, such as a number of tokens; if it is 0, nothing is reported."""


Stats = dict[str, Mean]
"""Name, as in `metrics.jsonl` → figure; the same names for all rows."""


class Objective(ABC):
    """Base class; instances are hashable, as the step that holds them must be."""

    fields: ClassVar[Mapping[str, Any]] = {}
    """Name → dtype of additional batch arrays besides `step.train_step.Batch`: [M, B, T], with a segment's value
    repeated at each of its tokens, and zeros at padding.
    """
    reference: ClassVar[bool] = False
    """Whether `loss` reads `REFERENCE_NLL`, for which the step also runs the reference forward."""
    on_policy: ClassVar[bool] = False
    """Whether its batches are the policy's own answers."""

    @property
    def values(self) -> tuple[int, ...]:
        """Dims of such a field behind [M, B, T], where a token has several values."""
        return ()

    @property
    def heldout(self) -> Objective | None:
        """For an on-policy objective: how held-out rows with given answers are scored; None: cross-entropy."""
        return None

    @abstractmethod
    def loss(self, nll: jax.Array, rows: Mapping[str, jax.Array]) -> tuple[jax.Array, Stats]:
        """The loss summed over rows, and the figures to report.

        Args:
          nll: float32 [B, T], negative log-likelihood of every target, even where `target_mask` is False, so mask it.
          rows: arrays [B, T] of one microbatch, some of which can be all padding.
        """

    @abstractmethod
    def denominator(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """The denominator of the sum over all microbatches, from the whole batch [M, B, T]: a scalar, at least 0."""


def means(sums: Mapping[str, Any]) -> dict[str, float]:
    """Name → quotient of the two sums (total, weight), where defined."""
    return {name: float(total) / float(weight) for name, (total, weight) in sums.items() if float(weight)}
