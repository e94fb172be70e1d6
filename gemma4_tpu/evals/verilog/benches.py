"""Simulates benches one after another in a persistent sandbox, in which no design ever runs.

Each starts as a fork of a small shell, because a new sandbox would take as long as the simulation. Only a design's
responses, checked line by line, get in.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from gemma4_tpu.evals.verilog import stand_ins
from gemma4_tpu.evals.verilog.running import OUT_OF_CPU_TIME, Finished, Running
from gemma4_tpu.evals.verilog.sandbox import Sandbox, limit_cpu
from gemma4_tpu.evals.verilog.work_folder import write

_END = re.compile(r"([0-9a-f]{16}) (\d+)\n(?:\d+m[\d.]+s \d+m[\d.]+s\n){2}\Z")  # CPU times: shell, its children
_TIME = re.compile(r"(\d+)m([\d.]+)s")
_LONGEST_END = 200


class Benches:
    """The benches' simulations of one worker and its sandbox."""

    def __init__(self, sandbox: Sandbox, folder: Path):
        """Args:
        sandbox: the sandbox in which the shell starts when first needed.
        folder: an empty folder that belongs to the sandbox.
        """
        self._sandbox, self._folder = sandbox, folder
        self._seen = folder / stand_ins.SEEN
        self._shell: Running | None = None
        self._used_seconds = 0.0

    def simulate(
        self, command: Sequence[str], program: Path, files: Mapping[str, str], cpu_seconds: float | None
    ) -> tuple[str, Finished]:
        """Simulates a bench; returns what it wrote to `SEEN`, the only file that it may write, and its output.

        Args:
          command: simulates the program, by its name.
          program: the compiled bench.
          files: the files that it reads.
          cpu_seconds: as for `Sandbox.run`.
        """
        if self._shell is None or self._shell.ended:
            self._start()
        for left in self._folder.iterdir():
            if left != self._seen:
                left.unlink()
        os.link(program, self._folder / program.name)
        write(self._folder, files)
        with self._seen.open("r+b") as seen:  # read through this handle, since the name could point elsewhere by then
            seen.truncate()
            done = self._run(command, self._sandbox.seconds(cpu_seconds))
            return seen.read().decode("ascii", "replace"), done

    def close(self) -> None:
        """Ends the shell."""
        if self._shell is not None:
            self._shell.end(None)
            self._shell = None

    def _start(self) -> None:
        self.close()
        self._seen.touch()
        self._sandbox.adopt(self._seen)
        self._shell = self._sandbox.start("exec /bin/sh", self._folder, [self._seen], stays=True)
        self._used_seconds = 0.0

    def _run(self, command: Sequence[str], limit_seconds: float) -> Finished:
        shell, mark = self._shell, secrets.token_hex(8)
        assert shell is not None and shell.process.stdin is not None
        line = f"({limit_cpu(limit_seconds)} && exec {shlex.join(command)}) </dev/null"
        with contextlib.suppress(BrokenPipeError):  # it has ended, which is noticed below
            shell.process.stdin.write(f"{line}; echo {mark} $?; times; echo {mark} >&2\n".encode())
            shell.process.stdin.flush()
        end_of_errors = f"{mark}\n".encode()

        def end(stdout: str) -> re.Match[str] | None:
            told = _END.search(stdout)
            return told if told and told[1] == mark else None

        def complete(stdout: bytearray, stderr: bytearray) -> bool:
            if not stderr.endswith(end_of_errors):
                return False
            return end(stdout[-_LONGEST_END:].decode("ascii", "replace")) is not None

        stopped = shell.collect(limit_seconds, complete)
        stdout, stderr = shell.take()
        told = end(stdout)
        if stopped or told is None:
            self._shell, done = None, shell.end(stopped)
            used_seconds = max(0.0, done.cpu_seconds - self._used_seconds)
            return replace(done, stdout=stdout, stderr=stderr, cpu_seconds=used_seconds)
        used_seconds = sum(60 * int(minutes) + float(seconds) for minutes, seconds in _TIME.findall(told[0]))
        before, self._used_seconds = self._used_seconds, used_seconds
        return Finished(
            returncode=int(told[2]),
            stdout=stdout[: told.start()],
            stderr=stderr.removesuffix(f"{mark}\n"),
            cpu_seconds=max(0.0, used_seconds - before),
            stopped="cpu" if int(told[2]) in OUT_OF_CPU_TIME else None,
        )
