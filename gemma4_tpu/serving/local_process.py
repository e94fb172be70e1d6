"""A separate process for work on untrusted input (chat templates, schemas), which can loop or exhaust memory.

`python -m gemma4_tpu.serving.local_process` is that process. It reads one line of JSON that describes its task, then
one line per piece of work, and answers each with a line; the kernel ends it if a piece takes too much CPU time.
"""

from __future__ import annotations

import importlib
import io
import json
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

CPU_SECONDS = 5.0
"""Per piece of work; legitimate ones take a few milliseconds."""
MEMORY_MIB = 512
"""In addition to what the process uses when it is ready."""
_SHOWN = 300  # characters of a third-party message

Worker = Callable[[Mapping[str, Any]], dict[str, Any]]
"""Maps a piece of work to an answer; an exception refuses it."""


class WorkRefused(Exception):
    """The work cannot be done; the message says why."""


class LimitedProcess:
    """Does one kind of work; every method can be called from any thread."""

    def __init__(self, module: str, about: Mapping[str, Any], *, cpu_seconds: float = CPU_SECONDS):
        """Prepares a process for one kind of work.

        Args:
          module: its function `worker` makes a `Worker` from `about`.
          about: common to all pieces of work.
          cpu_seconds: limit per piece of work.
        """
        self._about = {"module": module, "about": dict(about), "cpu_seconds": cpu_seconds}
        self._lock = threading.Lock()
        self._closed = False
        self._start()

    def ask(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the worker's answer.

        Raises:
          WorkRefused: the worker refuses, or takes too much time or memory.
        """
        with self._lock:
            answer = self._answer(asked)
            if not answer:
                raise WorkRefused(self._ended())
        found: dict[str, Any] = json.loads(answer)
        if "refused" in found:
            raise WorkRefused(found["refused"])
        return found

    def close(self) -> None:
        """Ends the process, whatever it is doing; waiting callers get a refusal."""
        self._closed = True
        self._process.kill()
        self._process.wait()

    def _start(self) -> None:
        command = [sys.executable, "-m", "gemma4_tpu.serving.local_process"]
        self._process = subprocess.Popen(  # in its own session: Ctrl-C is meant for the server, which ends it
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
        )
        assert isinstance(self._process.stdout, io.FileIO)
        self._answers = io.BufferedReader(self._process.stdout)
        self._tell(self._about)

    def _tell(self, asked: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        rest = memoryview(json.dumps(asked).encode() + b"\n")
        while rest:
            rest = rest[self._process.stdin.write(rest) :]

    def _answer(self, asked: Mapping[str, Any]) -> bytes:
        try:
            self._tell(asked)
            return self._answers.readline()
        except OSError:  # it has ended
            return b""

    def _ended(self) -> str:
        """The reason why it ended; the next piece of work starts another process."""
        code = self._process.wait()
        if self._closed:
            return "the server is stopped"
        self._start()
        if code == -signal.SIGPROF:
            return f"it takes more than {self._about['cpu_seconds']:g} s"
        return f"its process ended ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"


def _main() -> None:
    about = json.loads(sys.stdin.buffer.readline())
    work: Worker = importlib.import_module(about["module"]).worker(about["about"])
    _limit_memory()
    # The parent can ignore or block the timer's signal (some libraries use it for profiling), and children inherit
    # that.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, about["cpu_seconds"])  # its signal has no handler, so it ends the process
        try:
            answer = work(json.loads(line))
        except MemoryError:
            answer = {"refused": f"it takes more than {MEMORY_MIB} MiB"}
        except Exception as error:  # third-party code can raise anything
            answer = {"refused": (str(error) or type(error).__name__)[:_SHOWN]}
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


def _limit_memory() -> None:
    import psutil

    most = psutil.Process().memory_info().vms + MEMORY_MIB * 2**20
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


if __name__ == "__main__":
    _main()
