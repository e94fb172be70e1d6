"""The compiled programs of a run: one train and one evaluate program per static row length, each compiled once."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax

from gemma4_tpu.step.objective import Stats
from gemma4_tpu.step.train_step import Batch, Step, TrainState, UpdateMetrics, compiled_functions

log = logging.getLogger(__name__)


_this_thread = threading.local()


def _count_compilation(event: str, duration_secs: float, **kwargs: str | int) -> None:
    if event == "/jax/core/compile/backend_compile_duration":  # called in the compiling thread
        _this_thread.compilations = _compilations() + 1


def _compilations() -> int:
    """Programs that this thread has compiled, or read from the compilation cache."""
    return getattr(_this_thread, "compilations", 0)


jax.monitoring.register_event_duration_secs_listener(_count_compilation)


class Recompilation(RuntimeError):
    """An update whose shapes differ from those its program was compiled for."""


class Programs:
    """`train` and `evaluate`, each compiled on first use for a row length.

    An update with other shapes, types or shardings than its program was compiled for is an error, never a silent
    recompilation.
    """

    def __init__(
        self,
        step: Step,
        state: TrainState,
        lengths: Sequence[int],
        compiling: Callable[[], AbstractContextManager] = nullcontext,
    ):
        """`compiling()` is entered around the first run of each program."""
        self._compiling = compiling
        self._lengths = tuple(lengths)
        self._functions = dict(zip(("train", "evaluate"), compiled_functions(step, state), strict=True))
        self._shapes: dict[tuple[str, int], dict[str, tuple[int, ...]]] = {}
        self._compiled: set[tuple[str, int]] = set()
        self.compile_seconds = 0.0

    def train(
        self, state: TrainState, base: Any, batch: Batch, spike_limit: Any = None
    ) -> tuple[TrainState, UpdateMetrics]:
        """One update; `state` is donated. Pass a `spike_limit` at every update, or at none."""
        return self._run("train", state, base, batch, *([] if spike_limit is None else [spike_limit]))

    def evaluate(self, trained: Any, base: Any, batch: Batch) -> tuple[jax.Array, jax.Array, Stats]:
        """(summed loss, its denominator, the objective's sums) of a held-out batch."""
        return self._run("evaluate", trained, base, batch)

    def _run(self, name: str, values: Any, base: Any, batch: Batch, *more: Any) -> Any:
        function, shapes = self._functions[name], {key: array.shape for key, array in batch.items()}
        length = shapes["tokens"][-1]
        if length not in self._lengths:
            raise Recompilation(f"{name}: rows of T={length}, but the run has {self._lengths}; batch: {shapes}")
        first = self._shapes.setdefault((name, length), shapes)
        if shapes != first:
            raise Recompilation(f"{name}: compiled for a batch of {first}, given {shapes}")
        before, started = _compilations(), time.perf_counter()
        with nullcontext() if (name, length) in self._compiled else self._compiling():
            result = function(values, base, batch, *more)
        if _compilations() > before:
            self._count(name, length, time.perf_counter() - started)
        return result

    def _count(self, name: str, length: int, seconds: float) -> None:
        """Records a compilation: expected once per row length."""
        self.compile_seconds += seconds
        log.info("compiled %s for rows of %d tokens in %.1f s", name, length, seconds)
        expected = (name, length) not in self._compiled
        self._compiled.add((name, length))
        if not expected:
            raise Recompilation(
                f"{name}: compiled again for rows of T={length} with a batch of {self._shapes[name, length]}: the type"
                " or the placement of the state or the base weights changed"
            )
