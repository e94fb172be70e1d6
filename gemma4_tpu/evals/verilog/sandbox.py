"""Runs hostile commands one after another, confined and limited; a command leaves nothing behind (`running.py`).

A `Sandbox` belongs to one single-threaded worker process. Levels, strictest first:

- `bubblewrap`: separate namespaces (files, processes, network) with only the simulator's files and the work folder;
- `landlock`: the kernel refuses access to other files (and, depending on its version, TCP and signals to others);
- `none`: resource limits alone; files can be read and written.

All levels: a separate session, no input, a cleared environment, limits on CPU time, memory, file size, processes and
output, another user if the worker is root, and every remaining process is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import psutil

from gemma4_tpu.config.tasks import JudgeConfig
from gemma4_tpu.evals.verilog import landlock
from gemma4_tpu.evals.verilog.running import Finished, Running

SYSTEM_PATHS = tuple(Path(p) for p in ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache"))
DEVICES = (Path("/dev/null"),)
FIRST_UID, UIDS = 60706, 478  # a range that neither distributions nor systemd assign
OTHERS_HEADROOM = 4096  # the kernel counts all processes of an ordinary user: allowance for others started meanwhile

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)  # see pool.py
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_libc = ctypes.CDLL(None, use_errno=True)


class Level(StrEnum):
    """Level of a command's isolation."""

    BUBBLEWRAP = "bubblewrap"
    LANDLOCK = "landlock"
    NONE = "none"


@dataclass(kw_only=True)
class Sandbox:
    """Runs commands in one worker.

    `readable`: further paths that commands may read and execute.
    """

    level: Level
    config: JudgeConfig
    readable: tuple[Path, ...] = ()
    uid: int | None = field(init=False)
    max_processes: int = field(init=False)

    def __post_init__(self):
        # Workers under root use different users, so that none counts or reaches another's processes.
        self.uid = FIRST_UID + os.getpid() % UIDS if os.getuid() == 0 else None
        others = 0 if self.uid is not None else _own_threads() + OTHERS_HEADROOM
        self.max_processes = self.config.processes + others
        # Orphaned grandchildren become children of this process, which ends them.
        if _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")

    def adopt(self, *paths: Path) -> None:
        """Changes the owner of files to the user that runs commands."""
        if self.uid is not None:
            for path in paths:
                os.chown(path, self.uid, self.uid)

    def run(
        self,
        command: Sequence[str] | str,
        folder: Path,
        *,
        writable: Sequence[Path] = (),
        cpu_seconds: float | None = None,
    ) -> Finished:
        """Runs `command` in `folder`, which it may read; it may write only below `writable`.

        `command` is a list of words or a shell line. `cpu_seconds` is a limit below that of the configuration.
        """
        limit_seconds = self.seconds(cpu_seconds)
        line = command if isinstance(command, str) else f"exec {shlex.join(command)}"
        running = self.start(f"{limit_cpu(limit_seconds)} && {line}", folder, writable)
        stopped = None
        try:
            stopped = running.collect(limit_seconds)
        finally:
            done = running.end(stopped)
        return done

    def seconds(self, cpu_seconds: float | None) -> float:
        """The limit on CPU time of a command with `cpu_seconds`."""
        return min(self.config.cpu_seconds, cpu_seconds or self.config.cpu_seconds)

    def start(self, line: str, folder: Path, writable: Sequence[Path], *, stays: bool = False) -> Running:
        """Starts a shell with a line. Like `run`, but without a limit on CPU time; the caller ends it.

        If it `stays`, it has an input, and other commands can run meanwhile.
        """
        words = ["/bin/sh", "-c", f"{self._limits()} && {line}"]
        ruleset, confine = None, None
        if self.level is Level.BUBBLEWRAP:
            words = [*self._bubblewrap(folder, writable), *words]
        else:
            if self.level is Level.LANDLOCK:
                readable = (*SYSTEM_PATHS, *self.readable, folder)
                ruleset = landlock.make_ruleset(readable, (*DEVICES, *writable))
            confine = functools.partial(_confine, ruleset)
        try:
            with _acting_as(self.uid):
                process = subprocess.Popen(
                    words,
                    cwd=folder,
                    env={"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TMP": str(folder), "TMPDIR": str(folder)},
                    stdin=subprocess.PIPE if stays else subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    start_new_session=True,
                    preexec_fn=confine,
                )
        finally:
            if ruleset is not None:
                os.close(ruleset)
        return Running(process, self.config.output_kib << 10, stays=stays)

    def _bubblewrap(self, folder: Path, writable: Sequence[Path]) -> list[str]:
        arguments = [*self._system, "--ro-bind", str(folder), str(folder)]
        for path in writable:
            arguments += ["--bind", str(path), str(path)]
        # bubblewrap's own file system is in memory, without a limit: nothing may write to it.
        return [*arguments, "--remount-ro", "/", "--chdir", str(folder), "--"]

    @functools.cached_property
    def _system(self) -> list[str]:
        """Arguments of bubblewrap for all except the work folder. Each mount takes time, so there are no duplicates."""
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

    def _limits(self) -> str:
        """Limits for a shell and everything it starts. bash's -u is -p elsewhere."""
        processes = self.max_processes
        return (
            f"ulimit -c 0 && ulimit -n 64 && ulimit -v {self.config.memory_mib << 10} && ulimit -f"
            f" {self.config.file_mib << 11} && {{ ulimit -u {processes} 2>/dev/null || ulimit -p {processes}; }}"
        )


def limit_cpu(limit_seconds: float) -> str:
    """A CPU limit for a shell that then becomes a command. The soft limit signals, the hard limit kills."""
    seconds = math.ceil(limit_seconds)
    return f"ulimit -S -t {seconds} && ulimit -H -t {seconds + 1}"


@contextlib.contextmanager
def _acting_as(uid: int | None) -> Iterator[None]:
    """Processes that root starts meanwhile belong to this user permanently; None: no change.

    `Popen(user=…)` does the same, but forks the whole worker, which takes longer than bubblewrap itself.
    """
    if uid is None:
        yield
        return
    signals = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)  # cleaning up requires root
    groups, gids = os.getgroups(), os.getresgid()
    try:
        os.setgroups([])
        os.setresgid(uid, uid, gids[2])
        os.setresuid(uid, uid, 0)
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(*gids)
        os.setgroups(groups)
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)


def _confine(ruleset: int | None) -> None:
    """Confines a command between fork and exec, as bubblewrap does: it dies with its worker; its files are limited."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if ruleset is not None:
        landlock.restrict_self(ruleset)


def _own_threads() -> int:
    """The number of threads of this user, which the kernel counts towards the limit on processes."""
    mine = os.getuid()
    found = [process.info for process in psutil.process_iter(["uids", "num_threads"])]
    return sum(info["num_threads"] or 1 for info in found if info["uids"] and info["uids"].real == mine)
