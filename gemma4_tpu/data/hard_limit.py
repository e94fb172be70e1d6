"""Limits for what nothing in this process can interrupt: one endless operation in C or Rust, which can hold the GIL.

A chat template can compare lists that contain each other 2^60 times; a tokenizer's patterns can backtrack for hours,
its rules can multiply a text. The alarm of `timeout.py` takes effect between Python's bytecodes, so it never comes.
A small process (`overseer.py`) watches instead: it prints one message, leaves it in the run's `result.json`, and ends
this process by a signal that the C library answers by exiting: the exit code says that no restart helps.

A piece of work costs microseconds, since shared memory announces it.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import mmap
import os
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from gemma4_tpu import scratch
from gemma4_tpu.data import overseer
from gemma4_tpu.data.drops import printable
from gemma4_tpu.errors import OVERRUN
from gemma4_tpu.redact import redact

logger = logging.getLogger(__name__)

SECONDS = 30.0
"""For a piece of work of no particular size; the limits that drop a row (`timeout.py`) are lower."""
BYTES = 2 * 2**30
"""In addition to what the process holds when the piece begins, as `timeout.ROW_GIB`."""
_SHOWN_BYTES = 500  # the last of a file, and of who does the work
_MAIN = 0  # the main thread's slot: an exception from a signal can leave it occupied, and the next piece takes it over

_here = threading.local()
_result: tuple[str, Path] | None = None
_watched: _Watched | None = None
_starting = threading.Lock()


class _Watched:
    """The overseer, and what is shared with it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        with _shared_file() as file:
            file.write(bytes(overseer.FILE_BYTES))  # a mapped hole in a file would end the process on a full disk
            file.flush()
            self.shared = mmap.mmap(file.fileno(), overseer.FILE_BYTES)
            try:
                numbers = map(str, (file.fileno(), OVERRUN, os.getpid()))
                self._process = subprocess.Popen(
                    [sys.executable or "python3", "-I", "-S", overseer.__file__, *numbers],
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=(file.fileno(),),
                )  # fmt: skip
            except OSError as error:  # no more processes are permitted, for instance
                logger.warning("templates and tokenizers are not watched, since no process can be started: %s", error)
        c = ctypes.CDLL(None)
        c.signal(OVERRUN, c._exit)  # which gets the signal's number, and exits with it, whatever Python is doing
        self.counters = memoryview(self.shared)[: overseer.COUNTERS.size].cast("Q")
        self.free = deque(range(_MAIN + 1, overseer.SLOTS))

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def _shared_file() -> BinaryIO:
    """An empty one without a name, in memory where the system has such files."""
    return os.fdopen(os.memfd_create("gemma4_tpu"), "w+b") if hasattr(os, "memfd_create") else tempfile.TemporaryFile()


def _start() -> _Watched:
    global _watched
    with _starting:
        if _watched is None:
            _watched = _Watched()
        return _watched


@atexit.register
def _close() -> None:
    global _watched
    if _watched is not None:
        _watched.close()
        _watched = None


def _forget() -> None:
    """In a forked child, which has an overseer of its own once it needs one."""
    global _watched, _starting
    _watched, _starting = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)


def leave_result_in(path: Path | None, kind: str = "") -> None:
    """Where the overseer is to say why it ended this process; None: nowhere.

    Args:
      path: the `result.json` of the run that this process writes.
      kind: the record's, one of `tracking.records.WORK`.
    """
    global _result
    _result = (kind, path) if path else None


@lru_cache
def shown(text: str) -> str:
    """Safe to print, and short enough to leave room for the rest; blanking secrets costs more than a row does."""
    return printable(redact(text)).encode()[-_SHOWN_BYTES:].decode("utf-8", "ignore")


def _record(who: str, advice: str) -> bytes:
    """The text of a record. A path that does not fit is left out: a part of it would be another one."""
    text, room = f"{who}\0{advice}".encode(), overseer.RECORD_BYTES - overseer.RECORD.size
    kind, path = _result or ("", "")
    result = b"\0%s\0%s" % (kind.encode(), os.fsencode(path))
    text += result if len(text) + len(result) <= room else b"\0\0"
    for folder in scratch.made():
        more = b"\0" + os.fsencode(folder)
        if len(text) + len(more) <= room:
            text += more
    return text


@contextmanager
def at(file: str, rows: str = "") -> Iterator[None]:
    """Names the row (or rows: as they are) of a file, or a problem, that this thread works on, for the message."""
    before = getattr(_here, "place", "")
    _here.place = f"{shown(file)}:{rows}: " if rows else f"{shown(file)}: "
    try:
        yield
    finally:
        _here.place = before


@contextmanager
def hard_limit(who: str, advice: str, *, seconds: float, most_bytes: int) -> Iterator[None]:
    """Ends this process if what is inside takes too long or too much memory; works in any thread, but does not nest.

    Args:
      who: whose work it is, such as `the chat template of <folder>`.
      advice: what would help, for the end of the message.
      seconds: limit in which both processes could run.
      most_bytes: limit of the memory that the process takes in addition, on Linux.
    """
    watched = _watched or _start()
    is_main = threading.current_thread() is threading.main_thread()
    try:
        slot = _MAIN if is_main else watched.free.pop()
    except IndexError:  # more threads at a time than anything of ours starts
        yield
        return
    place = getattr(_here, "place", "")
    text = _record(f"{place}{shown(who)}", advice)
    start, counters = overseer.record_start(slot), watched.counters
    counters[slot] += counters[slot] % 2  # the record changes while the slot is free
    overseer.RECORD.pack_into(watched.shared, start, seconds, most_bytes, len(text))
    start += overseer.RECORD.size
    watched.shared[start : start + len(text)] = text
    counters[slot] += 1
    try:
        yield
    finally:
        counters[slot] += counters[slot] % 2
        if not is_main:
            watched.free.append(slot)


def release() -> None:
    """Frees the main thread's slot, after an exception from a signal that could have arrived anywhere."""
    if _watched is not None and threading.current_thread() is threading.main_thread():
        _watched.counters[_MAIN] += _watched.counters[_MAIN] % 2
