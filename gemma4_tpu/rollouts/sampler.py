"""Samples from the policy: token ids, with each token's log-probability in the distribution that it was drawn from.

The host fills slots (`slots.py`) and empties those whose sample has ended, every few tokens; programs compile once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np

from gemma4_tpu.evals.generate import on_mesh
from gemma4_tpu.rollouts import slots as decoding
from gemma4_tpu.rollouts.digest import digest
from gemma4_tpu.step.train_step import Step

SEGMENT_TOKENS = 8
"""Tokens per row between two interventions of the host: a sample that ends wastes half as many on average, and filling
slots costs about as much as one token.
"""


@dataclass(frozen=True)
class SamplerShapes:
    """The static shapes of the sampler's programs."""

    slots: int
    """Sequences per decoding step."""
    prompts: int
    """Prompts read at a time."""
    prompt_tokens: int
    """Maximal length of a prompt."""
    new_tokens: int
    """Maximal length of an answer."""


@dataclass(frozen=True)
class Wanted:
    """A sample to draw."""

    prompt: int
    """Index of its prompt."""
    sample: int
    """Index among the samples of its prompt."""
    seed: int
    """Below 2**32."""


@dataclass(frozen=True)
class Drawn:
    """A sample from the policy."""

    wanted: Wanted
    tokens: np.ndarray
    """int32 [n], including the token that ended it."""
    logprobs: np.ndarray
    """float32 [n]: of each token, in the distribution that it was drawn from."""
    stopped: bool
    """False: truncated after `new_tokens`."""


@dataclass
class _InProgress:
    """A sample in progress."""

    wanted: Wanted
    tokens: list[np.ndarray] = field(default_factory=list)
    logprobs: list[np.ndarray] = field(default_factory=list)


class Sampler:
    """Draws samples with the weights passed to it; keeps none of its own."""

    def __init__(self, step: Step, stop_ids: Sequence[int], shapes: SamplerShapes):
        """Prepares the programs.

        Args:
          step: the trainer's own, so that the sampled model is the trained one.
          stop_ids: tokens that end an answer.
          shapes: static; programs compile once.
        """
        self._shapes, self._stop_ids, self._mesh = shapes, np.array(stop_ids, np.int32), step.model.mesh
        model = step.model
        self._read = jax.jit(partial(decoding.read, step))
        self._empty = jax.jit(partial(decoding.empty, slots=shapes.slots, new_tokens=shapes.new_tokens, model=model))
        self._admit = jax.jit(partial(decoding.admit, model=model), donate_argnums=0)
        self._advance = jax.jit(partial(decoding.advance, step, tokens=SEGMENT_TOKENS), donate_argnums=2)
        self.drawn_from = ""
        """Digest of the trained values that the last samples were drawn with."""
        self.decoded_slots = 0
        """Tokens decoded in total, including those of empty rows and after the end of a sample."""

    def __call__(
        self, trained: Any, base: Any, prompts: Sequence[np.ndarray], wanted: Sequence[Wanted]
    ) -> Iterator[Drawn]:
        """Yields the samples as they end.

        Args:
          trained: the policy's trained values, as the next update will see them.
          base: the frozen weights.
          prompts: token ids of each prompt, at most `SamplerShapes.prompts` of them.
          wanted: the samples, of any of these prompts.
        """
        self.drawn_from = digest(trained)
        read = self._prompts(trained, base, prompts)
        state, waiting = self._empty(read), deque(wanted)
        rows: list[_InProgress | None] = [None] * self._shapes.slots
        while waiting or any(rows):
            if waiting and not all(rows):
                state = self._fill(state, read, rows, waiting)
            state, tokens, logprobs = self._advance(trained, base, state)
            self.decoded_slots += tokens.size
            yield from self._ended(rows, np.asarray(tokens), np.asarray(logprobs))

    def _prompts(self, trained: Any, base: Any, prompts: Sequence[np.ndarray]) -> decoding.Prompts:
        shapes = self._shapes
        tokens = np.zeros((shapes.prompts, shapes.prompt_tokens), np.int32)
        lengths = np.ones(shapes.prompts, np.int32)  # 1 for rows without a prompt
        for row, ids in enumerate(prompts):
            tokens[row, : len(ids)], lengths[row] = ids, len(ids)
        return self._read(trained, base, self._placed(tokens), self._placed(lengths))

    def _fill(
        self, state: decoding.Slots, read: decoding.Prompts, rows: list[_InProgress | None], waiting: deque[Wanted]
    ) -> decoding.Slots:
        """Puts waiting samples into free rows."""
        taken = np.zeros(len(rows), bool)
        which, seeds = np.zeros(len(rows), np.int32), np.zeros(len(rows), np.uint32)
        for b, row in enumerate(rows):
            if row is None and waiting:
                wanted = waiting.popleft()
                rows[b] = _InProgress(wanted)
                taken[b], which[b], seeds[b] = True, wanted.prompt, wanted.seed
        return self._admit(state, read, *map(self._placed, (taken, which, seeds)))

    def _ended(self, rows: list[_InProgress | None], tokens: np.ndarray, logprobs: np.ndarray) -> Iterator[Drawn]:
        """Appends a segment [B, K] to every row, and removes and yields the samples that end in it."""
        for b, row in enumerate(rows):
            if row is None:
                continue
            row.tokens.append(tokens[b])
            row.logprobs.append(logprobs[b])
            stops = np.flatnonzero(np.isin(tokens[b], self._stop_ids))
            before = SEGMENT_TOKENS * (len(row.tokens) - 1)
            end = before + int(stops[0]) + 1 if len(stops) else np.inf
            if end <= self._shapes.new_tokens or before + SEGMENT_TOKENS >= self._shapes.new_tokens:
                size = int(min(end, self._shapes.new_tokens))
                ids, chances = (np.concatenate(x)[:size] for x in (row.tokens, row.logprobs))
                yield Drawn(row.wanted, ids, chances, stopped=end <= self._shapes.new_tokens)
                rows[b] = None

    def _placed(self, x: np.ndarray) -> jax.Array:
        return on_mesh(x, self._mesh)
