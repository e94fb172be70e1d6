"""Icarus Verilog: where it is, which version, and the commands that judging uses."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from gemma4_tpu.errors import UserError

OLDEST_VERSION = 11
LANGUAGE = "-g2012"
WARNINGS = ("-Wall", "-Winfloop", "-Wno-timescale")  # as the benchmark's own Makefile has them
HOW_TO_INSTALL = (
    "install Icarus Verilog 11 or newer (`sudo apt-get install iverilog`), or give its folder in eval.judge.iverilog"
)


@dataclass(frozen=True, kw_only=True)
class Tools:
    """An installed simulator. The commands take and make files by names relative to the work folder."""

    iverilog: Path
    vvp: Path
    version: str
    """Such as `11.0`."""

    @property
    def name(self) -> str:
        return f"Icarus Verilog {self.version}"

    @property
    def readable(self) -> tuple[Path, ...]:
        """Where the programs and their parts lie: bin/ and lib/ share a folder."""
        return tuple({program.resolve().parent.parent for program in (self.iverilog, self.vvp)})

    def preprocess(self, source: str, output: str) -> list[str]:
        """Expands macros and includes into the file `output`."""
        return [str(self.iverilog), LANGUAGE, "-E", "-o", output, source]

    def check(self, top: str, source: str) -> list[str]:
        """Elaborates without writing anything (never `-o /dev/null`: as root that changes the device)."""
        return [str(self.iverilog), LANGUAGE, "-t", "null", "-s", top, source]

    def build(self, top: str, output: str, sources: list[str]) -> list[str]:
        """Compiles a simulation of the module `top` into the file `output`."""
        return [str(self.iverilog), *WARNINGS, LANGUAGE, "-s", top, "-o", output, *sources]

    def simulate(self, program: str) -> list[str]:
        """`-n`: `$stop` ends the simulation instead of asking."""
        return [str(self.vvp), "-n", program]


def find_tools(folder: str | None) -> Tools:
    """The simulator in `folder`, or on the PATH.

    Raises:
      UserError: it is missing or too old.
    """
    found = {name: shutil.which(name, path=folder) for name in ("iverilog", "vvp")}
    where = f"eval.judge.iverilog={folder}" if folder else "PATH"
    if missing := [name for name, path in found.items() if path is None]:
        raise UserError(f"{' and '.join(missing)} not found ({where}): {HOW_TO_INSTALL}")
    iverilog, vvp = (Path(path).absolute() for path in found.values() if path)
    shown = subprocess.run([iverilog, "-V"], capture_output=True, text=True, timeout=30).stdout
    match = re.search(r"Icarus Verilog version (\d+)\.(\d+)", shown)
    if not match or int(match[1]) < OLDEST_VERSION:
        raise UserError(f"{iverilog} is {shown[:60].strip() or 'no Icarus Verilog'!r}: {HOW_TO_INSTALL}")
    return Tools(iverilog=iverilog, vvp=vvp, version=f"{match[1]}.{match[2]}")
