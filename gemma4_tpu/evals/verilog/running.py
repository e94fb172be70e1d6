"""A hostile command that runs: what it prints, until when, and that nothing of it is left.

For a single-threaded process that adopts orphans (`PR_SET_CHILD_SUBREAPER`, see `sandbox.py`): all its children are
commands, or what commands left behind.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

WALL_FACTOR, WALL_EXTRA_SECONDS = 6, 10  # on a busy machine CPU time is what counts; this ends what only sleeps
OUT_OF_CPU_TIME = (-signal.SIGXCPU, 128 + signal.SIGXCPU)  # the command itself, or one that it waited for
_staying: set[int] = set()  # process ids of commands that outlast others


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What a command did."""

    returncode: int
    """Negative or above 128: ended by a signal."""
    stdout: str
    stderr: str
    cpu_seconds: float
    """Of all its processes."""
    stopped: str | None
    """Why it was stopped: `cpu`, `wall`, `output`; null: it ended by itself."""


class Running:
    """A command that was started with pipes for what it prints."""

    def __init__(self, process: subprocess.Popen[bytes], cap_bytes: int, *, stays: bool = False):
        """Args:
        process: the first one of the command, and leader of a group.
        cap_bytes: how much it may print on each of its outputs.
        stays: other commands will run meanwhile, and their end is not its end.
        """
        assert process.stdout is not None and process.stderr is not None
        self.process, self._cap_bytes = process, cap_bytes
        self._printed = {process.stdout: bytearray(), process.stderr: bytearray()}
        for pipe in self._printed:
            os.set_blocking(pipe.fileno(), False)
        if stays:
            _staying.add(process.pid)

    @property
    def ended(self) -> bool:
        """Whether its first process has ended. It is not waited for, so that its number remains its own until `end`."""
        return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def collect(
        self, limit_seconds: float, complete: Callable[[bytearray, bytearray], bool] | None = None
    ) -> str | None:
        """Reads what it prints, until it ends or that is `complete`; or why it has to be stopped.

        `limit_seconds` is its limit on CPU time. On a busy machine, or asleep, it may take longer.
        """
        deadline = time.monotonic() + WALL_FACTOR * limit_seconds + WALL_EXTRA_SECONDS
        ended = os.pidfd_open(self.process.pid)
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(ended, selectors.EVENT_READ)
                for pipe in self._printed:
                    selector.register(pipe, selectors.EVENT_READ)
                while ready := selector.select(max(0.0, deadline - time.monotonic())):
                    for key, _ in ready:
                        if key.fileobj in self._printed and not self._drain(key.fileobj):
                            selector.unregister(key.fileobj)
                    if self._too_much():
                        return "output"
                    if any(key.fileobj == ended for key, _ in ready) or (complete and complete(*self._texts())):
                        return None
                return "wall"
        finally:
            os.close(ended)

    def take(self) -> tuple[str, str]:
        """What was printed on both outputs since the last time."""
        texts = [bytes(text[: self._cap_bytes]).decode("utf-8", "replace") for text in self._printed.values()]
        for text in self._printed.values():
            text.clear()
        return texts[0], texts[1]

    def end(self, stopped: str | None) -> Finished:
        """Kills all that is left of it, and tells what it did; `stopped` is what `collect` said."""
        _staying.discard(self.process.pid)
        returncode, cpu_seconds = _end_all(self.process)
        for pipe in self._printed:
            self._drain(pipe)
            pipe.close()
        if self.process.stdin is not None:
            self.process.stdin.close()
        if stopped is None and self._too_much():
            stopped = "output"
        if stopped is None and returncode in OUT_OF_CPU_TIME:
            stopped = "cpu"
        stdout, stderr = self.take()
        return Finished(returncode=returncode, stdout=stdout, stderr=stderr, cpu_seconds=cpu_seconds, stopped=stopped)

    def _texts(self) -> tuple[bytearray, bytearray]:
        stdout, stderr = self._printed.values()
        return stdout, stderr

    def _too_much(self) -> bool:
        return any(len(text) > self._cap_bytes for text in self._printed.values())

    def _drain(self, pipe) -> bool:
        """Reads what the pipe holds, little more than the cap; false at the end of file."""
        text = self._printed[pipe]
        while len(text) <= self._cap_bytes:
            try:
                chunk = os.read(pipe.fileno(), 1 << 16)
            except BlockingIOError:
                return True
            if not chunk:
                return False
            text += chunk
        return True


def kill_commands() -> None:
    """Kills the groups of all commands, those that stay as well, and waits for none: this process is about to end."""
    for pid in _children():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def _end_all(process: subprocess.Popen[bytes]) -> tuple[int, float]:
    """Kills the command's group and whatever became of its children: (return code, CPU seconds of all)."""
    cpu_seconds = 0.0
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    while children := _children() - _staying:  # whose parent dies becomes a child of this process
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        for pid in children:
            _, status, usage = os.wait4(pid, 0)
            cpu_seconds += usage.ru_utime + usage.ru_stime
            if pid == process.pid:
                process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, cpu_seconds


def _children() -> set[int]:
    """Of this process, with those that have ended and were not waited for."""
    try:
        return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}
    except FileNotFoundError:  # a kernel without CONFIG_PROC_CHILDREN
        return {child.pid for child in psutil.Process().children()}
