"""No dishonest design passes, whichever problem it is for; the benchmark's own rule is shown to be fooled."""

import re

import pytest

from tests.evals.verilog.cheats import BEHIND, DRIVING, INPUTS, INSIDE
from tests.evals.verilog.designs import (
    fenced,
    honest,
    inputs,
    module,
    needs_iverilog,
    needs_verilog_eval,
    outputs,
    smoke_problem,
    verilog_eval_problem,
)

pytestmark = [needs_iverilog, pytest.mark.slow]


def cheating(problem, samples):
    """Name → completion."""

    def fill(text):
        return text.replace("{o}", outputs(problem)[0]).replace("{n}", str(samples))

    def overrule(word, text):
        code = module(problem, "\n  ".join(text.replace("{i}", name) for name in inputs(problem)))
        return re.sub(r"\binput\b", word, code)

    return {
        **{name: fenced(overrule(word, text)) for name, (word, text) in INPUTS.items()},
        **{name: fenced(module(problem, fill(text))) for name, text in INSIDE.items()},
        **{name: fenced(module(problem, fill(text), drive=False)) for name, text in DRIVING.items()},
        **{name: fenced(module(problem, after=fill(text))) for name, text in BEHIND.items()},
    }


def verdicts_on_cheats(judge, problem):
    golden = judge.prepare([problem]).golden[problem.name]
    assert judge.judge(problem, honest(problem)).passed
    assert not judge.judge(problem, fenced(module(problem))).passed
    cheats = cheating(problem, golden.samples)
    return dict(zip(cheats, judge.judge_all((problem, text) for text in cheats.values()), strict=True))


def test_there_are_at_least_forty_of_them():
    assert len(INSIDE) + len(DRIVING) + len(BEHIND) >= 40


@pytest.mark.parametrize("family", ["adder", "counter", "shift_register"])
def test_no_cheating_design_passes(judge, family):
    verdicts = verdicts_on_cheats(judge, smoke_problem(family))
    assert {name: verdict for name, verdict in verdicts.items() if verdict.passed} == {}


@needs_verilog_eval
def test_no_cheating_design_passes_the_benchmark_and_its_own_rule_is_fooled(judge):
    problem = verilog_eval_problem(35)
    verdicts = verdicts_on_cheats(judge, problem)
    assert {name: verdict for name, verdict in verdicts.items() if verdict.passed} == {}
    if not judge.judge(problem, honest(problem)).official:
        pytest.skip(f"{judge.tools.name} does not build the benchmark's own benches: only the strict verdict is tested")
    fooled = {name for name, verdict in verdicts.items() if verdict.official}
    assert {"print_then_finish", "read_reference_net", "instantiate_reference", "finish_at_once"} <= fooled
    assert len(fooled) >= 10
