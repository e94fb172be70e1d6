"""The output of a starting server: followed, saved, and summarised."""

from __future__ import annotations

import queue
import re
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from gemma4_tpu.children import kept_lines

_END = object()
LAST_LINES = 20
RAISED_LINES = 8
_RAISED = re.compile(r"(?P<process>\((?!APIServer)\S+ pid=\d+\)) ERROR .*?\] (?P<told>[\w.]+(?:Error|Exception): .*)")
"""The last line of a traceback in the log of one of vLLM's processes, which ends the server. The process that started
it raises another one. `APIServer` also logs those of single requests."""
LEAVE_SECONDS = 10.0
"""The engine's `logs` ends by itself after the container has ended."""


class ServerLog:
    """Follows a container's log: writes every line to a file at once, without secrets; use it as a context manager."""

    def __init__(self, process: subprocess.Popen[bytes], path: Path):
        self._process, self._path = process, path
        self._lines: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._read, name="server-log", daemon=True)
        self.ended = False
        """The container has printed its last line."""
        self.last: deque[str] = deque(maxlen=LAST_LINES)
        self.raised: list[str] = []
        """The first exception of a process that the server needs, in its own words."""
        self._raises: str | None = None  # the process, while it still tells

    def __enter__(self) -> ServerLog:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._process.wait(LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._thread.join()

    def lines(self, seconds: float) -> Iterator[str]:
        """Yields the lines that arrive within `seconds`; ends early with the log."""
        until = time.monotonic() + seconds
        while not self.ended and (left := until - time.monotonic()) > 0:
            try:
                item = self._lines.get(timeout=left)
            except queue.Empty:
                return
            if item is _END:
                self.ended = True
                return
            assert isinstance(item, str)
            self.last.append(item)
            self._look(item)
            yield item

    def _look(self, line: str) -> None:
        """Keeps the first exception, which may take some lines."""
        if not self.raised and (found := _RAISED.match(line)):
            self._raises = found["process"]
            self.raised.append(found["told"])
        elif self._raises and line.startswith(f"{self._raises} ERROR ") and len(self.raised) < RAISED_LINES:
            self.raised.append(line.partition("] ")[2])
        else:
            self._raises = None

    def _read(self) -> None:
        with open(self._path, "ab", buffering=0) as file:
            for line in kept_lines(self._process.stdout, file):
                self._lines.put(line)
        self._lines.put(_END)


class Stages:
    """A server's progress, judged by its log."""

    def __init__(self) -> None:
        self.stage = "starting"
        """`starting`, `loading weights`, `compiling`, `answering soon`."""
        self.told = "starting"
        """The stage, and the progress within it."""
        self._programs = 0

    def see(self, line: str) -> bool:
        """Processes one line of the log; returns whether a new stage has begun."""
        before = self.stage
        if found := re.search(r"Loading safetensors checkpoint shards:\s+\d+%.*?\| (\d+)/(\d+)", line):
            self._is("loading weights", f", {found[1]} of {found[2]} files")
        elif re.search(r"Compilation of .* finished in", line):
            self._programs += 1
            self._is("compiling", f", {self._programs} programs done")
        elif re.search(r"Precompile |Capturing CUDA graphs", line) and not self._programs:
            self._is("compiling")
        elif "Application startup complete" in line:
            self._is("answering soon")
        return self.stage != before

    def _is(self, stage: str, how_far: str = "") -> None:
        self.stage, self.told = stage, stage + how_far
