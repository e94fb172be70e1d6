"""Distillation: moves the student's distribution at every token towards a teacher's, over the whole vocabulary.

The teacher runs forward in the same program, like the reference in `preference.py`: nothing is stored, so nothing goes
stale, and neither distribution is materialised for more than a chunk of tokens at a time. A single number per token,
such as the log-ratio of the drawn token, would estimate the same gradient with more noise and no less work, because the
teacher's pass over the vocabulary is needed for both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gemma4_tpu.models.gemma4 import softcap
from gemma4_tpu.models.sharding import constrain
from gemma4_tpu.step.grpo import COPIES
from gemma4_tpu.step.objective import Objective, Stats
from gemma4_tpu.step.objective_kinds import REVERSE

TOP_TOKENS, TOP_LOGPROBS = "top_tokens", "top_logprobs"
"""Fields [M, B, T, K]: the likeliest tokens at each target, int32, and their log-probabilities, float32."""
LEAST_OF_OTHERS = 1e-6
"""Lower bound on the probability of all other tokens: float32 sums are no more precise."""


@dataclass(frozen=True)
class Divergence:
    """A `Score` (`loss.py`) of the teacher's final hidden states [B, c, D'] and output matrix [V, D']."""

    kind: str
    """`reverse`: KL(student ‖ teacher), `forward`: KL(teacher ‖ student)."""
    cap: float | None
    """Softcap of the teacher's logits."""
    mesh: Mesh | None

    def __call__(self, logits: jax.Array, hidden: jax.Array, table: jax.Array) -> tuple[jax.Array, jax.Array]:
        """In nats."""
        raw = jnp.einsum("bcd,vd->bcv", hidden, table, preferred_element_type=jnp.float32)
        student = jax.nn.log_softmax(logits, axis=-1)
        teacher = jax.nn.log_softmax(softcap(constrain(raw, "BTV", self.mesh), self.cap), axis=-1)
        gap, chances = student - teacher, jnp.exp(student)
        if self.kind == REVERSE:
            value = (chances * gap).sum(axis=-1)
            return value, chances * (gap - value[..., None])
        wanted = jnp.exp(teacher)
        return -(wanted * gap).sum(axis=-1), chances - wanted


@dataclass(frozen=True)
class DivergenceOfTop:
    """A `Score`: from what a teacher tells of its likeliest K tokens, ids and log-probabilities [B, c, K].

    Both distributions are compared over K + 1 events: those tokens, and any other. That is at most what the whole
    distributions differ by, and nothing has to be made up about the tokens that it does not tell of.
    """

    kind: str
    """See `Divergence.kind`."""

    def __call__(self, logits: jax.Array, told: tuple[jax.Array, jax.Array], _: None) -> tuple[jax.Array, jax.Array]:
        """In nats."""
        tokens, teacher = told

        def value(logits: jax.Array) -> jax.Array:
            student = _and_others(jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), tokens, axis=-1))
            wanted = _and_others(teacher)
            one, other = (student, wanted) if self.kind == REVERSE else (wanted, student)
            return (jnp.exp(one) * (one - other)).sum(axis=-1)

        found, gradient = jax.vjp(value, logits)
        return found, gradient(jnp.ones_like(found))[0]


def _and_others(chances: jax.Array) -> jax.Array:
    """Log-probabilities [B, c, K] of some tokens, and behind them that of any other: [B, c, K + 1]."""
    others = jnp.maximum(1.0 - jnp.exp(chances).sum(axis=-1, keepdims=True), LEAST_OF_OTHERS)
    return jnp.concatenate([chances, jnp.log(others)], axis=-1)


@dataclass(frozen=True)
class Distill(Objective):
    """The mean divergence from the teacher over the target tokens of given rows."""

    divergence: str
    """See `Divergence.kind`."""

    def loss(self, nll: jax.Array, rows: Mapping[str, jax.Array]) -> tuple[jax.Array, Stats]:
        """See `Objective`; `nll` is the divergence at each token."""
        return jnp.where(rows["target_mask"], nll, 0.0).sum(), {}

    def denominator(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Target tokens."""
        return batch["target_mask"].sum(dtype=jnp.int32)


@dataclass(frozen=True)
class DistillTop(Distill):
    """The same, from a served teacher's top-K log-probabilities, stored with each row."""

    top: int
    """K, how many."""
    fields: ClassVar[Mapping[str, Any]] = {TOP_TOKENS: jnp.int32, TOP_LOGPROBS: jnp.float32}

    @property
    def values(self) -> tuple[int, ...]:
        """See `Objective`."""
        return (self.top,)


@dataclass(frozen=True)
class DistillOwn(Distill):
    """The same over the student's own answers; identical ones are computed once, and each copy counts."""

    fields: ClassVar[Mapping[str, Any]] = {COPIES: jnp.float32}
    on_policy: ClassVar[bool] = True

    @property
    def heldout(self) -> Objective:
        """See `Objective`."""
        return Distill(self.divergence)

    def loss(self, nll: jax.Array, rows: Mapping[str, jax.Array]) -> tuple[jax.Array, Stats]:
        """See `Distill`."""
        return jnp.where(rows["target_mask"], rows[COPIES] * nll, 0.0).sum(), {}

    def denominator(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Tokens of all answers, counting each copy."""
        return jnp.where(batch["target_mask"], batch[COPIES], 0.0).sum()
