"""The one train step: training runs it, planning compiles it without TPU hardware, benchmarks time it.

An update is M microbatches. Each adds its summed loss and gradient; a single division by the global number of target
tokens (or of an objective's own units, such as pairs) follows, so that 8 microbatches of 1 row equal 1 of 8, however
unevenly targets are distributed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.stages import Wrapped

from gemma4_tpu.data.pipeline import FEATURES
from gemma4_tpu.models import token_rows
from gemma4_tpu.models.gemma4 import Model, Params, hidden_states
from gemma4_tpu.models.layout import get, without
from gemma4_tpu.models.sharding import constrain
from gemma4_tpu.models.weights import EMBEDDING
from gemma4_tpu.step.distill import TOP_LOGPROBS, TOP_TOKENS, Distill, DistillTop, Divergence, DivergenceOfTop
from gemma4_tpu.step.loss import Head, summed_cross_entropy, token_losses, token_nll
from gemma4_tpu.step.objective import REFERENCE, REFERENCE_NLL, TEACHER, Objective, Stats
from gemma4_tpu.step.optimizer import next_average, schedule_free_average

Batch = dict[str, jax.Array]
"""tokens, targets, segment_ids, positions (int32), target_mask (bool) and an objective's own fields, each [M, B, T];
with pictures, also their features [M, B, T, I].
"""


class TrainState(NamedTuple):
    """Everything an update changes."""

    trained: Any
    """Adapters, weights trained in full and rows of the embedding, in one tree; float32."""
    optimizer: Any
    update: jax.Array
    """int32: number of updates done."""
    key: jax.Array
    """Dropout key of the run; folded with update and microbatch, never advanced."""
    average: Any = None
    """Exponential average of `trained`; None: not kept."""

    def evaluated(self) -> Any:
        """The values to evaluate, export and start from, shaped like `trained`.

        This is the average if one is kept, by us or by a schedule-free optimizer; else `trained` itself.
        """
        if self.average is not None:
            return self.average
        average = schedule_free_average(self.optimizer, self.trained)
        return self.trained if average is None else average


class UpdateMetrics(NamedTuple):
    """Scalars of one update, float32 unless stated otherwise."""

    loss: jax.Array
    """Mean negative log-likelihood per target token, or the mean that an objective defines."""
    grad_norm: jax.Array
    """Global norm before clipping."""
    target_tokens: jax.Array
    """int32."""
    stats: Stats
    """Figures of the objective."""


@dataclass(frozen=True)
class Step:
    """Defines the compiled functions: what is trained, how, and on which model."""

    model: Model
    optimizer: optax.GradientTransformation
    chunk_tokens: int = 512
    compiler_options: Mapping[str, Any] | None = field(default=None, hash=False)
    """See `compiler_flags.py`."""
    ema_decay: float | None = None
    """Decay per update of the average of the trained values; None: no average."""
    objective: Objective | None = None
    """None: the cross-entropy of the given answers, which needs no per-token likelihoods."""
    teacher: Model | None = None
    """For objectives with a teacher; its weights are among the frozen ones, under `TEACHER`."""

    def init(self, trained: Any, key: jax.Array) -> TrainState:
        """The state before the first update."""
        # Copied, because an array can be donated only once.
        average = None if self.ema_decay is None else jax.tree.map(jnp.copy, trained)
        return TrainState(trained, self.optimizer.init(trained), jnp.zeros((), jnp.int32), key, average)

    def weights(self, trained: Any, base: Any) -> tuple[Params, Params | None]:
        """All weights, frozen or trained in full, and the adapters (None: there are none)."""
        layout = self.model.layout
        own = {leaf.path for leaf in layout.trained_in_full()}
        params = layout.tree(lambda leaf: get(trained if leaf.path in own else base, leaf.path))
        if ids := self.model.token_rows:
            table = token_rows.put(params["embedder"]["input_embedding"], ids, get(trained, token_rows.PATH))
            params["embedder"]["input_embedding"] = table
        lora = without(trained, own | {token_rows.PATH})
        return params, lora if jax.tree.leaves(lora) else None

    def token_nll(self, trained: Any, base: Any, rows: Batch, key: jax.Array | None = None) -> jax.Array:
        """float32 [B, T]: negative log-likelihood of every target of one microbatch (arrays [B, T]), including
        padding.
        """
        return token_nll(*self._scored(trained, base, rows, key), rows["targets"], self._head())

    def divergence(self, trained: Any, base: Any, rows: Batch, key: jax.Array | None = None) -> jax.Array:
        """float32 [B, T]: how far the distribution of every token is from the teacher's, in nats, of padding too."""
        assert isinstance(self.objective, Distill)
        if isinstance(self.objective, DistillTop):
            told, of_top = (rows[TOP_TOKENS], rows[TOP_LOGPROBS]), DivergenceOfTop(self.objective.divergence)
            return token_losses(*self._scored(trained, base, rows, key), told, None, of_top, self._head())
        assert self.teacher is not None
        params, lora = base[TEACHER]["params"], base[TEACHER].get("lora")
        places = rows["tokens"], rows["segment_ids"], rows["positions"]
        hidden = jax.lax.stop_gradient(hidden_states(self.teacher, params, lora, *places))
        # Gathered over fsdp once, not in every chunk.
        table = constrain(params["embedder"]["input_embedding"].astype(hidden.dtype), "VD", self.teacher.mesh)
        score = Divergence(self.objective.divergence, self.teacher.arch.final_logit_softcap, self.teacher.mesh)
        return token_losses(*self._scored(trained, base, rows, key), hidden, table, score, self._head())

    def summed_loss(self, trained: Any, base: Any, rows: Batch, key: jax.Array | None) -> tuple[jax.Array, Stats]:
        """Summed loss of one microbatch's rows, and the objective's figures; arrays are [B, T]."""
        if self.objective is None:
            hidden, table = self._scored(trained, base, rows, key)
            return summed_cross_entropy(hidden, table, rows["targets"], rows["target_mask"], self._head()), {}
        if isinstance(self.objective, Distill):
            return self.objective.loss(self.divergence(trained, base, rows, key), rows)
        nll = self.token_nll(trained, base, rows, key)
        if self.objective.reference:
            # Computed in the same program, so nothing has to be stored, found again or trusted when a run resumes.
            rows = rows | {REFERENCE_NLL: self.token_nll(base.get(REFERENCE, {}), base, rows)}
        return self.objective.loss(nll, rows)

    def _scored(self, trained: Any, base: Any, rows: Batch, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Final hidden states [B, T, D] and the output matrix [V, D]."""
        params, lora = self.weights(trained, base)
        given = (rows["tokens"], rows["segment_ids"], rows["positions"], key)
        hidden = hidden_states(self.model, params, lora, *given, features=rows.get(FEATURES))
        return hidden, params["embedder"]["input_embedding"]

    def _head(self) -> Head:
        trained_rows = () if EMBEDDING in self.model.layout.in_full else self.model.token_rows or None
        return Head(self.model.arch.final_logit_softcap, self.chunk_tokens, trained_rows, self.model.mesh)

    def gradients(self, state: TrainState, base: Any, batch: Batch) -> tuple[jax.Array, Any, jax.Array, Stats]:
        """Mean loss and gradient, number of target tokens and the objective's sums, over all microbatches."""
        # Dropout keys are folded, never advanced: the run's key with update, microbatch, layer and weight, in this
        # order. So a resumed run draws what it would have drawn, and there is no generator state to save.
        update_key = jax.random.fold_in(state.key, state.update)
        differentiate = jax.value_and_grad(self.summed_loss, has_aux=True)
        if self.objective is not None and self.objective.on_policy:
            differentiate = _where_there_are_targets(differentiate)

        def microbatch(total, item):
            index, rows = item
            key = jax.random.fold_in(update_key, index) if self.model.lora_dropout else None
            (loss, stats), grads = differentiate(state.trained, base, rows, key)
            return jax.tree.map(jnp.add, total, (loss, grads)), stats

        count = _target_tokens(batch)
        denominator = count if self.objective is None else self.objective.denominator(batch)
        microbatches = batch["tokens"].shape[0]
        if microbatches == 1:  # nothing to add up, so neither a loop nor a tree of sums
            rows = jax.tree.map(lambda x: x[0], batch)
            key = jax.random.fold_in(update_key, 0) if self.model.lora_dropout else None
            (loss, stats), grads = differentiate(state.trained, base, rows, key)
            total = loss, grads
        else:
            zeros = jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, state.trained)
            total, each = jax.lax.scan(microbatch, zeros, (jnp.arange(microbatches), batch))
            stats = jax.tree.map(lambda x: x.sum(axis=0), each)
        # Without targets, 0 instead of NaN.
        loss, grads = jax.tree.map(lambda x: x / jnp.maximum(denominator, 1), total)
        return loss, grads, count, stats

    def train(
        self, state: TrainState, base: Any, batch: Batch, spike_limit: jax.Array | None = None
    ) -> tuple[TrainState, UpdateMetrics]:
        """One update. Donate `state`.

        A loss above `spike_limit` (float32 scalar) leaves values and moments unchanged; counters advance.
        """
        loss, grads, count, stats = self.gradients(state, base, batch)
        changes, optimizer = self.optimizer.update(grads, state.optimizer, state.trained)
        trained, average = optax.apply_updates(state.trained, changes), state.average
        if self.ema_decay is not None:
            average = next_average(average, trained, self.ema_decay, state.update + 1)
        if spike_limit is not None:
            skipped = loss > spike_limit
            trained, average = (_unless(skipped, trained, state.trained), _unless(skipped, average, state.average))
            optimizer = _unless(skipped, optimizer, state.optimizer)
        metrics = UpdateMetrics(loss, optax.global_norm(grads), count, stats)
        return TrainState(trained, optimizer, state.update + 1, state.key, average), metrics

    def evaluate(self, trained: Any, base: Any, batch: Batch) -> tuple[jax.Array, jax.Array, Stats]:
        """Summed loss of an [M, B, T] batch, its denominator, and the objective's sums; without dropout."""
        if self.objective is not None and self.objective.on_policy:
            return replace(self, objective=self.objective.heldout).evaluate(trained, base, batch)

        def microbatch(total, rows):
            loss, stats = self.summed_loss(trained, base, rows, None)
            return total + loss, stats

        total, each = jax.lax.scan(microbatch, jnp.zeros((), jnp.float32), batch)
        denominator = _target_tokens(batch) if self.objective is None else self.objective.denominator(batch)
        return total, denominator, jax.tree.map(lambda x: x.sum(axis=0), each)


