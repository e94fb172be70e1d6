"""Which problem source stands behind `eval.benchmark`. A second benchmark is one file and one line here."""

from __future__ import annotations

from gemma4_tpu import assets
from gemma4_tpu.config.tasks import EvalConfig
from gemma4_tpu.evals.problems import Problem, ProblemSource
from gemma4_tpu.evals.verilog.rtllm import RtllmFolders
from gemma4_tpu.evals.verilog.smoke import VerilogSmoke
from gemma4_tpu.evals.verilog.verilog_eval import VerilogEval

SOURCES: dict[str, type[ProblemSource]] = {
    "verilog_eval": VerilogEval,
    "rtllm": RtllmFolders,
    "verilog_smoke": VerilogSmoke,
}


def load_problems(config: EvalConfig) -> list[Problem]:
    """The problems of the benchmark, or the first `max_problems` of them.

    Raises:
      UserError: there are none at `problems_path`, or one is damaged.
    """
    source = SOURCES[config.benchmark]()
    return source.load(assets.resolve(config.problems_path or ""))[: config.max_problems]
