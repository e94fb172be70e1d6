"""Answers that are the body of a module alone, as benchmarks for code completion ask for them."""

from __future__ import annotations

import re

from gemma4_tpu.data.codev import fenced_blocks
from gemma4_tpu.evals.problems import Problem


def with_header(completion: str, problem: Problem) -> str:
    """The completion, behind the problem's header where it has one and the answer does not begin the module itself."""
    if not problem.header or re.search(rf"\bmodule\s+{re.escape(problem.top)}\b", completion):
        return completion
    bodies = fenced_blocks(completion) or [completion]
    return f"```verilog\n{problem.header.strip()}\n{bodies[-1]}\n```"
