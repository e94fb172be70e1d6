"""Scores sampled tokens with the trainer: their likelihoods, and its uncertainty where they were drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma4_tpu.models.gemma4 import hidden_states, logits
from gemma4_tpu.models.sharding import ROWS, whole
from gemma4_tpu.step.loss import chunk_length
from gemma4_tpu.step.train_step import Batch, Step


class Scorer:
    """Scores a batch [M, B, T], skipping empty microbatches; each function compiles once."""

    def __init__(self, step: Step):
        self._step = step
        self._nll, self._divergence, self._spread = (
            jax.jit(partial(_everywhere, score, step)) for score in (Step.token_nll, Step.divergence, _spread)
        )

    def logprobs(self, trained: Any, base: Any, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """float32 [M, B, T]: log-probability of every target by the trainer's own loss; 0 elsewhere."""
        found = np.zeros(arrays["target_mask"].shape, np.float32)
        for m in _used(arrays):
            found[m] = -np.asarray(self._nll(trained, base, self._rows(arrays, m)))
        return np.where(arrays["target_mask"], found, 0.0)

    def spread(self, trained: Any, base: Any, arrays: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """(mean, variance), float32 [M, B, T], of −log p of a token drawn at each position; the mean is the entropy."""
        mask = arrays["target_mask"]
        means, variances = np.zeros(mask.shape, np.float32), np.zeros(mask.shape, np.float32)
        for m in _used(arrays):
            means[m], variances[m] = self._spread(trained, base, self._rows(arrays, m))
        return np.where(mask, means, 0.0), np.where(mask, variances, 0.0)

    def divergences(self, trained: Any, base: Any, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """float32 [M, B, T]: divergence from the teacher's distribution at every target; 0 elsewhere."""
        found = np.zeros(arrays["target_mask"].shape, np.float32)
        for m in _used(arrays):
            found[m] = self._divergence(trained, base, self._rows(arrays, m))
        return np.where(arrays["target_mask"], found, 0.0)

    def _rows(self, arrays: Mapping[str, np.ndarray], m: int) -> Batch:
        """The arrays [B, T] of microbatch `m`, on the mesh."""
        mesh = self._step.model.mesh
        if mesh is None:
            return {name: jnp.asarray(array[m]) for name, array in arrays.items()}
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(ROWS))
        return {name: jax.device_put(array[m], place) for name, array in arrays.items()}


def _everywhere(score: Callable[..., Any], step: Step, trained: Any, base: Any, rows: Batch) -> Any:
    """Scores [B, T] of the rows, whole on every device."""
    return jax.tree.map(lambda x: whole(x, step.model.mesh), score(step, trained, base, rows))


def _used(arrays: Mapping[str, np.ndarray]) -> list[int]:
    return [m for m, mask in enumerate(arrays["target_mask"]) if mask.any()]


def _spread(step: Step, trained: Any, base: Any, rows: Batch) -> tuple[jax.Array, jax.Array]:
    """Entropy, and the variance of −log p, of the distribution at every position, [B, T]; in chunks of T."""
    params, lora = step.weights(trained, base)
    hidden = hidden_states(step.model, params, lora, rows["tokens"], rows["segment_ids"], rows["positions"])
    b, t, d = hidden.shape
    chunk = chunk_length(t, step.chunk_tokens)

    def of_chunk(part: jax.Array) -> tuple[jax.Array, jax.Array]:  # [B, c, D]
        chances = jax.nn.log_softmax(logits(step.model, params, part), axis=-1)
        probabilities = jnp.exp(chances)
        entropy = -(probabilities * chances).sum(-1)
        return entropy, (probabilities * jnp.square(chances + entropy[..., None])).sum(-1)

    chunks = jnp.moveaxis(hidden.reshape(b, t // chunk, chunk, d), 1, 0)
    entropy, variance = (jnp.moveaxis(x, 0, 1).reshape(b, t) for x in jax.lax.map(of_chunk, chunks))
    return entropy, variance
