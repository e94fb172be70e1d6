"""Problems to be judged on, and designs for them: honest, wrong and dishonest."""

import re
import shutil
import sys
from pathlib import Path

import pytest

from gemma4_tpu.evals.verilog.smoke import VerilogSmoke
from gemma4_tpu.evals.verilog.verdict import reference_as_answer
from gemma4_tpu.evals.verilog.verilog_eval import VerilogEval

VERILOG_EVAL = Path(__file__).parents[4] / "shared/data/verilog-eval/dataset_spec-to-rtl"

needs_iverilog = pytest.mark.skipif(
    shutil.which("iverilog") is None or not sys.platform.startswith("linux"),
    reason="no design is judged, which needs Linux and Icarus Verilog: `make simulator`, or apt-get install iverilog",
)
needs_verilog_eval = pytest.mark.skipif(
    not VERILOG_EVAL.is_dir(), reason=f"no clone of verilog-eval at {VERILOG_EVAL}: its 156 problems are not judged"
)


def smoke_problem(family):
    """The first embedded problem of a family."""
    return next(problem for problem in VerilogSmoke().load() if f"_{family}_" in problem.name)


def verilog_eval_problem(number):
    return next(problem for problem in VerilogEval().load(VERILOG_EVAL) if problem.name.startswith(f"Prob{number:03}_"))


def fenced(code):
    return f"Here it is.\n\n```verilog\n{code}\n```\n"


def honest(problem):
    return fenced(reference_as_answer(problem))


def header(problem):
    """`module TopModule (…);` with all outputs as nets."""
    found = re.search(r"module\s+TopModule\s*\(.*?\)\s*;", reference_as_answer(problem), re.DOTALL)
    return re.sub(r"\boutput\s+(?:reg|logic)\b", "output", found[0])


def outputs(problem):
    return re.findall(r"\boutput\b(?:\s*\[[^\]]*\])?\s*(\w+)", header(problem))


def inputs(problem):
    return re.findall(r"\binput\b(?:\s*\[[^\]]*\])?\s*(\w+)", header(problem))


def module(problem, body="", *, before="", after="", drive=True):
    """A design with the right ports that drives its outputs with 0, which is wrong, unless `drive` is false."""
    lines = [f"  assign {name} = 0;" for name in outputs(problem) if drive]
    return "\n".join([before, header(problem), *lines, f"  {body}", "endmodule", after])
