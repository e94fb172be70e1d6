"""Child processes end with this one, and their output reaches files of ours only without secrets."""

from __future__ import annotations

import ctypes
import io
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, BinaryIO

from gemma4_tpu.redact import redact

log = logging.getLogger(__name__)

END_SECONDS = 10.0
"""From SIGTERM to SIGKILL."""
_POLL_SECONDS = 0.2
_DRAIN_SECONDS = 5.0
"""The output ends with the program, unless one that it started in another session holds on to it."""
_SPLIT = re.compile(rb"[\r\n]+")
_PR_SET_PDEATHSIG = 1
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def end_with_parent() -> None:
    """Makes the kernel send this process SIGTERM once the thread that started it ends (on Linux); for `preexec_fn`.

    The kernel drops this for programs that run as another user, such as `sudo`.
    """
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def kept_lines(pipe: IO[bytes] | None, file: BinaryIO) -> Iterator[str]:
    """Yields the lines of a child's output without secrets, after writing them to an unbuffered file; drops empty ones.

    If the file can't be written any more, a warning is logged once, and the lines still come.
    """
    assert isinstance(pipe, io.BufferedReader)
    is_kept, rest = True, b""
    while block := pipe.read1(65536):
        *whole, rest = _SPLIT.split(rest + block)
        for line in filter(None, map(_without_secrets, whole)):
            is_kept = is_kept and _wrote(file, line)
            yield line
    if line := _without_secrets(rest):
        if is_kept:
            _wrote(file, line)
        yield line


def _without_secrets(raw: bytes) -> str:
    return redact(raw.decode(errors="replace").rstrip())


def _wrote(file: BinaryIO, line: str) -> bool:
    try:
        file.write(f"{line}\n".encode())
    except OSError as error:
        log.warning("%s: can't be written any more (%s)", file.name, error.strerror)
        return False
    return True


def run_logged(
    words: Sequence[str],
    path: Path,
    environment: Mapping[str, str] | None = None,
    watch: Callable[[int, float], None] | None = None,
) -> int:
    """Runs a program to its end, appends its output to a file without secrets, and returns its exit code.

    It has its own session. What is left of that gets SIGKILL when this returns or raises; if this process is killed,
    the program gets SIGTERM.

    Args:
      words: the command.
      path: the file.
      environment: the program's; None: this process's.
      watch: called several times per second with the program's pid and the seconds since its last line; raises to end
        it.
    """
    said_at = time.monotonic()
    file = open(path, "ab", buffering=0)  # noqa: SIM115, the thread closes it

    def follow() -> None:
        nonlocal said_at
        with file:
            for _ in kept_lines(process.stdout, file):
                said_at = time.monotonic()

    try:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True, preexec_fn=end_with_parent,
        )  # fmt: skip
    except BaseException:
        file.close()
        raise
    reader = threading.Thread(target=follow, name="child-output", daemon=True)
    reader.start()
    try:
        while True:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(_POLL_SECONDS if watch else None)
            assert watch is not None
            watch(process.pid, time.monotonic() - said_at)
    except BaseException:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
        raise
    finally:
        with suppress(ProcessLookupError):  # what it has left holds the pipe open
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join(_DRAIN_SECONDS)
