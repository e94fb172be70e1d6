"""The compiled programs of a run: one train and one evaluate program per static row length, each compiled once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from gemma4_tpu.step.train_step import Batch, Metrics, Step, TrainState, compile_step

log = logging.getLogger(__name__)


class Recompilation(RuntimeError):
    """An update whose shapes differ from those its program was compiled for."""


class Programs:
    """`train` and `evaluate`, compiled ahead of time at their first use for a row length.

    An update with other shapes, types or placements than its program was compiled for is an error, never a silent
    recompilation.
    """

    def __init__(self, step: Step, lengths: Sequence[int]):
        self._lengths = tuple(lengths)
        self._functions = dict(zip(("train", "evaluate"), compile_step(step), strict=True))
        self._compiled: dict[tuple[str, int], Callable[..., Any]] = {}
        self.compile_seconds = 0.0

    def train(self, state: TrainState, base: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        """One update; `state` is donated."""
        return self._run("train", state, base, batch)

    def evaluate(self, trained: Any, base: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """(summed loss, target tokens) of a held-out batch."""
        return self._run("evaluate", trained, base, batch)

    def _run(self, name: str, *arguments: Any) -> Any:
        batch = arguments[-1]
        length = batch["tokens"].shape[-1]
        if (name, length) not in self._compiled:
            self._compiled[name, length] = self._compile(name, length, arguments)
        try:
            return self._compiled[name, length](*arguments)
        except TypeError as error:
            raise Recompilation(f"{name}: {error}") from error

    def _compile(self, name: str, length: int, arguments: tuple[Any, ...]) -> Callable[..., Any]:
        if length not in self._lengths:
            shapes = {key: value.shape for key, value in arguments[-1].items()}
            raise Recompilation(f"{name}: rows of T={length}, but the run has {self._lengths}; batch: {shapes}")
        started = time.perf_counter()
        compiled = self._functions[name].lower(*arguments).compile()
        seconds = time.perf_counter() - started
        self.compile_seconds += seconds
        log.info("compiled %s for rows of %d tokens in %.1f s", name, length, seconds)
        return compiled
