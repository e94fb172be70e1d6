"""Kills a command at any moment, and looks at what it leaves: exit code, words, processes, files; how it goes on.

`chaos.py` runs it. A `Killed` is a command with the folder it works in; a series kills one start after the other
there, then leaves the last one alone and compares the result with that of a start that was never touched.
"""

from __future__ import annotations

import logging
import os
import random
import re
import shutil
import signal
import sys
import tempfile
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
_PROGRESS = re.compile(r"\d\d:\d\d:\d\d (?!ERROR|CRITICAL)")
"""Log lines on stderr; a line that is neither one of these nor a message should not have been printed."""
_MESSAGE = re.compile(
    r"(error: |interrupted(;|$)|ended without unwinding$"
    r"|(\d\d:\d\d:\d\d WARNING: )?SIGTERM before the first update:"  # also before there is a log
    r"|\d\d:\d\d:\d\d (WARNING: preempted and saved at update|SIG\w+: |stopped:))"
)
"""How a stopped command says so: exactly one of them."""
MARK = "GEMMA4_CHAOS"
_SECONDS_TO_END, _SECONDS_FOR_CHILDREN = 120, 15


class Process:
    """A command in a forked child: its own session, stdout and stderr in files, temporary files in a folder."""

    def __init__(
        self, main: Callable[[list[str]], int], arguments: Sequence[str], output: Path,
        environment: Mapping[str, str] = MappingProxyType({}),
    ):  # fmt: skip
        self.output, self.errors = output, output.with_suffix(".err")
        self.temporary = Path(tempfile.mkdtemp(prefix=f"{output.stem}-", suffix=".tmp", dir=output.parent))
        # of this start alone: a job that an earlier one left running, as sweeps do, keeps its own
        for file in (self.output, self.errors):
            file.write_bytes(b"")  # what an earlier start said is not this one's
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
                for stream, file in ((1, self.output), (2, self.errors)):
                    os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), stream)
                os.environ |= {**environment, MARK: self.mark, "TMPDIR": str(self.temporary)}
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
        self.printed, self.told = "", 0
        """What was on stdout, and characters on stderr, when it was killed."""
        self.pids = {self.pid}
        """Its own and, when it was killed, those of its children."""

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
        self.pids |= {process.pid for process in self.others()}
        self.printed, self.told = _text(self.output), _text(self.errors).rfind("\n") + 1
        os.kill(self.pid, number)
        if self.wait(seconds) is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait(60)
            raise TimeoutError(f"still running {seconds:g} s after {signal.Signals(number).name}")
        assert self.code is not None
        return self.code

    def said(self) -> str:
        """The end of what it printed."""
        return f"{_text(self.output)[-2000:]}{_text(self.errors)[-2000:]}"

    def said_since(self) -> list[str]:
        """Lines on stderr after it was killed."""
        return [line for line in _text(self.errors)[self.told :].splitlines() if line.strip()]

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
class Killed:
    """A command that is killed."""

    name: str
    module: str
    """Whose `main` it is."""
    words: Callable[[Path], list[str]]
    """Its command line, in this folder."""
    outcome: Callable[[Path], Any]
    """What has to be equal after a series, from what is in the folder."""
    ready: str | None = None
    """What it prints once it serves, and from when on it exits with 0; None: it ends by itself."""
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


