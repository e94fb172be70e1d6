"""A test bench under names that a design can't know.

With a new nonce in every judgement: the names of its modules, instances and counters, and, with another one (a design
can print where it stands by `%m`), the text that announces the result.
"""

from __future__ import annotations

import functools
import re
import secrets
from dataclasses import dataclass

from gemma4_tpu.evals.problems import Problem
from gemma4_tpu.evals.verilog.scan import blank, defined_modules

_NAMES, _RESULT = "@names@", "@result@"  # where the nonces go
_DUMP = re.compile(r"\$dump(?:file|vars)\s*(?:\([^;]*?\))?\s*;")
_COUNTERS = re.compile(r"\bstats\d*\b")
_PARAMETERS = r"(?:#\s*\((?:[^()]|\([^()]*\))*\)\s*)?"
_FINISH_LINE = re.compile(r"\S+:\d+: \$finish called at \d+ \(\d*[munpf]?s\)")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One judgement's bench, and how to read what it prints."""

    top: str
    source: str
    """Test bench and, where it needs one, reference. The design is compiled behind them."""
    marker: str
    """The text that announces the result."""
    result: re.Pattern[str]
    """The whole result line."""

    def read(self, stdout: str) -> re.Match[str] | str:
        """The match of the only result line, which has to be the last one, or why there is none."""
        lines = [line.strip() for line in stdout.splitlines() if line.strip()]
        matches = [self.result.fullmatch(line) for line in lines if not _FINISH_LINE.fullmatch(line)]
        if not any(matches):
            return "the bench printed no result"
        if sum(match is not None for match in matches) > 1:
            return "more than one result line"
        return matches[-1] or "something was printed after the result"


def dress(problem: Problem) -> Bench:
    """The bench of `problem` under new names."""
    names, result = secrets.token_hex(8), secrets.token_hex(8)
    beside = problem.reference if problem.bench_needs_reference else ""
    source = _template(problem.testbench, beside, problem.top, problem.result_marker)
    marker = f"{problem.result_marker}_{result}"
    return Bench(
        top=f"{problem.bench_top}_{names}",
        source=source.replace(_NAMES, names).replace(_RESULT, result),
        marker=marker,
        result=re.compile(problem.result_pattern.replace("{marker}", re.escape(marker))),
    )


@functools.lru_cache(maxsize=1024)
def _template(testbench: str, reference: str, top: str, marker: str) -> str:
    """Bench and reference with places for the nonces, without the lines that write a wave form."""
    code = _DUMP.sub(";", testbench).replace(marker, f"{marker}_{_RESULT}") + "\n" + reference
    modules = defined_modules(code)
    bare = blank(code)[0]
    instance = re.compile(rf"\b(?:{'|'.join(map(re.escape, [*modules, top]))})\s+{_PARAMETERS}([A-Za-z_]\w*)\s*\(")
    private = {*modules, *instance.findall(bare), *_COUNTERS.findall(bare)} - {top}
    words = re.compile(rf"(?<![.\w$])(?:{'|'.join(sorted(map(re.escape, private)))})(?![\w$])")
    pieces, position = [], 0
    for match in words.finditer(bare):
        pieces += [code[position : match.end()], f"_{_NAMES}"]
        position = match.end()
    # What the reference says of implicit nets does not hold for the design.
    return "".join([*pieces, code[position:], "\n`default_nettype wire\n"])
