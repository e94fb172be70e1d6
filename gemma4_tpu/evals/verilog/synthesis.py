"""What other installed tools say about a design: lint (verilator), size and equivalence (yosys).

Each runs in the judge's sandbox. None means unknown: the tool can't read the design, gives up, or is not installed.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from gemma4_tpu.evals.verilog.iverilog import Tools
from gemma4_tpu.evals.verilog.running import Finished
from gemma4_tpu.evals.verilog.sandbox import Level, Sandbox
from gemma4_tpu.evals.verilog.verilog_judge import VerilogJudge

YOSYS, VERILATOR = "yosys", "verilator"
DESIGN, REFERENCE, SCRIPT = "design.sv", "reference.sv", "script.ys"
SAT_SECONDS = 10
_CELLS = re.compile(r"^\s*Number of cells:\s+(\d+)", re.MULTILINE)
_TRANSISTORS = re.compile(r"Estimated number of transistors:\s+(\d+)")
_WARNING = re.compile(r"^%Warning-\w+:", re.MULTILINE)

# Without flip-flops, latches and memories, the rest is a function of the inputs, which SAT decides.
_EQUIVALENCE = """
read_verilog -sv {reference}
prep -top {reference_top} -flatten
select -assert-none t:$*ff* t:$*latch* t:$sr t:$mem*
design -stash gold
read_verilog -sv {design}
prep -top {top} -flatten
select -assert-none t:$*ff* t:$*latch* t:$sr t:$mem*
design -stash gate
design -copy-from gold -as gold {reference_top}
design -copy-from gate -as gate {top}
miter -equiv -ignore_gold_x -make_outputs -flatten gold gate miter
sat -verify -prove trigger 0 -set-def-inputs -enable_undef -timeout {seconds} miter
"""


def level_for_yosys(judge: VerilogJudge) -> Level | None:
    """The level for yosys: it looks up its own path in /proc, which bubblewrap's sandbox does not have."""
    if judge.levels[Level.LANDLOCK] is None:
        return Level.LANDLOCK
    return Level.NONE if judge.level is Level.NONE else None


def installed(name: str) -> Path | None:
    """The program, if it is on the PATH."""
    found = shutil.which(name)
    return Path(found).absolute() if found else None


def equivalent(
    tools: Tools, sandbox: Sandbox, folder: Path, yosys: Path, reference: str, reference_top: str, code: str, top: str
) -> bool | None:
    """Whether a combinational design matches the reference for every input, except in bits that the reference leaves
    open.
    """
    script = _EQUIVALENCE.format(
        reference=REFERENCE, design=DESIGN, reference_top=reference_top, top=top, seconds=SAT_SECONDS
    )
    done = _run(sandbox, folder, {REFERENCE: reference, DESIGN: code, SCRIPT: script}, [str(yosys), "-s", SCRIPT])
    if done.returncode == 0:
        return True
    return False if "proof did fail" in done.stdout + done.stderr else None


def size(
    tools: Tools, sandbox: Sandbox, folder: Path, yosys: Path, code: str, top: str
) -> tuple[int, int] | tuple[None, None]:
    """(cells, estimated transistors) of the design in simple gates and flip-flops, without optimisation by ABC."""
    script = f"read_verilog -sv {DESIGN}\nsynth -top {top} -flatten -noabc\nstat -tech cmos\n"
    done = _run(sandbox, folder, {DESIGN: code, SCRIPT: script}, [str(yosys), "-s", SCRIPT])
    cells, transistors = (pattern.findall(done.stdout) for pattern in (_CELLS, _TRANSISTORS))
    if done.returncode or not cells or not transistors:
        return None, None
    return int(cells[-1]), int(transistors[-1])


def lint(tools: Tools, sandbox: Sandbox, folder: Path, verilator: Path, code: str, top: str) -> int | None:
    """Number of warnings of `verilator --lint-only -Wall`, except those about file names."""
    command = [str(verilator), "--lint-only", "-Wall", "-Wno-DECLFILENAME", "-Wno-EOFNEWLINE", "-Wno-fatal"]
    done = _run(sandbox, folder, {DESIGN: code}, [*command, "--top-module", top, DESIGN])
    return len(_WARNING.findall(done.stderr)) if done.returncode == 0 else None


def _run(sandbox: Sandbox, folder: Path, files: dict[str, str], command: Sequence[str]) -> Finished:
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8", errors="replace")
    return sandbox.run(command, folder, writable=[folder])
