"""Runs one hostile command at a time: confined, limited, and with nothing of it left when it ends.

A `Sandbox` belongs to one single-threaded worker process. Levels, from the strictest:

- `bubblewrap`: own namespaces (files, processes, network), only the simulator's files and the work folder are there;
- `landlock`: the kernel refuses all other files (and, by its version, TCP, signals to others);
- `none`: limits on resources alone; files can be read and written.

All of them: own session, no input, cleared environment, limits on CPU time, memory, file size, processes and output,
another user where the worker is root, and every process that is left is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import math
import os
import resource
import selectors
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import psutil

from gemma4_tpu.config.tasks import JudgeConfig
from gemma4_tpu.evals.verilog import landlock

SYSTEM_PATHS = tuple(Path(p) for p in ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache"))
DEVICES = (Path("/dev/null"),)
FIRST_UID, UIDS = 60706, 478  # a range that neither distributions nor systemd give to anyone
OTHERS_HEADROOM = 4096  # the kernel counts all processes of an ordinary user: room for what else they start meanwhile
PATIENCE = 10  # half milliseconds that killed processes get before those of other groups are looked for
WALL_FACTOR, WALL_EXTRA_SECONDS = 6, 10  # on a busy machine CPU time is what counts; this ends what only sleeps

_OUT_OF_CPU_TIME = (-signal.SIGXCPU, 128 + signal.SIGXCPU)  # the command itself, or one that it waited for
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_libc = ctypes.CDLL(None, use_errno=True)


class Level(StrEnum):
    """How far a command is isolated."""

    BUBBLEWRAP = "bubblewrap"
    LANDLOCK = "landlock"
    NONE = "none"


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


@dataclass(kw_only=True)
class Sandbox:
    """How commands run in one worker.

    `readable` are further paths that commands may read and execute.
    """

    level: Level
    config: JudgeConfig
    readable: tuple[Path, ...] = ()
    uid: int | None = field(init=False)
    max_processes: int = field(init=False)

    def __post_init__(self):
        # Workers under root use different users, so that none of them counts or reaches another's processes.
        self.uid = FIRST_UID + os.getpid() % UIDS if os.getuid() == 0 else None
        others = 0 if self.uid is not None else _own_threads() + OTHERS_HEADROOM
        self.max_processes = self.config.processes + others
        # Grandchildren whose parent dies become children of this process, which ends them.
        if _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")

    def adopt(self, *paths: Path) -> None:
        """Gives files to the user that commands run as."""
        if self.uid is not None:
            for path in paths:
                os.chown(path, self.uid, self.uid)

    def run(
        self, command: Sequence[str], folder: Path, *, writable: Sequence[Path] = (), cpu_seconds: float | None = None
    ) -> Finished:
        """Runs `command` in `folder`, which it may read; it may write only beneath `writable`.

        `cpu_seconds` is a limit on CPU time below that of the configuration.
        """
        limit_seconds = min(self.config.cpu_seconds, cpu_seconds or self.config.cpu_seconds)
        ruleset = None
        if self.level is Level.BUBBLEWRAP:
            command = [*self._bubblewrap(folder, writable), *command]
        elif self.level is Level.LANDLOCK:
            readable = (*SYSTEM_PATHS, *self.readable, folder)
            ruleset = landlock.make_ruleset(readable, (*DEVICES, *writable))
        try:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env={"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TMP": str(folder), "TMPDIR": str(folder)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                user=self.uid,
                group=self.uid,
                extra_groups=None if self.uid is None else [],
                preexec_fn=functools.partial(_confine, self._limits(limit_seconds), ruleset),
            )
        finally:
            if ruleset is not None:
                os.close(ruleset)
        return self._supervise(process, limit_seconds)

    def _bubblewrap(self, folder: Path, writable: Sequence[Path]) -> list[str]:
        arguments = [*self._system, "--ro-bind", str(folder), str(folder)]
        for path in writable:
            arguments += ["--bind", str(path), str(path)]
        # What bubblewrap makes lies in memory, without a limit: nothing may write there.
        return [*arguments, "--remount-ro", "/", "--chdir", str(folder), "--"]

    @functools.cached_property
    def _system(self) -> list[str]:
        """What bubblewrap is told about everything but the work folder. Each mount takes time, so none is doubled."""
        program = shutil.which("bwrap")
        if program is None:
            raise FileNotFoundError("bwrap is not on the PATH")
        arguments = [program, "--unshare-all", "--die-with-parent", "--new-session"]
        for device in DEVICES:
            arguments += ["--dev-bind", str(device), str(device)]
        seen: list[Path] = []
        for path in (*SYSTEM_PATHS, *self.readable):
            if path.is_symlink():
                arguments += ["--symlink", str(path.readlink()), str(path)]
            elif path.exists() and not any(path.is_relative_to(parent) for parent in seen):
                arguments += ["--ro-bind", str(path), str(path)]
                seen.append(path)
        return arguments

    def _limits(self, limit_seconds: float) -> list[tuple[int, int]]:
        return [
            (resource.RLIMIT_CPU, math.ceil(limit_seconds)),
            (resource.RLIMIT_AS, self.config.memory_mib << 20),
            (resource.RLIMIT_FSIZE, self.config.file_mib << 20),
            (resource.RLIMIT_NPROC, self.max_processes),
            (resource.RLIMIT_NOFILE, 64),
            (resource.RLIMIT_CORE, 0),
        ]

    def _supervise(self, process: subprocess.Popen[bytes], limit_seconds: float) -> Finished:
        """Collects output until the command ends or has to be stopped; then nothing of it runs any more."""
        cap_bytes = self.config.output_kib << 10
        deadline = time.monotonic() + WALL_FACTOR * limit_seconds + WALL_EXTRA_SECONDS
        assert process.stdout is not None and process.stderr is not None
        pipes = {process.stdout: bytearray(), process.stderr: bytearray()}
        stopped = None
        ended = os.pidfd_open(process.pid)
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(ended, selectors.EVENT_READ)
                for pipe in pipes:
                    os.set_blocking(pipe.fileno(), False)
                    selector.register(pipe, selectors.EVENT_READ)
                over = False
                while not over and stopped is None:
                    ready = selector.select(max(0.0, deadline - time.monotonic()))
                    for key, _ in ready:
                        over |= key.fileobj == ended
                        if key.fileobj in pipes and not _drain(key.fileobj, pipes[key.fileobj], cap_bytes):
                            selector.unregister(key.fileobj)
                    if any(len(text) > cap_bytes for text in pipes.values()):
                        stopped = "output"
                    elif not ready:
                        stopped = "wall"
        finally:
            os.close(ended)
            returncode, cpu_seconds = _end_all(process)
            for pipe, text in pipes.items():
                _drain(pipe, text, cap_bytes)
                pipe.close()
        if stopped is None and any(len(text) > cap_bytes for text in pipes.values()):
            stopped = "output"
        if stopped is None and returncode in _OUT_OF_CPU_TIME:
            stopped = "cpu"
        stdout, stderr = (text[:cap_bytes].decode("utf-8", "replace") for text in pipes.values())
        return Finished(returncode=returncode, stdout=stdout, stderr=stderr, cpu_seconds=cpu_seconds, stopped=stopped)


def _confine(limits: list[tuple[int, int]], ruleset: int | None) -> None:
    """Between fork and exec of the command: it dies with its worker, its resources and its files are limited."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    for kind, limit in limits:
        hard = limit + 1 if kind == resource.RLIMIT_CPU else limit  # the soft limit signals, the hard one kills
        resource.setrlimit(kind, (limit, hard))
    if ruleset is not None:
        landlock.restrict_self(ruleset)


