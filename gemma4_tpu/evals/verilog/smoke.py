"""The held-out synthetic problems that ship with the package (made by `experiments/verilog_smoke`)."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

from gemma4_tpu.assets import ROOT
from gemma4_tpu.errors import UserError
from gemma4_tpu.evals.problems import Problem
from gemma4_tpu.evals.verilog.verilog_eval import REFERENCE_TOP, TOP, make_problem

EMBEDDED = ROOT / "verilog_smoke/heldout_problems.jsonl.gz"


class VerilogSmoke:
    """Rows of `{"id", "prompt", "reference", "testbench"}`; the reference defines `TopModule`, as answers do."""

    def load(self, path: str | Path = EMBEDDED) -> list[Problem]:
        """The problems in a JSONL file (optionally .gz).

        Raises:
          UserError: a line is not such a row, or there is none.
        """
        data = Path(path).read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8")
        problems = []
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                reference = re.sub(rf"\b{TOP}\b", REFERENCE_TOP, row["reference"])
                problems.append(
                    make_problem(row["id"], prompt=row["prompt"], reference=reference, testbench=row["testbench"])
                )
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise UserError(
                    f"{path}:{number}: not a problem ({error!r}); give id, prompt, reference and testbench"
                ) from None
        if not problems:
            raise UserError(f"{path}: contains no problem; give another file")
        return problems
