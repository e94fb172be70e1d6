"""Time and tokens of the updates under way: the wall clock, the window since the last logged row, the run's totals."""

from __future__ import annotations

import time
from dataclasses import dataclass

from gemma4_tpu.data.pipeline import Update
from gemma4_tpu.tracking.result import Totals


class Clock:
    """Wall-clock time of the run (earlier starts included) and since the last lap, in seconds."""

    def __init__(self, earlier_seconds: float) -> None:
        self._last = time.perf_counter()
        self._start = self._last - earlier_seconds

    @property
    def total(self) -> float:
        return time.perf_counter() - self._start

    def lap(self) -> float:
        """Seconds since the last lap, or since the start."""
        now = time.perf_counter()
        lap, self._last = now - self._last, now
        return lap


@dataclass
class Window:
    """Updates since the last logged row."""

    first: bool = True
    """Begins with the first update after a start, whose time is compilation."""
    updates: int = 0
    real_tokens: int = 0
    target_tokens: int = 0
    seconds: float = 0.0
    last_seconds: float = 0.0

    def add(self, update: Update, seconds: float) -> None:
        """Counts a finished update that took so many seconds."""
        self.updates += 1
        self.real_tokens += update.real_tokens
        self.target_tokens += update.target_tokens
        self.seconds += seconds
        self.last_seconds = seconds


def count_update(totals: Totals, update: Update, loss: float, window: Window) -> None:
    """Adds one finished update, the last of `window`."""
    totals.updates += 1
    totals.real_tokens += update.real_tokens
    totals.target_tokens += update.target_tokens
    totals.slots += round(update.real_tokens / update.fill)
    if not (window.first and window.updates == 1):
        totals.timed_tokens += update.real_tokens
        totals.timed_seconds += window.last_seconds
    if totals.train_loss_first is None:
        totals.train_loss_first = loss
    totals.train_loss_last = loss
