"""Progress of a running sweep: one line per running job on a terminal, occasional lines elsewhere."""

from __future__ import annotations

import logging
import time
from typing import Any

from rich import progress

from gemma4_tpu.tracking.logs import console

log = logging.getLogger(__name__)
SECONDS_BETWEEN_LINES = 60.0


class Display:
    """Shows jobs by name; use it as a context manager."""

    def __init__(self) -> None:
        self._bar: progress.Progress | None = None
        if console().is_terminal:
            told = progress.TextColumn("{task.description}")
            columns = (progress.SpinnerColumn(), told, progress.TimeElapsedColumn())
            self._bar = progress.Progress(*columns, console=console(), transient=True)
        self._tasks: dict[str, Any] = {}
        self._facts: dict[str, dict[str, float]] = {}
        self._last_line: dict[str, float] = {}

    def __enter__(self) -> Display:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()

    def start(self, name: str) -> None:
        """Records that a process of this job was started."""
        self._facts[name], self._last_line[name] = {}, time.monotonic()
        if self._bar:
            self._tasks[name] = self._bar.add_task(f"{name}: starting", total=None)

    def rows(self, name: str, rows: list[dict[str, Any]]) -> None:
        """New rows of its `metrics.jsonl`."""
        for row in rows:
            self._facts[name].update(row)
        if not rows:
            return
        if self._bar:
            self._bar.update(self._tasks[name], description=f"{name}: {self._told(name)}")
        elif time.monotonic() - self._last_line[name] >= SECONDS_BETWEEN_LINES:
            self._last_line[name] = time.monotonic()
            log.info("%s: %s", name, self._told(name))

    def end(self, name: str) -> None:
        """Records that its process ended."""
        if self._bar:
            self._bar.remove_task(self._tasks.pop(name))

    def _told(self, name: str) -> str:
        facts = self._facts[name]
        told = [f"update {facts['update']:,}"]
        told += [
            f"{label} {facts[key]:.4f}"
            for key, label in (("loss", "loss"), ("heldout_loss", "held-out"))
            if isinstance(facts.get(key), float)
        ]
        return "  ".join(told)
