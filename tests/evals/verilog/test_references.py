"""The 156 references of verilog-eval, as answers: all that can pass do, on any simulator; spoilt ones fail."""

from random import Random

import pytest

from gemma4_tpu.config.tasks import JudgeConfig
from gemma4_tpu.evals.problems import VerdictClass
from gemma4_tpu.evals.verilog.mutants import mutants
from gemma4_tpu.evals.verilog.smoke import VerilogSmoke
from gemma4_tpu.evals.verilog.verdict import reference_as_answer
from gemma4_tpu.evals.verilog.verilog_eval import VerilogEval
from gemma4_tpu.evals.verilog.verilog_judge import VerilogJudge
from tests.evals.verilog.designs import VERILOG_EVAL, fenced, honest, needs_iverilog, needs_verilog_eval

pytestmark = [needs_iverilog, needs_verilog_eval, pytest.mark.slow]

FAILING = {"11": {99, 151, 156}, "12": {99}, "13": {99}}
"""Icarus version → problems whose own reference fails there."""
OFFICIAL = {"11": 151, "12": 152, "13": 0}
"""How many references the benchmark's own rule accepts; on 13 its benches no longer compile."""
SLOWEST = 144


def number(problem):
    return int(problem.name[4:7])


@pytest.fixture(scope="module")
def patient_judge(cache_dir):
    with VerilogJudge(JudgeConfig(workers=2, cache_dir=cache_dir)) as judge:
        yield judge


@pytest.fixture(scope="module")
def problems():
    return VerilogEval().load(VERILOG_EVAL)


@pytest.fixture(scope="module")
def check(patient_judge, problems):
    return patient_judge.prepare(problems)


@pytest.fixture
def version(patient_judge):
    version = patient_judge.tools.version.partition(".")[0]
    if version not in FAILING:
        pytest.skip(f"what the references do with Icarus Verilog {version} is not on record: not compared")
    return version


def test_all_references_pass_that_can(check, problems, version):
    assert len(problems) == 156
    assert {int(name[4:7]) for name in check.cannot_pass} == FAILING[version]
    assert "of 156 pass" in check.table()
    counts = {name: golden.samples for name, golden in check.golden.items()}
    assert (counts["Prob001_zero"], min(filter(None, counts.values())), max(filter(None, counts.values()))) == (
        20,
        19,
        200000,
    )


def test_references_as_answers_get_both_verdicts(check, patient_judge, problems, version):
    verdicts = dict(zip(map(number, problems), patient_judge.judge_all((p, honest(p)) for p in problems), strict=True))
    assert {number for number, verdict in verdicts.items() if verdict.passed} == set(range(1, 157)) - FAILING[version]
    assert sum(verdict.official for verdict in verdicts.values()) == OFFICIAL[version]
    for problem, verdict in verdicts.items():
        if problem in FAILING[version]:
            assert verdict.kind is VerdictClass.NO_RESULT
            assert "the reference itself fails" in verdict.detail


def test_mutated_references_fail_and_the_official_verdict_needs_no_second_simulation(check, patient_judge, problems):
    """A back quote in a comment makes the judge run the benchmark's own commands instead of reading the strict log."""
    rng = Random(0)
    spoilt = []
    for problem in problems[::3]:
        found = mutants(reference_as_answer(problem))
        if found and problem.name not in check.cannot_pass and number(problem) != SLOWEST:
            spoilt.append((problem, rng.choice(found)))
    verdicts = list(patient_judge.judge_all((problem, fenced(code)) for problem, code in spoilt))
    survivors = {problem.name for (problem, _), verdict in zip(spoilt, verdicts, strict=True) if verdict.passed}
    assert len(spoilt) > 30
    assert len(survivors) <= 0.1 * len(spoilt), survivors  # equivalent ones, and benches that are too weak
    again = list(patient_judge.judge_all((problem, fenced(f"{code}\n// `")) for problem, code in spoilt))
    assert [(v.kind, v.official) for v in again] == [(v.kind, v.official) for v in verdicts]


def test_all_embedded_problems_can_be_passed(judge):
    problems = VerilogSmoke().load()
    assert judge.prepare(problems).cannot_pass == {}
