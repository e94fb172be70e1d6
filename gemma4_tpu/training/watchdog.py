"""Ends a run that hangs: without progress for `trainer.stall_seconds`, it dumps every stack and exits."""

from __future__ import annotations

import faulthandler
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gemma4_tpu.errors import STALLED, exit_now

log = logging.getLogger(__name__)


class Watchdog:
    """Measures the time since the last sign of progress; a context manager around the loop."""

    def __init__(
        self, stall_seconds: float | None, log_path: Path | None, last_words: Callable[[str], None] = lambda _: None
    ):
        """`last_words` receives the reason before the process ends; `stall_seconds` None never ends it."""
        self._stall_seconds = stall_seconds
        self._log_path = log_path
        self._last_words = last_words
        self._progress_at = time.monotonic()
        self._paused = 0
        self._closed = threading.Event()

    def __enter__(self) -> Watchdog:
        if self._stall_seconds is not None:
            self.progress()
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()

    def progress(self) -> None:
        """Called when something is finished: an update, a held-out batch, a restore."""
        self._progress_at = time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Suspends the watchdog inside: for compilation, whose length is unknown."""
        self._paused += 1
        try:
            yield
        finally:
            self.progress()
            self._paused -= 1

    def _watch(self) -> None:
        assert self._stall_seconds is not None
        while not self._closed.wait(min(self._stall_seconds / 10, 5.0)):
            if not self._paused and time.monotonic() - self._progress_at > self._stall_seconds:
                self._stop()

    def _stop(self) -> None:
        reason = f"no progress for trainer.stall_seconds={self._stall_seconds:g}"
        log.critical("%s: every thread's stack follows; exiting with code %d", reason, STALLED)
        faulthandler.dump_traceback(sys.__stderr__ or sys.stderr, all_threads=True)
        if self._log_path:
            with self._log_path.open("a", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        self._last_words(f"{reason}; the stacks are in log.txt. The same command resumes from the last checkpoint")
        exit_now(STALLED)
