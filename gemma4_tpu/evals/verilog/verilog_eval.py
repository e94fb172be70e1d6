"""The specification-to-RTL task of verilog-eval v2: a folder of `ProbNNN_name_{prompt.txt,ref.sv,test.sv}`."""

from __future__ import annotations

import re
from pathlib import Path

from gemma4_tpu.errors import UserError
from gemma4_tpu.evals.problems import Problem

TOP, REFERENCE_TOP, BENCH_TOP = "TopModule", "RefModule", "tb"
RESULT_MARKER = "Mismatches"
RESULT_PATTERN = r"{marker}: (?P<errors>\d+) in (?P<samples>\d+) samples"
SUFFIXES = ("_prompt.txt", "_ref.sv", "_test.sv")
DATASET = "dataset_spec-to-rtl"

_OFFICIAL_RESULT = re.compile(r"^Mismatches: (\d+) in \d+ samples$")
_OFFICIAL_REFUSALS = (  # the official analysis fails if a line contains any of these
    "syntax error",
    "warning: always_comb process has no sensitivities",
    "found no sensitivities so it will never trigger",
    "is declared here as wire",
    "Unknown module type",
    "TIMEOUT",
)


def official_rule(log: str) -> bool:
    """The rule of the benchmark's own script: a line with 0 mismatches, and no line that looks like an error."""
    passed = False
    for line in log.split("\n"):
        if "error" in line or "Unable to bind wire/reg" in line or any(word in line for word in _OFFICIAL_REFUSALS):
            return False
        match = _OFFICIAL_RESULT.match(line)
        passed |= match is not None and int(match[1]) == 0
    return passed


def make_problem(name: str, *, prompt: str, reference: str, testbench: str) -> Problem:
    """Makes a problem in this benchmark's style: the bench compares `TopModule` with `RefModule`."""
    return Problem(
        name=name,
        prompt=prompt,
        reference=reference,
        testbench=testbench,
        top=TOP,
        reference_top=REFERENCE_TOP,
        bench_top=BENCH_TOP,
        bench_needs_reference=True,
        result_marker=RESULT_MARKER,
        result_pattern=RESULT_PATTERN,
        official_rule=official_rule,
    )


class VerilogEval:
    """The benchmark's 156 problems, from a clone of it."""

    def load(self, path: str | Path) -> list[Problem]:
        """The problems in `path`: the clone, or its folder `dataset_spec-to-rtl`.

        Raises:
          UserError: there are none, or a file is missing.
        """
        folder = Path(path)
        if (folder / DATASET).is_dir():
            folder = folder / DATASET
        names = sorted(file.name.removesuffix(SUFFIXES[0]) for file in folder.glob(f"Prob*{SUFFIXES[0]}"))
        if not names:
            raise UserError(
                f"eval.problems_path={path}: contains no Prob*{SUFFIXES[0]}; give a clone of verilog-eval or its folder"
                f" {DATASET}"
            )
        return [self._problem(folder, name) for name in names]

    def _problem(self, folder: Path, name: str) -> Problem:
        files = [folder / f"{name}{suffix}" for suffix in SUFFIXES]
        if missing := [file.name for file in files if not file.is_file()]:
            raise UserError(f"{folder}: {', '.join(missing)} missing; clone the benchmark again")
        prompt, reference, testbench = (file.read_text(encoding="utf-8") for file in files)
        return make_problem(name, prompt=prompt, reference=reference, testbench=testbench)
