"""Traces some updates for XProf and TensorBoard (`trainer.profile`): what each device did, and when."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax

from gemma4_tpu.errors import UserError
from gemma4_tpu.tracking.bucket import PROFILE

log = logging.getLogger(__name__)


def check_profile(updates: list[int] | None, total_updates: int) -> None:
    """Raises `UserError` if `trainer.profile` names updates that the run lacks."""
    if updates and updates[1] > total_updates:
        raise UserError(
            f"trainer.profile={updates}: the run has {total_updates} updates; give [first,last] within them"
        )


class Profile:
    """Records the updates `first` to `last`, as far as this start reaches them; does nothing without a range.

    The devices are drained before the trace begins and before it ends, so that it contains whole updates.
    """

    def __init__(self, updates: list[int] | None, folder: Path | None):
        """Prepares a trace.

        Args:
          updates: [first, last], counted from 1; None: no trace.
          folder: the run folder; None: another process writes, and this one records nothing.
        """
        self._range = range(updates[0], updates[1] + 1) if updates and folder else range(0)
        self._folder = folder
        self._recording = False

    def starts(self, update: int) -> bool:
        """Whether the trace is to begin before this update."""
        return update in self._range and not self._recording

    def ends(self, update: int) -> bool:
        """Whether this update is the last in the trace."""
        return self._recording and update == self._range[-1]

    def start(self) -> None:
        """Begins the trace; nothing should be in flight."""
        assert self._folder is not None
        jax.profiler.start_trace(self._folder / PROFILE)
        self._recording = True

    def stop(self) -> None:
        """Ends and writes the trace, if one is in progress."""
        if self._recording:
            jax.profiler.stop_trace()
            self._recording = False
            self._range = range(0)
            log.info("trace: tensorboard --logdir %s/%s", self._folder, PROFILE)

    def annotation(self, update: int) -> Any:
        """A context manager that marks everything dispatched in it as one update."""
        return jax.profiler.StepTraceAnnotation("update", step_num=update) if self._recording else nullcontext()

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Writes what was recorded even if the run ends early."""
        try:
            yield
        finally:
            self.stop()
