"""A running hostile command: collects its output, limits its time, and leaves nothing of it behind.

For use in a single-threaded process that adopts orphans (`PR_SET_CHILD_SUBREAPER`, see `sandbox.py`): all of its
children are commands, or processes that commands left behind.
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

WALL_FACTOR, WALL_EXTRA_SECONDS = 6, 10  # CPU time is what counts on a busy machine; this stops commands that sleep
OUT_OF_CPU_TIME = (-signal.SIGXCPU, 128 + signal.SIGXCPU)  # of the command itself, or of one that it waited for
_SECONDS_TO_DIE = 5.0  # of a killed process; more only if it hangs in the kernel
_staying: set[int] = set()  # process ids of commands that outlast others


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The result of a command."""

    returncode: int
    """Exit code; negative or above 128: ended by a signal."""
    stdout: str
    stderr: str
    cpu_seconds: float
    """CPU time of all its processes."""
    stopped: str | None
    """Why it was stopped: `cpu`, `wall`, `output`; None: it ended by itself."""


class Running:
    """A started command, with pipes for its output."""

    def __init__(self, process: subprocess.Popen[bytes], cap_bytes: int, *, stays: bool = False):
        """Args:
        process: the command's first process, and the leader of its group.
        cap_bytes: maximum size of each of its outputs.
        stays: it runs alongside other commands, and does not end with them.
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
        """Whether its first process has ended. It is not reaped, so its process id stays reserved until `end`."""
        return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def collect(
        self, limit_seconds: float, complete: Callable[[bytearray, bytearray], bool] | None = None
    ) -> str | None:
        """Reads its output until it ends or the output is `complete`; returns why it has to be stopped, if it does.

        `limit_seconds` is its limit on CPU time. On a busy machine, or while it sleeps, it can take longer.
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
        """The text of both outputs since the last call."""
        texts = [bytes(text[: self._cap_bytes]).decode("utf-8", "replace") for text in self._printed.values()]
        for text in self._printed.values():
            text.clear()
        return texts[0], texts[1]

    def end(self, stopped: str | None) -> Finished:
        """Kills whatever is left of it, and returns its result; `stopped` is what `collect` returned."""
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
        """Reads the pipe's contents, little beyond the cap; returns False at the end of the file."""
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
    """Kills all commands, including those that stay, and waits until they are gone, so that they write nothing more."""
    for pid in _children():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    until = time.monotonic() + _SECONDS_TO_DIE
    while (children := _children()) and time.monotonic() < until:  # orphans become children of this process
        for pid in children:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.002)


def _end_all(process: subprocess.Popen[bytes]) -> tuple[int, float]:
    """Kills the command's group and all descendants; returns (return code, CPU seconds of all)."""
    cpu_seconds = 0.0
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    while children := _children() - _staying:  # orphans become children of this process
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        for pid in children:
            _, status, usage = os.wait4(pid, 0)
            cpu_seconds += usage.ru_utime + usage.ru_stime
            if pid == process.pid:
                process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, cpu_seconds


def _children() -> set[int]:
    """Process ids of this process's children, including zombies."""
    try:
        return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}
    except FileNotFoundError:  # a kernel without CONFIG_PROC_CHILDREN
        return {child.pid for child in psutil.Process().children()}