def _where_there_are_targets(differentiate: Callable[..., Any]) -> Callable[..., Any]:
    """Skips the work for a microbatch that is all padding, as the last ones of a batch of samples can be."""

    def of_rows(trained: Any, base: Any, rows: Batch, key: jax.Array | None) -> Any:
        def nothing() -> Any:
            shapes = jax.eval_shape(differentiate, trained, base, rows, key)
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        return jax.lax.cond(rows["target_mask"].any(), lambda: differentiate(trained, base, rows, key), nothing)

    return of_rows


def _target_tokens(batch: Batch) -> jax.Array:
    return batch["target_mask"].sum(dtype=jnp.int32)


def _unless(skipped: jax.Array, new: Any, old: Any) -> Any:
    """Keeps the old values if an update is skipped; counters advance with the run's, so that the schedule does."""

    def chosen(n: jax.Array, o: jax.Array) -> jax.Array:
        return n if jnp.issubdtype(n.dtype, jnp.integer) else jnp.where(skipped, o, n)

    return jax.tree.map(chosen, new, old)


def compiled_functions(step: Step, state: TrainState) -> tuple[Wrapped, Wrapped]:
    """(train, evaluate) under `jax.jit`; `train` donates its state and returns the new one with the same sharding.

    `state` holds arrays, or shapes with shardings (planning).
    """
    places = jax.tree.map(lambda x: x.sharding, state)
    options = dict(step.compiler_options) if step.compiler_options else None
    train = jax.jit(
        step.train, donate_argnums=0, out_shardings=(places, state.update.sharding), compiler_options=options
    )
    return train, jax.jit(step.evaluate, compiler_options=options)
