"""Maps `eval.benchmark` to problem sources. A new benchmark is one file and one line here."""

from __future__ import annotations

from gemma4_tpu import assets
from gemma4_tpu.config.tasks import EvalConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.evals.problems import Problem, ProblemSource, check_problems
from gemma4_tpu.evals.verilog.code_completion import VerilogEvalCompletion
from gemma4_tpu.evals.verilog.cvdp import Cvdp
from gemma4_tpu.evals.verilog.resbench import ResBench
from gemma4_tpu.evals.verilog.rtllm import RtllmFolders
from gemma4_tpu.evals.verilog.smoke import VerilogSmoke
from gemma4_tpu.evals.verilog.verilog_eval import VerilogEval

SOURCES: dict[str, type[ProblemSource]] = {
    "verilog_eval": VerilogEval,
    "rtllm": RtllmFolders,
    "verilog_smoke": VerilogSmoke,
    "verilog_eval_completion": VerilogEvalCompletion,
    "resbench": ResBench,
    "cvdp": Cvdp,
}


def load_problems(config: EvalConfig) -> list[Problem]:
    """The problems of the benchmark, or the first `max_problems` of them.

    Raises:
      UserError: there are none at `problems_path`, one is damaged, or the source is not a `ProblemSource`.
    """
    source = SOURCES[config.benchmark]
    if not isinstance(source, type) or not callable(getattr(source, "load", None)):
        raise UserError(
            f"benchmark {config.benchmark}: {source!r} is not a class with a method load (a `ProblemSource`)"
        )
    problems = source().load(assets.resolve(config.problems_path or ""))
    if problems == []:
        raise UserError(f"eval.problems_path={config.problems_path}: contains no problem of {config.benchmark}")
    if not isinstance(problems, list):
        raise UserError(
            f"benchmark {config.benchmark}: load gave {type(problems).__name__} {problems!r}, not a list of `Problem`s"
        )
    check_problems(problems, config.benchmark)
    return problems[: config.max_problems]
