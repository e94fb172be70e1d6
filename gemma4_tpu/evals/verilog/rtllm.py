"""RTLLM: folders (at any depth) of `design_description.txt`, `testbench.v`, `verified_*.v` and the bench's data files.

Its benches contain the expected values and announce a pass, without a number of comparisons.
"""

from __future__ import annotations

import re
from pathlib import Path

from gemma4_tpu.errors import UserError
from gemma4_tpu.evals.problems import Problem
from gemma4_tpu.evals.verilog.scan import blank, defined_modules

DESCRIPTION, TESTBENCH, REFERENCE = "design_description.txt", "testbench.v", "verified_*.v"
RESULT_MARKER = "Your Design Passed"
RESULT_PATTERN = r".*{marker}.*"
FAILURE_PATTERN = r"(?i)\b(?:failed|failures|error)\b"
DATA_SUFFIXES = (".txt", ".dat", ".hex", ".mem")
_NAME = re.compile(r"Module name\s*:\s*([A-Za-z_]\w*)", re.IGNORECASE)
_INSTANCE = r"\b{name}\s+(?:#\s*\((?:[^()]|\([^()]*\))*\)\s*)?[A-Za-z_]\w*\s*\("


def official_rule(log: str) -> bool:
    """The rule of the benchmark's own script: the word `pass` anywhere."""
    return "Pass" in log or "pass" in log


class RtllmFolders:
    """Problems in folders as in a clone of RTLLM; each folder's name is the problem's."""

    def load(self, path: str | Path) -> list[Problem]:
        """The problems below `path`, sorted by folder.

        Raises:
          UserError: there are none, a file is missing, or two have the same name.
        """
        folders = sorted(file.parent for file in Path(path).rglob(DESCRIPTION))
        if not folders:
            raise UserError(f"eval.problems_path={path}: no folder with {DESCRIPTION} in it; give a clone of RTLLM")
        problems: dict[str, Problem] = {}
        for folder in folders:
            if folder.name in problems:
                raise UserError(f"{folder}: a duplicate problem {folder.name}; give a folder with each problem once")
            problems[folder.name] = _problem(folder)
        return list(problems.values())


def _problem(folder: Path) -> Problem:
    references = sorted(folder.glob(REFERENCE))
    if not references or not (folder / TESTBENCH).is_file():
        raise UserError(f"{folder}: {TESTBENCH} or {REFERENCE} is missing next to {DESCRIPTION}; clone RTLLM again")
    prompt, testbench, reference = (_read(file) for file in (folder / DESCRIPTION, folder / TESTBENCH, references[0]))
    named = _NAME.search(prompt)
    reference_top = _root_module(reference, folder)
    names = [*([named[1]] if named else []), folder.name, reference_top.removeprefix("verified_")]
    data = [file for file in folder.iterdir() if file.suffix in DATA_SUFFIXES and file.name != DESCRIPTION]
    return Problem(
        name=folder.name,
        prompt=prompt,
        reference=reference,
        testbench=testbench,
        top=_instantiated(testbench, names),
        reference_top=reference_top,
        bench_top=_root_module(testbench, folder),
        bench_needs_reference=False,
        result_marker=RESULT_MARKER,
        result_pattern=RESULT_PATTERN,
        failure_pattern=FAILURE_PATTERN,
        official_rule=official_rule,
        files={file.name: _read(file) for file in sorted(data)},
    )


def _instantiated(testbench: str, named: list[str]) -> str:
    """The module that the bench instantiates: the first match in `named`, or one whose ports it connects."""
    bare, own = blank(testbench)[0], set(defined_modules(testbench))
    for name in named:
        if name not in own and re.search(_INSTANCE.format(name=re.escape(name)), bare):
            return name
    connected = re.findall(_INSTANCE.format(name=r"([A-Za-z_]\w*)") + r"\s*\.\w", bare)
    return next((name for name in connected if name not in own), named[0])


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


def _root_module(code: str, folder: Path) -> str:
    """The module that no other module of `code` instantiates."""
    words = re.findall(r"[A-Za-z_]\w*", blank(code)[0])
    modules = defined_modules(code)
    if not modules:
        raise UserError(f"{folder}: a source file has no module; clone RTLLM again")
    return next((name for name in modules if words.count(name) == 1), modules[-1])
