"""What is held impossible: the blog's figures and two of the paper's; what is not: the rest of them."""

from dataclasses import replace
from pathlib import Path

import pytest

from gemma4_tpu.architectures import ARCHITECTURES
from gemma4_tpu.costing.ceiling import ModelDemand, Serving
from gemma4_tpu.costing.figures import MEASURED, Figures, Point
from gemma4_tpu.costing.plausibility import DOUBTFUL, IMPOSSIBLE, POSSIBLE, judge
from gemma4_tpu.costing.read import read
from gemma4_tpu.hardware import SLICES
from gemma4_tpu.report import main

DENSE = ModelDemand.of(ARCHITECTURES["gemma4_31b"])
EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture(scope="module")
def judged():
    return judge(read([str(EXPERIMENTS / name) for name in ("paper_costs", "plausibility")]))[0]


def only(judged, start, quantity=""):
    (one,) = [one for one in judged if one.figure.name.startswith(start) and quantity in one.quantity]
    return one


def test_the_blogs_peak_was_not_generated(judged):
    readings = {one.figure.name: one for one in judged if one.figure.name.startswith("468,736")}
    perfect = readings["468,736 as generated tokens, speculation perfect"]
    # 256 sequences choose all 128 experts: 25.2 B parameters in two bytes, 7.7 ms at 6.56 TB/s, 1,024 tokens in it.
    assert perfect.verdict == IMPOSSIBLE
    assert perfect.share == pytest.approx(468_736 * (25.23e9 * 2 / 6.56e12) / 1024, rel=0.02)
    assert "50.5 GB of weights" in perfect.arithmetic and "468,736 tokens/s stated is 355%" in perfect.arithmetic
    assert readings["468,736 as generated tokens, speculation in vain"].share == pytest.approx(
        4 * perfect.share, rel=0.01
    )


def test_the_blogs_peak_would_need_97_percent_of_the_flops_if_no_weight_were_read_twice(judged):
    alike = only(judged, "468,736 as generated tokens, speculation perfect, users alike")
    assert alike.verdict == DOUBTFUL
    # 3.8 B active parameters alone, without attention, are 97%.
    assert 468_736 * 2 * 3.8e9 / SLICES["v6e-4"].peak_flops_per_second == pytest.approx(0.97, abs=0.001)
    assert alike.share == pytest.approx(0.977, abs=0.002)


def test_the_blogs_peak_as_prompts_is_doubtful_at_best(judged):
    readings = {one.figure.name: one for one in judged if "as prompt tokens" in one.figure.name}
    assert [readings[name].verdict for name in sorted(readings)] == [DOUBTFUL, IMPOSSIBLE]


def test_the_predecessor_of_four_layers(judged):
    told = only(judged, "463,345 (run 1, the 4-layer predecessor)")
    assert (told.verdict, told.limit) == (IMPOSSIBLE, "459,000 tokens/s")
    assert only(judged, "463,345 (run 1) for the assistant's own size").verdict == POSSIBLE
    assert only(judged, "463,345 (run 1), were it the dense 31B").share > 7


def test_were_it_generated_by_the_dense_model_it_would_need_775_percent():
    assert 463_345 * 2 * DENSE.multiplied / SLICES["v6e-4"].peak_flops_per_second == pytest.approx(7.75, abs=0.005)


def test_two_of_the_papers_latencies_are_impossible_and_all_its_throughputs_are_not(judged):
    paper = [one for one in judged if one.figure.source.startswith("paper")]
    impossible = {(one.figure.name, one.told) for one in paper if one.verdict == IMPOSSIBLE}
    assert impossible == {("TPU max", "62 ms"), ("GPU max", "99 ms")}
    assert only(judged, "TPU max", "first").limit == "136 ms"
    assert {one.verdict for one in paper if "tokens" in one.quantity} == {POSSIBLE}


def test_a_measured_figure_above_the_ceiling_is_the_exit_code(tmp_path, capsys):
    claims = tmp_path / "figures.yaml"
    claims.write_text(
        "label: given\nsource: a test\nsetups:\n  here: {slice: v6e-8, model: gemma4_31b}\n"
        "points:\n  - {name: fast, setup: here, input_tokens: 512, sequences: 8, output_tokens_per_second: 9000}\n"
    )
    assert main(["plausibility", str(tmp_path)]) == 0
    assert "| fast | *given* | tokens generated | 9,000 tokens/s | 1,6" in capsys.readouterr().out
    claims.write_text(claims.read_text().replace("given", "measured"))
    assert main(["plausibility", str(tmp_path)]) == 1


def test_whole_requests_are_held_against_prompts_too():
    serving = Serving(model=DENSE, slice=SLICES["h100x2"])
    peak = Point(
        name="a", label=MEASURED, source="a test", slice="h100x2", serving=serving, input_tokens=15360,
        output_tokens=512, sequences=30, output_tokens_per_second=1200,
    )  # fmt: skip
    (as_peak,), _ = judge(Figures(points=[peak]))
    (as_mean,), _ = judge(Figures(points=[replace(peak, whole=True)]))
    assert (as_peak.verdict, as_mean.verdict) == (POSSIBLE, IMPOSSIBLE)


def test_what_does_not_fit_is_impossible_and_what_has_no_peaks_is_not_judged():
    serving = Serving(model=DENSE, slice=SLICES["v6e-1"])
    told = {"label": MEASURED, "source": "a test", "output_tokens_per_second": 10.0}
    small = Point(name="small", slice="v6e-1", serving=serving, **told)
    here = Point(name="here", slice="local", **told)
    judged, left = judge(Figures(points=[small, here]))
    assert [one.verdict for one in judged] == [IMPOSSIBLE]
    assert "61.4 GB of weights and one sequence's cache, 33.6 GB of HBM" in judged[0].arithmetic
    assert [(one.figure, one.reason) for one in left] == [(here, "no peaks are known for local")]


def test_the_committed_report_is_what_its_command_makes(monkeypatch, tmp_path):
    monkeypatch.chdir(EXPERIMENTS.parent)
    made = tmp_path / "README.md"
    assert main(["plausibility", "experiments/paper_costs", "experiments/plausibility", f"out={made}"]) == 0
    kept = (EXPERIMENTS / "plausibility/README.md").read_text(encoding="utf-8")
    assert made.read_text(encoding="utf-8").replace(str(made), "experiments/plausibility/README.md") == kept
