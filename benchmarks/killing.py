"""Kills a command at any moment, and looks at what it leaves: exit code, words, processes, files; how it goes on.

`chaos.py` runs it. A `Subject` is a command with the folder it works in; a series kills one start after the other
there, then leaves the last one alone and compares what came of it with a start that was never touched.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil

from gemma4_tpu.errors import INTERRUPTED, PREEMPTED, TERMINATED, leave

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGKILL)
MOST_LINES = 12
"""Lines that a command may print after a signal."""
MARK = "GEMMA4_CHAOS"
_SECONDS_TO_END, _SECONDS_FOR_CHILDREN = 120, 15


class Process:
    """A command in a forked child: a session of its own, its output in a file, its temporary files in a folder."""

    def __init__(
        self, main: Callable[[list[str]], int], arguments: Sequence[str], output: Path,
        environment: Mapping[str, str] = MappingProxyType({}),
    ):  # fmt: skip
        self.output = output
        self.temporary = output.with_suffix(".tmp")
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir()
        self.output.write_bytes(b"")  # what an earlier start said is not this one's
        self.mark = f"{output}:{time.monotonic_ns()}"
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 99
            try:
                os.setsid()
                signal.signal(signal.SIGINT, signal.default_int_handler)  # where a shell has it ignored: `chaos.py &`
                logging.getLogger().handlers.clear()  # of imports; a command sets up its own
                file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
                os.dup2(file, 1)
                os.dup2(file, 2)
                os.environ |= {**environment, MARK: self.mark, "TMPDIR": str(self.temporary)}
                import tempfile

                tempfile.tempdir = None  # it is remembered
                leave(main(list(arguments)))
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        self.code: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None: still running."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def wait(self, seconds: float) -> int | None:
        """Waits at most this long."""
        until = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        return self.code

    def kill(self, number: int, seconds: float = 300) -> int:
        """Sends the signal and waits for the end."""
        os.kill(self.pid, number)
        if self.wait(seconds) is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait(60)
            raise TimeoutError(f"still running {seconds:g} s after {signal.Signals(number).name}")
        assert self.code is not None
        return self.code

    def said(self) -> str:
        """The end of what it printed."""
        return self.output.read_text(errors="replace")[-2000:] if self.output.exists() else ""

    def others(self) -> list[psutil.Process]:
        """Processes that it started, directly or not, and that still run."""
        return [process for process in psutil.process_iter() if process.pid != self.pid and self._is_ours(process)]

    def left(self, seconds: float = _SECONDS_FOR_CHILDREN) -> list[psutil.Process]:
        """Those of them that do not end with it: what still runs so much later."""
        until = time.monotonic() + seconds
        while (still := self.others()) and time.monotonic() < until:
            time.sleep(0.05)
        return still

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            return os.getsid(process.pid) == self.pid or process.environ().get(MARK) == self.mark
        except (psutil.Error, OSError):
            return False


@dataclass(frozen=True)
class Subject:
    """A command that is killed."""

    name: str
    module: str
    """Whose `main` it is."""
    words: Callable[[Path], list[str]]
    """Its command line, in this folder."""
    outcome: Callable[[Path], Any]
    """What has to be equal after a series, from what is in the folder."""
    ready: str | None = None
    """What it prints once it serves; None: it ends by itself."""
    codes: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Signal → exit codes, where they are others than `CODES`."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of its own."""
    orphans: bool = False
    """What a kill -9 leaves running goes on by design, and the next start takes it over."""


CODES = {
    signal.SIGINT: (INTERRUPTED,), signal.SIGTERM: (TERMINATED,), signal.SIGUSR2: (TERMINATED,),
    signal.SIGKILL: (-signal.SIGKILL,),
}  # fmt: skip
TRAINS = CODES | dict.fromkeys((signal.SIGTERM, signal.SIGUSR2), (PREEMPTED, TERMINATED))
SERVES = CODES | {number: (0, *CODES[number]) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)}


@dataclass
class Tally:
    """Of one command."""

    kills: dict[str, int] = field(default_factory=dict)
    """Signal → kills."""
    exits: dict[str, int] = field(default_factory=dict)
    """Exit code → after how many of them."""
    went_on: int = 0
    """Series that ended as if never touched."""
    series: int = 0
    left_by_sigkill: int = 0
    """SIGKILLs after which temporary files were left: nothing of the command runs any more that could remove them."""
    wrong: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(self.kills.values())


