"""Answers that consist of a module's body alone, as code-completion benchmarks request."""

from __future__ import annotations

import re

from gemma4_tpu.data.codev import fenced_blocks
from gemma4_tpu.evals.problems import Problem


def with_header(completion: str, problem: Problem) -> str:
    """The completion, after the problem's header if there is one and the answer does not begin the module itself."""
    if not problem.header or re.search(rf"\bmodule\s+{re.escape(problem.top)}\b", completion):
        return completion
    bodies = fenced_blocks(completion) or [completion]
    return f"```verilog\n{problem.header.strip()}\n{bodies[-1]}\n```"
