"""Problems in CVDP's format: JSONL of `id`, `input` (`prompt`, `context`), `output` (`context`), `harness` (`files`).

Only rows whose harness is a Verilog test bench can be judged here. CVDP's own code-generation rows test with Python
(cocotb) in the same process as the design; they are skipped and counted.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma4_tpu.errors import UserError
from gemma4_tpu.evals.problems import Problem
from gemma4_tpu.evals.verilog.announcing import announcing_problem
from gemma4_tpu.evals.verilog.scan import defined_modules

log = logging.getLogger(__name__)
VERILOG = (".sv", ".v", ".svh", ".vh")
_TOP = re.compile(r"^\s*TOPLEVEL\s*=\s*(\w+)\s*$", re.MULTILINE)


class Cvdp:
    """The rows of a JSONL file that simulation can judge."""

    def load(self, path: str | Path) -> list[Problem]:
        """The problems in the file `path`.

        Raises:
          UserError: a row has another format, or none has a Verilog test bench.
        """
        try:
            lines = Path(path).read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"eval.problems_path={path}: can't be read ({error}); give a JSONL file") from None
        rows = [(f"{path}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
        problems = [problem for where, line in rows if (problem := _problem(line, where))]
        if not problems:
            raise UserError(
                f"eval.problems_path={path}: none of {len(rows)} rows has a Verilog test bench in harness.files that"
                " instantiates the design; tests in Python (cocotb) do not run here"
            )
        if len(rows) > len(problems):
            log.warning("%s: skipped %d of %d rows without a Verilog test bench (tests in Python don't run here)",
                        path, len(rows) - len(problems), len(rows))  # fmt: skip
        return problems


def _problem(line: str, where: str) -> Problem | None:
    """The problem of a row; None if its harness is not Verilog."""
    match _parsed(line):
        case {"id": str(name), "input": {"prompt": str(prompt), **given}, "harness": {**harness}, **rest}:
            pass
        case _:
            raise UserError(f"{where}: not in CVDP's format (id, input.prompt, harness)")
    files = _texts(harness.get("files", harness))
    context = _texts(given.get("context"))
    output = rest.get("output")
    solution = _verilog(_texts(output.get("context") if isinstance(output, Mapping) else None))
    top = next((match[1] for text in files.values() if (match := _TOP.search(text))), None)
    top = top or next(iter(defined_modules(solution)), None)
    benches = [text for text in _benches(files) if top and re.search(rf"\b{top}\b", text)]
    if not top or not benches:
        return None
    shown = [f"{file}:\n```\n{text}\n```" for file, text in context.items()]
    return announcing_problem(
        name, prompt="\n\n".join([prompt, *shown]), top=top, testbench="\n".join(benches), where=where,
        reference=solution if top in defined_modules(solution) else "",
    )  # fmt: skip


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _texts(files: Any) -> dict[str, str]:
    """Name → text of the files that are texts."""
    return {n: text for n, text in files.items() if isinstance(text, str)} if isinstance(files, Mapping) else {}


def _benches(files: Mapping[str, str]) -> list[str]:
    return [text for name, text in files.items() if name.endswith(VERILOG) and defined_modules(text)]


def _verilog(files: Mapping[str, str]) -> str:
    return "\n".join(text for name, text in files.items() if name.endswith(VERILOG))