class Killer:
    """Runs series of one subject after the other, in folders beneath `folder`."""

    def __init__(self, folder: Path, subject: Subject):
        self._folder, self._subject = folder, subject
        self._main = import_module(subject.module).main
        self._expected: Any = None
        self._seconds = 0.0

    def prepare(self) -> None:
        """The command once for what it compiles, and once for how long it takes and what comes of it."""
        for name in ("warm", "reference"):
            place = self._place(name)
            started = time.monotonic()
            self._complete(place)
            self._seconds = time.monotonic() - started
            self._expected = self._subject.outcome(place)

    def series(self, number: int, kills: int, draw: random.Random, tally: Tally) -> None:
        """So many kills in one folder, then the comparison."""
        place = self._place(f"series-{number}")
        tally.series += 1
        try:
            for _ in range(kills):
                self._kill(place, draw.choice(SIGNALS), draw.uniform(0.02, self._seconds), tally)
            self._complete(place)
            if self._subject.outcome(place) == self._expected:
                tally.went_on += 1
            else:
                tally.wrong.append(f"{self._subject.name}: {self._subject.outcome(place)}, not {self._expected}")
        except (AssertionError, TimeoutError) as error:
            tally.wrong.append(f"{self._subject.name}: {error}")
        shutil.rmtree(place, ignore_errors=True)

    def _place(self, name: str) -> Path:
        place = self._folder / self._subject.name / name
        place.mkdir(parents=True)
        return place

    def _start(self, place: Path) -> Process:
        subject = self._subject
        return Process(self._main, subject.words(place), place.with_suffix(".txt"), subject.environment)

    def _kill(self, place: Path, number: signal.Signals, after: float, tally: Tally) -> None:
        process = self._start(place)
        if process.wait(after) is not None:
            assert process.code == 0, f"exit {process.code}: {process.said()}"
            return  # it was done before
        before = process.output.stat().st_size if process.output.exists() else 0
        others = process.others()
        code = process.kill(number, _SECONDS_TO_END)
        tally.kills[number.name] = tally.kills.get(number.name, 0) + 1
        tally.exits[str(code)] = tally.exits.get(str(code), 0) + 1
        for problem in self._problems(process, number, code, before, others):
            tally.wrong.append(f"{self._subject.name}, {number.name} after {after:.2f} s: {problem}")
        left = any(process.temporary.iterdir()) or bool(_shared(process))  # the next start removes it
        tally.left_by_sigkill += number == signal.SIGKILL and left

    def _problems(
        self, process: Process, number: signal.Signals, code: int, before: int, others: list[psutil.Process]
    ) -> Iterator[str]:
        """What a killed start did that it must not do."""
        allowed = (*(self._subject.codes or CODES)[number], 0)  # 0: it was about to end
        if code not in allowed:
            yield f"exit code {code}, not {allowed}: {process.said()}"
        said = process.output.read_bytes()[before:].decode(errors="replace")
        lines = [line for line in said.splitlines() if line.strip()]
        # One that ended well, since it was about to, sums up what it did.
        if "Traceback" in said or "Fatal Python error" in said or (code != 0 and len(lines) > MOST_LINES):
            yield f"it printed {said[-1500:]}"
        if number != signal.SIGKILL and code != 0 and not lines:
            yield "it ended without a word"
        if self._subject.orphans and number == signal.SIGKILL:
            return
        if left := process.left():
            yield f"still running: {[' '.join(each.cmdline()[:6]) for each in left if each.is_running()]}"
        left_files = [path.name for path in process.temporary.iterdir()]
        files = [name for name in left_files if not name.startswith("torchinductor")]  # PyTorch's own cache
        if number != signal.SIGKILL and files:
            yield f"left in its temporary folder: {files}"
        if number != signal.SIGKILL and (shared := _shared(process)):
            yield f"left in /dev/shm: {shared}"

    def _complete(self, place: Path) -> None:
        process = self._start(place)
        if self._subject.ready:
            until = time.monotonic() + 300
            while self._subject.ready not in process.said() and process.poll() is None and time.monotonic() < until:
                time.sleep(0.05)
            assert process.poll() is None, f"exit {process.code}: {process.said()}"
            process.kill(signal.SIGTERM)
        assert process.wait(900) == 0, f"exit {process.code}: {process.said()}"


def _shared(process: Process) -> list[str]:
    """Its files in /dev/shm, by the process in their names; other names are others'."""
    return [name for name in os.listdir("/dev/shm") if f"_{process.pid}_" in name]
