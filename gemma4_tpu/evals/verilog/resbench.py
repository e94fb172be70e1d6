"""ResBench: `problems.json` with categories of problems without references, whose benches print `All tests passed`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from gemma4_tpu.errors import UserError
from gemma4_tpu.evals.problems import Problem, texts_of
from gemma4_tpu.evals.verilog.announcing import announcing_problem

FILE = "problems.json"
KEYS = ("module", "Problem", "Module header", "Testbench")
_HEAD = re.compile(r"\A.*?\)\s*;", re.DOTALL)
PROMPT = "{problem}\n\nThe module's head:\n\n```verilog\n{header}\n```\n\nGive me the whole module.\n"


class ResBench:
    """Problems from a clone of ResBench, or from a file in its format. Some of its headers contain the whole solution,
    so the model sees them only up to the end of the ports.
    """

    def load(self, path: str | Path) -> list[Problem]:
        """The problems of `problems.json` in the folder `path`, or those of the file `path`.

        Raises:
          UserError: there is no such file, or it has another format.
        """
        file = Path(path) / FILE if Path(path).is_dir() else Path(path)
        try:
            categories = json.loads(file.read_text(encoding="utf-8"))
            listed = [row for rows in categories.values() for row in rows]
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise UserError(
                f"eval.problems_path={path}: no {FILE} in the format {{category: [problem, …]}} ({error}); give a"
                " clone of ResBench"
            ) from None
        return [_problem(row, f"{file}, problem {number}") for number, row in enumerate(listed, 1)]


def _problem(row: Any, where: str) -> Problem:
    top, description, header, testbench = texts_of(row, KEYS, where).values()
    head = _HEAD.match(header)
    header = head[0] if head else header
    prompt = PROMPT.format(problem=description, header=header)
    return announcing_problem(top, prompt=prompt, top=top, testbench=testbench, where=where, header=header)
