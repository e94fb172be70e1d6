"""Limits per row: a template can loop forever or fill memory, and a text can be crafted to make patterns slow."""

from __future__ import annotations

import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gemma4_tpu.data.drops import RowDropped
from gemma4_tpu.data.hard_limit import release

ROW_SECONDS = 10.0
ROW_GIB = 2
"""In addition to what the process uses before."""
_AGAIN_SECONDS = 0.5  # in case third-party code swallowed the first alarm with a bare `except`


class _Expired(BaseException):
    """Not an Exception, so that code which catches every error lets it through."""


@contextmanager
def row_limit() -> Iterator[None]:
    """Interrupts what takes longer than `ROW_SECONDS`, by the alarm signal, which also interrupts regular expressions.

    Only Python's main thread receives signals; rows are read there. In other threads there is no limit. What no signal
    interrupts is the matter of `hard_limit.py`.

    Raises:
      RowDropped: `too_slow`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    inside = True

    def expire(*_: Any) -> None:
        if inside:
            raise _Expired

    before = signal.signal(signal.SIGALRM, expire)
    others = signal.setitimer(signal.ITIMER_REAL, ROW_SECONDS, _AGAIN_SECONDS)
    try:
        yield
    except _Expired:
        raise RowDropped("too_slow", f"more than {ROW_SECONDS:g} s") from None
    finally:
        inside = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *others)
        release()


@contextmanager
def memory_limit() -> Iterator[None]:
    """Refuses the process more than `ROW_GIB` in addition to what it uses, which stops templates that build huge texts.

    Only on Linux and in Python's main thread, where rows are rendered: the limit is the whole process's.

    Raises:
      RowDropped: `too_much_memory`.
    """
    if sys.platform != "linux" or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", "rb", buffering=0) as file:  # a third of what Path.read_text takes, twice per row
        used = int(file.read().split()[0]) * resource.getpagesize()
    most = used + ROW_GIB * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (min([most, *(one for one in before if one >= 0)]), before[1]))
    try:
        yield
    except MemoryError:
        raise RowDropped("too_much_memory", f"more than {ROW_GIB} GiB") from None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
