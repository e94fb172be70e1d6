"""Benches that contain the expected values and announce a pass in words; they need no reference."""

from __future__ import annotations

import re

from gemma4_tpu.errors import UserError
from gemma4_tpu.evals.problems import Problem
from gemma4_tpu.evals.verilog.scan import blank, defined_modules

_STRING = re.compile(r'"((?:\\.|[^"\\\n])*)"')
_ALL_PASSED = re.compile(r"(?i)\ball\b.{0,40}\bpass(?:ed)?\b|\bdesign passed\b|\btests?(?: cases?)? passed\b")
_DENIAL = r"(?i:\b(?:not|never|cannot|unless|expected|if)\b|n't\b)"
_DENIED = re.compile(_DENIAL)
_ASKED = re.compile(r"\s*[?=]\s*%")
_VALUE = re.compile(r"%[-+]?\d*[A-Za-z]")
_NOT_DENIED = rf"(?!.*{_DENIAL}.*{{marker}})"
FAILURE_PATTERN = r"(?i)\b(?:fail(?:ed|ures?)?|errors?|mismatch(?:es)?)\b"


def announcing_problem(
    name: str, *, prompt: str, top: str, testbench: str, where: str, reference: str = "", header: str = "",
) -> Problem:  # fmt: skip
    """A problem whose bench prints a line such as `All tests passed`.

    Args:
      name: the problem's.
      prompt: the problem's.
      top: the module that an answer defines.
      testbench: source of the bench.
      where: file and row, for messages.
      reference: source of a correct design that defines `top`, if there is one.
      header: header of the module, if an answer can be its body alone.

    Raises:
      UserError: the bench has no module, or announces nothing.
    """
    announced = [found for text in _STRING.findall(testbench) if (found := _announcement(text))]
    if not announced:
        raise UserError(
            f"{where}: its test bench announces no pass (a count of passed tests is none); print one, such as"
            ' "All tests passed"'
        )
    *before, marker = _VALUE.split(announced[-1])
    between = "".join(f"{re.escape(words)}.*?" for words in before)
    return Problem(
        name=name,
        prompt=prompt,
        reference=reference,
        testbench=testbench,
        top=top,
        reference_top=top if reference else "",
        bench_top=_root(testbench, where),
        bench_needs_reference=False,
        result_marker=marker.strip(),
        result_pattern=f"{_NOT_DENIED}.*{between}{{marker}}.*",
        failure_pattern=FAILURE_PATTERN,
        official_rule=official_rule,
        header=header,
    )


def _announcement(text: str) -> str | None:
    """The words in a bench's string that say that everything passed, if it is not a denial, a question or a count."""
    found = _ALL_PASSED.search(text)
    if found is None or _DENIED.search(text[: found.end()]) or _ASKED.match(text, found.end()):
        return None
    counts = "%" in text and not re.search(r"(?i)\ball\b", found[0])
    return None if counts else found[0]


def official_rule(log: str) -> bool:
    """The rule of such benchmarks' scripts: the announcement is somewhere in the output."""
    return _ALL_PASSED.search(log) is not None


def _root(testbench: str, where: str) -> str:
    """The bench's module that no other module of it instantiates."""
    words = re.findall(r"[A-Za-z_]\w*", blank(testbench)[0])
    modules = defined_modules(testbench)
    if not modules:
        raise UserError(f"{where}: its test bench has no module")
    return next((name for name in modules if words.count(name) == 1), modules[-1])