def _own_threads() -> int:
    """How many threads this user runs: what the kernel holds against the limit on processes."""
    mine = os.getuid()
    found = [process.info for process in psutil.process_iter(["uids", "num_threads"])]
    return sum(info["num_threads"] or 1 for info in found if info["uids"] and info["uids"].real == mine)


def _drain(pipe, text: bytearray, cap_bytes: int) -> bool:
    """Moves what the pipe holds to `text`, little more than the cap; false at the end of file."""
    while len(text) <= cap_bytes:
        try:
            chunk = os.read(pipe.fileno(), 1 << 16)
        except BlockingIOError:
            return True
        if not chunk:
            return False
        text += chunk
    return True


def _end_all(process: subprocess.Popen[bytes]) -> tuple[int, float]:
    """Kills the command's group and whatever became of its children: (return code, CPU seconds of all)."""
    cpu_seconds = 0.0
    for attempt in itertools.count():
        try:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
            while pid:
                cpu_seconds += usage.ru_utime + usage.ru_stime
                if pid == process.pid:
                    process.returncode = os.waitstatus_to_exitcode(status)
                pid, status, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return process.returncode, cpu_seconds
        if attempt == 0:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        elif attempt >= PATIENCE:  # they left the group
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        time.sleep(0.0005)
    raise AssertionError("unreachable")
