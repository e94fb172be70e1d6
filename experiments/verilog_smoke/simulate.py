"""Icarus Verilog on problems that this package made itself.

The code is trusted, so there is no sandbox here: completions of a model are judged elsewhere.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from experiments.verilog_smoke.design import MODULE_NAME
from gemma4_tpu.errors import UserError

TIMEOUT_SECONDS = 30
_RESULT = re.compile(r"^Mismatches: (\d+) in (\d+) samples$", re.MULTILINE)


def require_iverilog() -> None:
    """Raises: UserError when Icarus Verilog is not installed."""
    if not (shutil.which("iverilog") and shutil.which("vvp")):
        raise UserError("iverilog and vvp are not on PATH: install Icarus Verilog 11 or later (package `iverilog`)")


def passes(design: str, *, reference: str, testbench: str) -> bool:
    """Whether the module text `design` behaves as `reference` does, both defining `TopModule`.

    A design that does not compile, does not end or was compared with nothing does not pass.
    """
    golden = re.sub(rf"\b{MODULE_NAME}\b", "RefModule", reference)
    with tempfile.TemporaryDirectory(prefix="verilog_smoke_") as folder:
        source, program = Path(folder, "all.sv"), Path(folder, "all.vvp")
        source.write_text("\n".join([testbench, golden, design]))
        build = ["iverilog", "-g2012", "-s", "tb", "-o", str(program), str(source)]
        if subprocess.run(build, capture_output=True, timeout=TIMEOUT_SECONDS).returncode != 0:
            return False
        try:
            run = subprocess.run(
                ["vvp", "-n", str(program)], capture_output=True, text=True, timeout=TIMEOUT_SECONDS, cwd=folder
            )
        except subprocess.TimeoutExpired:
            return False
    result = _RESULT.search(run.stdout)
    return result is not None and result[1] == "0" and result[2] != "0" and "TIMEOUT" not in run.stdout


def all_pass(cases: Iterable[tuple[str, str, str]], *, workers: int | None = None) -> list[bool]:
    """`passes` for many (design, reference, testbench) in parallel, in their order."""
    require_iverilog()
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        return list(pool.map(lambda case: passes(case[0], reference=case[1], testbench=case[2]), cases))