@dataclass
class KillTally:
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

    def __init__(self, folder: Path, subject: Killed):
        self._folder, self._subject = folder, subject
        self._main = import_module(subject.module).main
        self._expected: Any = None
        self._seconds = 0.0

    def prepare(self) -> None:
        """The command once for what it compiles, and once for how long it takes and what it leaves."""
        for name in ("warm", "reference"):
            place = self._place(name)
            started = time.monotonic()
            self._complete(place)
            self._seconds = time.monotonic() - started
            self._expected = self._subject.outcome(place)

    def series(self, number: int, kills: int, draw: random.Random, tally: KillTally) -> None:
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

    def _kill(self, place: Path, number: signal.Signals, after: float, tally: KillTally) -> None:
        subject, process = self._subject, self._start(place)
        if process.wait(after) is not None:
            assert process.code == 0, f"exit {process.code}: {process.said()}"
            return  # it was done before
        code = process.kill(number, _SECONDS_TO_END)
        tally.kills[number.name] = tally.kills.get(number.name, 0) + 1
        tally.exits[str(code)] = tally.exits.get(str(code), 0) + 1
        codes = (subject.codes or CODES)[number]
        if subject.ready and subject.ready in process.printed and number != signal.SIGKILL:
            codes = (0,)
        for problem in problems(process, number, codes, lambda: self._is_complete(process, place), subject):
            tally.wrong.append(f"{subject.name}, {number.name} after {after:.2f} s: {problem}")
        tally.left_by_sigkill += number == signal.SIGKILL and has_left_files(process)

    def _is_complete(self, process: Process, place: Path) -> bool:
        """Whether it may end with 0: a server was ready, another command left what an untouched start leaves."""
        if self._subject.ready:
            return self._subject.ready in _text(process.output)
        return bool(self._subject.outcome(place) == self._expected)

    def _complete(self, place: Path) -> None:
        process = self._start(place)
        if self._subject.ready:
            until = time.monotonic() + 300
            while (
                self._subject.ready not in _text(process.output) and process.poll() is None and time.monotonic() < until
            ):
                time.sleep(0.05)
            assert process.poll() is None, f"exit {process.code}: {process.said()}"
            process.kill(signal.SIGTERM)
        assert process.wait(900) == 0, f"exit {process.code}: {process.said()}"


def problems(
    process: Process,
    number: signal.Signals,
    codes: tuple[int, ...],
    complete: Callable[[], bool],
    subject: Killed | None = None,
) -> Iterator[str]:
    """What a killed start did that no command may do.

    Args:
      process: it has ended.
      number: what it was sent.
      codes: exit codes that are documented for that.
      complete: whether nothing was left to do: only then it may also exit with 0.
      subject: what it is; None: a command that ends by itself and leaves nothing running.
    """
    code, asked, serves = process.code, number != signal.SIGKILL, bool(subject and subject.ready)
    if code == 0 and not _holds(complete):
        yield f"exit code 0, but it is not complete: {process.said()}"
    elif code not in (*codes, 0):
        yield f"exit code {code}, not {codes}: {process.said()}"
    said = process.said_since()
    messages = [line for line in said if _MESSAGE.match(line)]
    wanted = int(asked and (code != 0 or serves))
    if len(messages) != wanted:
        yield f"{len(messages)} messages, not {wanted}: {said[-20:]}"
    if others := [line for line in said if not _MESSAGE.match(line) and not _PROGRESS.match(line)]:
        yield f"it also printed {others[-20:]}"
    if found := [word for word in ("Traceback", "Fatal Python error") if word in _text(process.output)]:
        yield f"on stdout: {found}"
    if subject and subject.orphans and not asked:
        return
    if left := process.left():
        yield f"still running: {[' '.join(each.cmdline()[:6]) for each in left if each.is_running()]}"
    if asked and (files := _temporary(process)):
        yield f"left in its temporary folder: {files}"
    if asked and (shared := _shared(process)):
        yield f"left in /dev/shm: {shared}"


def has_left_files(process: Process) -> bool:
    """Whether temporary files are left, as after SIGKILL; the next start removes them."""
    return bool(_temporary(process) or _shared(process))


def _holds(complete: Callable[[], bool]) -> bool:
    try:
        return complete()
    except (OSError, ValueError, KeyError):  # what it should have left is missing or cut short
        return False


def _text(file: Path) -> str:
    return file.read_text(errors="replace") if file.exists() else ""


def _temporary(process: Process) -> list[str]:
    names = [path.name for path in process.temporary.iterdir()]
    return [name for name in names if not name.startswith("torchinductor")]  # PyTorch's own cache


def _shared(process: Process) -> list[str]:
    """Files in /dev/shm with the id of the process, or of a child, in their names; other names are others'."""
    return [name for name in os.listdir("/dev/shm") if process.pids & set(map(int, re.findall(r"\d+", name)))]
