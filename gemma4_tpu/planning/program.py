"""What a plan reads from a compiled program, and how to get most of it after a tenth of the compilation.

Within seconds, the compiler optimises a program, assigns memory and refuses what does not fit; in the following minutes
it generates code, and estimates how long every instruction takes. With `DUMP_TO` it writes out what it has assigned, so
that a plan can answer early.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from gemma4_tpu.errors import UserError

DUMP_TO = "xla_dump_to"
TEXT, ASSIGNED, USED = (
    "*after_optimizations_after_buffer_assignment.txt",
    "*after_optimizations-buffer-assignment.txt",
    "*after_optimizations-memory-usage-report.txt",
)
"""Files of a dump: the optimised program, every allocation, and their sum per kind of memory."""
SCHEDULED = "*after_codegen.txt"
"""The program after code generation: the same instructions, with expected cycles."""
SECONDS_BETWEEN_LOOKS = 0.1


class OutOfMemory(Exception):
    """The program does not fit into a chip's HBM."""

    def __init__(self, message: str):
        super().__init__(message)
        on_chip = "vmem" in message.partition("\n")[0]  # a kernel asks for too much on-chip memory
        needed, limit = (None, None) if on_chip else (_SIZES.search(message), _LIMIT.search(message))
        self.needed_bytes = _bytes(needed) if needed else None
        """What the compiler says that it would need; None if it does not say."""
        self.limit_bytes = _bytes(limit) if limit else None


_NUMBER = r"(\d+(?:\.\d+)?)([KMGT]?)i?B?"
_SIZES = re.compile(rf"(?:memory required for .*?\(|Used ){_NUMBER}")
_LIMIT = re.compile(rf"(?:available HBM \(| of ){_NUMBER}")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _bytes(found: re.Match[str]) -> int:
    return int(float(found[1]) * _UNITS[found[2]])


@dataclass(frozen=True)
class Program:
    """An optimised program of one chip."""

    text: str
    """HLO, as `compiled.as_text()` prints it; after code generation with the compiler's cycles."""
    argument_bytes: int
    """In HBM, including layout padding."""
    peak_bytes: int
    """HBM that the program takes with its arguments: what the compiler compares with the chip's limit."""
    cost_analysis: dict[str, float]
    """XLA's own `flops` and `bytes_accessed`, with loops counted once and kernels not at all; empty before code
    generation.
    """


class UnderWay:
    """A compilation in a thread, whose memory assignment is available long before its end. End the process to
    stop it.
    """

    def __init__(self, lowered: Any, folder: Path):
        """`lowered`: from `jax.jit`; `folder`: empty; receives about 30 MB of files."""
        self._folder = folder
        self._outcome: list[Any] = []
        self._thread = threading.Thread(target=self._compile, args=(lowered,), daemon=True)
        self._thread.start()

    def _compile(self, lowered: Any) -> None:
        try:
            self._outcome.append(compile_lowered(lowered, {DUMP_TO: str(self._folder)}))
        except Exception as error:
            self._outcome.append(error)

    def until_assigned(self, limit_bytes: int) -> Program:
        """The program with its memory assigned. If the compiler writes no known files, this is `finish`.

        Args:
          limit_bytes: HBM of a chip; a program that takes more is left to the compiler's own judgement.

        Raises:
          OutOfMemory: see `finish`.
          UserError: see `finish`.
        """
        before = None
        while self._thread.is_alive():
            program = dumped(self._folder)
            if program is not None and program.peak_bytes <= limit_bytes and program == before:
                return program
            before = program
            self._thread.join(SECONDS_BETWEEN_LOOKS)
        return self.finish()

    def finish(self) -> Program:
        """The program after code generation.

        Raises:
          OutOfMemory: it does not fit.
          UserError: a compiler option does not exist.
        """
        self._thread.join()
        (outcome,) = self._outcome
        if isinstance(outcome, Exception):
            raise outcome
        return _finished(outcome, self._folder)


def finish(lowered: Any, folder: Path) -> Program:
    """Compiles to the end; see `UnderWay`."""
    return UnderWay(lowered, folder).finish()


def until_assigned(lowered: Any, folder: Path, limit_bytes: int) -> Program:
    """Compiles until memory is assigned; see `UnderWay.until_assigned`."""
    return UnderWay(lowered, folder).until_assigned(limit_bytes)


def compile_lowered(lowered: Any, options: dict[str, Any] | None = None) -> Any:
    """`lowered.compile`, with the compiler's refusals as our own exceptions.

    Raises:
      OutOfMemory: see `finish`.
      UserError: see `finish`.
    """
    try:
        return lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        if "RESOURCE_EXHAUSTED" in message:
            raise OutOfMemory(message) from error
        if unknown := re.search(r"No such compile option: '([^']*)'", message):
            raise UserError(
                f"hardware.compiler_options: the compiler has no option {unknown[1]!r}; check its spelling"
            ) from None
        raise


def peak_bytes(compiled: Any) -> int:
    """HBM of one chip that a compiled program takes with its arguments.

    Close to `Program.peak_bytes`, but without fragmentation and including on-chip memory (128 MiB at most).
    """
    told = compiled.memory_analysis()
    sizes = told.argument_size_in_bytes + told.temp_size_in_bytes + told.output_size_in_bytes
    return told.peak_memory_in_bytes or sizes - told.alias_size_in_bytes  # not every compiler reports the peak


def _finished(compiled: Any, folder: Path) -> Program:
    raw = compiled.cost_analysis()
    program = dumped(folder) or Program(
        compiled.as_text(), compiled.memory_analysis().argument_size_in_bytes, peak_bytes(compiled), {}
    )
    scheduled = sorted(folder.glob(SCHEDULED))
    return replace(
        program,
        text=scheduled[0].read_text(encoding="utf-8", errors="replace") if len(scheduled) == 1 else compiled.as_text(),
        cost_analysis={"flops": raw["flops"], "bytes_accessed": raw["bytes accessed"]},
    )


def dumped(folder: Path) -> Program | None:
    """The program that a compilation dumped into a folder; None until it is complete, as far as can be seen."""
    found = [sorted(folder.glob(pattern)) for pattern in (TEXT, ASSIGNED, USED)]
    if not all(len(paths) == 1 for paths in found):
        return None
    text, assigned, used = (paths[0].read_text(encoding="utf-8", errors="replace") for paths in found)
    peak = used_bytes(used)
    if peak is None or not assigned.rstrip() or "\nENTRY " not in text or not text.rstrip().endswith("\n}"):
        return None
    arguments = re.findall(r"^allocation \d+: size (\d+), parameter ", assigned, re.MULTILINE)
    return Program(text, sum(int(size) for size in arguments), peak, {})


def used_bytes(report: str) -> int | None:
    """HBM in a memory usage report; None if it does not say."""
    found = re.search(r"Memory Space: default \(color=0\)\s+Total bytes: (\d+)", report)
    return int(found[1]) if found else None
