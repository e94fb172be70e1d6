"""Ctrl-C and SIGTERM in the parent of a sweep: the first is passed on as a wish to save, the second kills."""

from __future__ import annotations

import signal
from typing import Any

from gemma4_tpu.errors import INTERRUPTED, PREEMPTED

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stop:
    """Counts SIGINT, SIGTERM and SIGHUP while it is open as a context manager (in the main thread only).

    A signal that was ignored before, as `nohup` does with SIGHUP, stays ignored.
    """

    def __init__(self) -> None:
        self.count = 0
        self.exit_code = 0
        """What the sweep ends with: 130 after Ctrl-C, 42 after SIGTERM (the same command goes on); 0: not stopped."""

    def __enter__(self) -> Stop:
        self._before: dict[int, Any] = {}
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: object) -> None:
        self.count += 1
        self.exit_code = self.exit_code or (INTERRUPTED if number == signal.SIGINT else PREEMPTED)
