"""What a comparison says in words, and what a report shows."""

import json

import pytest
from matplotlib.image import imread

from gemma4_tpu.errors import UserError
from gemma4_tpu.evals.compare import compare
from gemma4_tpu.evals.problems import Verdict, VerdictClass
from gemma4_tpu.evals.scores import EvaluationOutcome, ProblemOutcome, tally
from gemma4_tpu.evals.store import Sample
from gemma4_tpu.reporting.evaluation import plot_problems, summary, write_report


def outcome(
    name: str, passes: list[int], n: int = 20, *, first: int = 0, benchmark="verilog_eval", **settings
) -> EvaluationOutcome:
    problems = {
        f"Prob{first + i:03d}": ProblemOutcome(
            n=n, passed=c, official=c, classes={"pass": c, "mismatch": n - c}, truncated=0
        )
        for i, c in enumerate(passes)
    }
    check = {"simulator": "Icarus Verilog 12.0", "sandbox": "landlock"}
    settings = {"n": n, "temperature": 0.8, "weights": name, **settings}
    return EvaluationOutcome(name=name, benchmark=benchmark, settings=settings, problems=problems, selfcheck=check)


def claims(a: EvaluationOutcome, b: EvaluationOutcome) -> str:
    return "\n".join(compare(a, b).claims())


def test_a_clear_gap_is_claimed_for_these_and_for_new_problems_but_not_for_its_cause():
    said = claims(outcome("run", [18] * 40), outcome("base", [4] * 40))
    assert "pass@1: run is 0.700 above base" in said
    assert "larger than redrawing the samples would explain" in said
    assert "expect the same sign" in said
    assert "cannot be attributed to any of these" in said
    assert "like-for-like" not in said


def test_a_gap_on_few_problems_holds_for_these_only():
    """As between the paper's two checkpoints: beyond sampling error, undecided for other problems."""
    said = claims(outcome("a", [20] * 4 + [0] * 3 + [10] * 33), outcome("b", [0] * 4 + [20] * 3 + [9] * 33, n=20))
    assert "either could be better" in said
    wide = claims(outcome("a", [20] * 20 + [0] * 14), outcome("b", [0] * 14 + [20] * 14 + [0] * 6))
    assert "larger than redrawing the samples would explain" in wide
    assert "either could be better" in wide


def test_no_gap_is_said_to_be_none():
    said = claims(outcome("a", [10, 11, 9, 12] * 10), outcome("b", [11, 10, 10, 11] * 10))
    assert "redrawing the samples could produce the gap" in said
    assert "either could be better" in said


def test_one_sample_each_leaves_the_sampling_error_unknown():
    assert "sampling error is unknown" in claims(outcome("a", [1, 0, 1], n=1), outcome("b", [0, 0, 1], n=1))


def test_unlike_settings_and_unpaired_problems_are_told():
    a, b = outcome("a", [5] * 6, temperature=0.2), outcome("b", [5] * 6, first=2, temperature=0.8)
    said = claims(a, b)
    assert "Not a like-for-like comparison (temperature: 0.2 and 0.8)" in said
    assert "2 problems that only a has, 2 that only b has" in said


def test_nothing_to_pair_is_refused():
    with pytest.raises(UserError, match="nothing to pair"):
        compare(outcome("a", [1]), outcome("b", [1], benchmark="rtllm"))
    with pytest.raises(UserError, match="no problem in common"):
        compare(outcome("a", [1]), outcome("b", [1], first=5))


def test_samples_that_never_came_stay_in_the_denominator():
    good = Verdict(kind=VerdictClass.PASS, official=True)
    samples = [
        Sample(problem="a", sample=0, completion="", finish="length"),
        Sample(problem="a", sample=2, completion=""),
    ]
    found = tally(["a", "b"], 4, samples, {("a", 0): good, ("a", 2): good})
    assert found["a"] == ProblemOutcome(n=4, passed=2, official=2, classes={"pass": 2, "missing": 2}, truncated=1)
    assert found["b"].classes == {"missing": 4}
    made = EvaluationOutcome(name="x", benchmark="b", settings={}, problems=found, selfcheck={})
    assert made.scores()["strict"]["all"][0].value == pytest.approx(0.25)


def test_scores_are_given_over_all_problems_and_over_those_that_can_pass(tmp_path):
    made = outcome("run", [20, 20, 0, 10])
    made = EvaluationOutcome(**{**vars(made), "cannot_pass": {"Prob002": "syntax: its own reference"}})
    found = made.scores()["strict"]
    assert found["all"][0].value == pytest.approx(0.625)
    assert (found["can_pass"][0].value, found["can_pass"][0].problems) == (pytest.approx(5 / 6), 3)
    made.write(tmp_path / "result.json")
    assert EvaluationOutcome.read(tmp_path / "result.json") == made
    assert json.loads((tmp_path / "result.json").read_text())["scores"]["strict"]["all"][0]["value"] == 0.625


def test_a_report_has_what_is_needed_to_judge_it(tmp_path):
    a, b = outcome("run", [20, 12, 0]), outcome("base", [3, 0, 0])
    a = EvaluationOutcome(**{**vars(a), "cannot_pass": {"Prob002": "mismatch: 3 errors"}})
    plot = plot_problems([a, b], tmp_path / "plots/problems.png")
    write_report(
        tmp_path / "report.md", [a, b], comparison=compare(a, b), prompt="<bos>the very prompt",
        packages={"jax": "0.10.2"}, plots=[plot],
    )  # fmt: skip
    text = (tmp_path / "report.md").read_text()
    for wanted in (
        "![problems](plots/problems.png)", "that can pass here", "0.641 [0.574, 0.706]", "0.814", "Cut off at the",
        "Icarus Verilog 12.0, sandbox landlock", "jax 0.10.2", "<bos>the very prompt", "Prob002: mismatch: 3 errors",
        "| Prob001 | 12 of 20 | 12 | mismatch 8 |", "| temperature | 0.8 | 0.8 |",
    ):  # fmt: skip
        assert wanted in text
    image = imread(plot)
    assert image.shape[1] > 1000 and image.std() > 0.05
    assert "pass@1  0.533" in summary(a)
