"""Icarus Verilog: its location, its version, and the commands that judging uses."""

from __future__ import annotations

import array
import fcntl
import functools
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import termios
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from gemma4_tpu.errors import UserError

OLDEST_VERSION = 11
LANGUAGE = "-g2012"
WARNINGS = ("-Wall", "-Winfloop", "-Wno-timescale")  # as in the benchmark's own Makefile
ASKING_SECONDS = 30.0
_TOP, _OUTPUT = "top_asked_for", "output_asked_for"
_NOT_NEEDED = re.compile(r"^(?:ivlpp:.*|module:.*vhdl\w*\.vpi)\n", re.MULTILINE)
_FOR_VHDL = re.compile(r'^:vpi_module ".*vhdl\w*\.vpi";\n', re.MULTILINE)  # each simulation would load it
HOW_TO_INSTALL = (
    "install Icarus Verilog 11 or newer (`sudo apt-get install iverilog`), or give its folder in eval.judge.iverilog"
)


@dataclass(frozen=True, kw_only=True)
class Tools:
    """An installed simulator. Its commands read and write files named relative to the work folder."""

    iverilog: Path
    vvp: Path
    version: str
    """Such as `11.0`."""
    compiler: Path
    """The program that the driver `iverilog` starts after its preprocessor; it takes a third of the driver's time."""
    compiler_settings: str
    """The settings that the driver passes to it."""

    @property
    def name(self) -> str:
        return f"Icarus Verilog {self.version}"

    @property
    def readable(self) -> tuple[Path, ...]:
        """Folders of the programs and their parts: bin/ and lib/ share a parent."""
        return tuple({program.resolve().parent.parent for program in (self.iverilog, self.vvp)})

    def preprocess(self, source: str, output: str) -> list[str]:
        """Expands macros and includes, into the file `output`."""
        return [str(self.iverilog), LANGUAGE, "-E", "-o", output, source]

    def build(self, top: str, output: str, sources: list[str]) -> list[str]:
        """Compiles a simulation of the module `top` into the file `output`."""
        return [str(self.iverilog), *WARNINGS, LANGUAGE, "-s", top, "-o", output, *sources]

    def settings(self, top: str, output: str) -> str:
        """Settings with which `compiler` does the same as the driver in `build`."""
        return self.compiler_settings.replace(_TOP, top).replace(_OUTPUT, output)

    def compile_and_simulate(self, settings: str, source: str, program: str, mark: str) -> str:
        """A shell line equivalent to `build` and `simulate`, for a source without macros and a file of `settings`.

        After the build, it prints a line `mark` on both outputs.
        """
        compiled = shlex.join([str(self.compiler), f"-C{settings}", "--", source])
        return f"{compiled} && echo {mark} && echo {mark} >&2 && exec {shlex.join(self.simulate(program))}"

    @staticmethod
    def lightened(program: str) -> str:
        """A compiled program without the parts that only VHDL needs."""
        return _FOR_VHDL.sub("", program)

    def simulate(self, program: str) -> list[str]:
        """Simulates a program; with `-n`, `$stop` ends the simulation instead of prompting."""
        return [str(self.vvp), "-n", program]


def find_tools(folder: str | None) -> Tools:
    """Finds the simulator in `folder`, or on the PATH.

    Raises:
      UserError: it is missing or too old.
    """
    found = {name: shutil.which(name, path=folder) for name in ("iverilog", "vvp")}
    where = f"eval.judge.iverilog={folder}" if folder else "PATH"
    if missing := [name for name, path in found.items() if path is None]:
        raise UserError(f"{' and '.join(missing)} not found ({where}): {HOW_TO_INSTALL}")
    iverilog, vvp = (Path(path).absolute() for path in found.values() if path)
    with tempfile.TemporaryDirectory() as folder:  # even this makes it write files there
        said = subprocess.run([iverilog, "-V"], capture_output=True, text=True, timeout=30, env=_writing_to(folder))
    shown = said.stdout
    match = re.search(r"Icarus Verilog version (\d+)\.(\d+)", shown)
    if not match or int(match[1]) < OLDEST_VERSION:
        raise UserError(f"{iverilog} is {shown[:60].strip() or 'no Icarus Verilog'!r}: {HOW_TO_INSTALL}")
    try:
        compiler, settings = _ask_driver(iverilog)
    except (OSError, ValueError) as error:
        raise UserError(f"{iverilog} does not compile ({error}): {HOW_TO_INSTALL}") from None
    return Tools(
        iverilog=iverilog, vvp=vvp, version=f"{match[1]}.{match[2]}", compiler=compiler, compiler_settings=settings
    )


def _writing_to(folder: str) -> dict[str, str]:
    """An environment in which the driver puts its temporary files into `folder`."""
    return {**os.environ, "TMP": folder, "TMPDIR": folder, "TEMP": folder}


@functools.cache
def _ask_driver(iverilog: Path) -> tuple[Path, str]:
    """(compiler that the driver starts, settings that the driver passes to it for the options of `Tools.build`).

    The verbose driver prints the names of both, but removes the settings at the end. So its source is a pipe: once the
    preprocessor reads it, the settings have been written.

    Raises:
      ValueError: the driver does not start a compiler.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "source.sv")
        os.mkfifo(source)
        # Open at both ends: if this process is killed, the reader sees the end of the file, and ends.
        with open(os.open(source, os.O_RDWR), "wb", buffering=0) as pipe:
            pipe.write(b"\n")
            process = subprocess.Popen(
                [iverilog, "-v", *WARNINGS, LANGUAGE, "-s", _TOP, "-o", _OUTPUT, source.name],
                cwd=folder, env=_writing_to(folder),
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
            try:
                _wait_until_read(pipe, process)
                written = {str(file): file.read_text() for file in Path(folder).iterdir() if file.is_file()}
                pipe.close()
                said, _ = process.communicate(timeout=ASKING_SECONDS)
            finally:
                process.kill()
                process.wait()
    started = re.search(r"^translate: .*\|\s*(\S+)(.*)$", said, re.MULTILINE)
    if started is None:
        raise ValueError(said.strip()[:200] or "it does not start a compiler")
    files = re.findall(r'-C"([^"]+)"', started[2])
    settings = [written[file] if file in written else Path(file).read_text() for file in files]
    return Path(started[1]), _NOT_NEEDED.sub("", "".join(f"{part.rstrip()}\n" for part in settings))


def _wait_until_read(pipe: IO[bytes], process: subprocess.Popen[str]) -> None:
    deadline, waiting = time.monotonic() + ASKING_SECONDS, array.array("i", [0])
    while process.poll() is None and time.monotonic() < deadline:
        fcntl.ioctl(pipe, termios.FIONREAD, waiting)
        if waiting[0] == 0:
            return
        time.sleep(0.002)
    raise ValueError("it does not read its source")
