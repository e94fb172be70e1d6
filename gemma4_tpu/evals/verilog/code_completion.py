"""The code-completion task of verilog-eval v2. A prompt is the description in comments and the module's header."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gemma4_tpu.errors import UserError
from gemma4_tpu.evals.problems import Problem
from gemma4_tpu.evals.verilog.verilog_eval import TOP, VerilogEval

DATASET = "dataset_code-complete-iccad2023"
HEADER_SUFFIX = "_ifc.txt"
INSTRUCTION = (  # quoted from the benchmark's script
    "// Implement the Verilog module based on the following description. Assume that signals are positive clock/clk"
    " triggered unless otherwise stated."
)


class VerilogEvalCompletion:
    """The 156 problems of the task, from a clone of verilog-eval. An answer can be the whole module or its body."""

    def load(self, path: str | Path) -> list[Problem]:
        """The problems in `path`: the clone, or its folder `dataset_code-complete-iccad2023`.

        Raises:
          UserError: there are none, or a file is missing.
        """
        folder = Path(path)
        folder = folder / DATASET if (folder / DATASET).is_dir() else folder
        problems = VerilogEval().load(folder)
        if missing := [p.name for p in problems if not (folder / f"{p.name}{HEADER_SUFFIX}").is_file()]:
            raise UserError(
                f"eval.problems_path={path}: {missing[0]}{HEADER_SUFFIX} is missing; give a folder of the completion"
                f" task ({DATASET})"
            )
        return [
            replace(problem, prompt=commented(problem.prompt), header=_read(folder / f"{problem.name}{HEADER_SUFFIX}"))
            for problem in problems
        ]


def commented(prompt: str) -> str:
    """The prompt as the benchmark's script makes it: the description in comments, then the header unchanged."""
    description, head, ports = prompt.partition(f"module {TOP}")
    lines = [f"// {line}" for line in description.rstrip("\n").split("\n")]
    return "\n".join([INSTRUCTION, *lines, "", f"{head}{ports}".rstrip(), ""])


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8")
