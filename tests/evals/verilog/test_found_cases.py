"""Cheats that once passed and honest answers that once were refused, with their truth found by hand."""

import json
from pathlib import Path

import pytest

from gemma4_tpu.evals.verilog.verilog_eval import VerilogEval
from tests.evals.verilog.designs import VERILOG_EVAL, needs_iverilog, needs_verilog_eval

CASES = Path(__file__).parents[4] / "shared/data/judge"

pytestmark = [
    needs_iverilog,
    needs_verilog_eval,
    pytest.mark.slow,
    pytest.mark.skipif(not CASES.is_dir(), reason="../shared is absent: the cases that others found are not judged"),
]


def cases():
    """(file and id, problem's name, completion, whether it is right)."""
    for file in sorted(CASES.glob("*.jsonl")):
        for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
            if line:
                row = json.loads(line)
                name = f"{file.stem}:{number}:{row.get('id', '')}"
                yield name, row["problem"], row["completion"], row.get("expect", "pass") == "pass"


def test_every_case_gets_its_true_verdict(judge):
    problems = {problem.name: problem for problem in VerilogEval().load(VERILOG_EVAL)}
    rows = list(cases())
    judge.prepare([problems[name] for name in {name for _, name, _, _ in rows}])
    verdicts = judge.judge_all((problems[problem], completion) for _, problem, completion, _ in rows)
    wrong = {
        name: verdict for (name, _, _, right), verdict in zip(rows, verdicts, strict=True) if verdict.passed != right
    }
    assert len(rows) > 100
    assert wrong == {}
