"""Dollars to the cent: the paper's tables from its inputs, and what runs, plans, evaluations and loads cost."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from gemma4_tpu.architectures import ARCHITECTURES
from gemma4_tpu.config.schema import LoraConfig
from gemma4_tpu.config.serving import ServeRoot
from gemma4_tpu.costing.ceiling import ModelDemand, Serving
from gemma4_tpu.costing.cost import NO, ROUNDED, Prices, compare, named, solved, together, total_usd_per_million
from gemma4_tpu.costing.figures import ESTIMATED, MEASURED, Figures
from gemma4_tpu.costing.read import read
from gemma4_tpu.errors import UserError
from gemma4_tpu.hardware import SLICES
from gemma4_tpu.report import main, spelt_out
from gemma4_tpu.reporting.costs import CostTerms, cost_report
from gemma4_tpu.tracking.result import Result

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
HOURS = (1, 8, 24)
PAPER = Prices(on_demand={"v5p-8": 16.80, "v6e-8": 21.52, "h100x2": 22.12})
"""What the paper says of an hour."""


@pytest.fixture(scope="module")
def paper():
    return read([str(EXPERIMENTS / "paper_costs")])


def cents(figures, start, prices=PAPER):
    return {
        name.removeprefix(start): round(usd, 2)
        for name, usd in named(figures, prices, HOURS).items()
        if name.startswith(start)
    }


# ── the paper ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_section_5_4_training(paper):
    assert cents(paper, "training/TPU/") == {
        "usd_per_hour": 16.80, "hours": 3.34, "real_tokens_per_second": 763, "usd": 56.11,
        "usd_per_million_real_tokens": 6.12,
    }  # fmt: skip
    assert cents(paper, "training/GPU/") == {
        "usd_per_hour": 22.12, "hours": 5.39, "real_tokens_per_second": 486, "usd": 119.23,
        "usd_per_million_real_tokens": 12.64,
    }  # fmt: skip
    rounded = named(paper, PAPER, HOURS, rounded=True)  # tokens to 0.1 million, as the paper did
    assert rounded["training/TPU/usd_per_million_real_tokens"] == 6.10
    assert rounded["training/GPU/usd_per_million_real_tokens"] == 12.68


def test_section_8_6_serving(paper):
    assert cents(paper, "serving/TPU short/")["usd_per_million_generated"] == 4.26
    assert cents(paper, "serving/GPU short/") == {
        "usd_per_hour": 22.12, "million_tokens_per_hour": 5.36, "usd_per_million_generated": 4.12,
    }  # fmt: skip
    assert cents(paper, "serving/TPU long/") == {
        "usd_per_hour": 21.52, "million_tokens_per_hour": 4.34, "usd_per_million_generated": 4.96,
    }  # fmt: skip
    assert cents(paper, "serving/GPU long/")["usd_per_million_generated"] == 8.44


def test_section_9_totals(paper):
    assert cents(paper, "total/") == {
        "TPU/1 h": 77.63, "TPU/8 h": 228.27, "TPU/24 h": 572.59,
        "GPU/1 h": 141.35, "GPU/8 h": 296.19, "GPU/24 h": 650.11,
    }  # fmt: skip


def test_where_the_paper_disagrees_with_its_own_inputs(paper):
    found = compare(paper, PAPER, HOURS)
    wrong = {(one.printed.what, one.printed.printed, one.shown) for one in found if one.agrees == NO}
    assert wrong == {
        ("TPU short, USD per million tokens", "4.27", "4.26"),
        ("TPU long, USD per million tokens", "4.95", "4.96"),
        ("TPU cheaper at long context (4,096 tokens and more), at 8,192, %", "41", "9"),
        ("TPU cheaper at long context (4,096 tokens and more), at 16k, %", "41", "33"),
        ("TPU cheaper, training and a day of serving, ×", "1.82", "1.14"),
    }
    (hour,) = [one for one in found if one.printed.what == "TPU cheaper, training + 1 h, ×"]
    assert hour.shown == "1.82"
    assert [one.printed.printed for one in found if one.agrees == ROUNDED] == ["6.10", "12.68", "2.08", "4.13"]


def test_notes_on_the_paper_hold():
    assert f"{56.11 / 9.2:.2f} {119.23 / 9.4:.2f} {763 * 3.34 * 3600 / 1e6:.2f}" == "6.10 12.68 9.17"
    assert f"{21.52 / 5.05:.2f} {21.52 / (1400 * 3600 / 1e6):.2f} {21.52 / 4.34:.2f}" == "4.26 4.27 4.96"
    assert f"{486 * 5.39 / (763 * 3.34) - 1:.1%}" == "2.8%"


def test_the_committed_report_is_what_its_command_makes(monkeypatch, tmp_path):
    monkeypatch.chdir(EXPERIMENTS.parent)
    made = tmp_path / "README.md"
    assert (
        main(["cost", "experiments/paper_costs", "prices={v5p-8: 16.8, h100x2: 22.12, v6e-8: 21.52}", f"out={made}"])
        == 0
    )
    kept = (EXPERIMENTS / "paper_costs/README.md").read_text(encoding="utf-8")
    assert made.read_text(encoding="utf-8").replace(str(made), "experiments/paper_costs/README.md") == kept


# ── records ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def run(tmp_path):
    """Half an hour on a v6e-8, 6 million real tokens."""
    folder = tmp_path / "train" / "one"
    folder.mkdir(parents=True)
    config = {"hardware": {"name": "v6e-8", "usd_per_hour": None, "spot": False}, "model": {"name": "gemma4_e4b"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"lora": {"enabled": True, "rank": 16}}))
    result = Result(status="finished", seconds=1800, real_tokens=6_000_000, real_tokens_per_second=4000.0)
    result.write(folder / "result.json")
    return folder


@pytest.fixture
def evaluation(tmp_path):
    """200 samples of which 50 pass, 100,000 tokens in 360 seconds on a v6e-4."""
    folder = tmp_path / "evaluations" / "one"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("hardware: {name: v6e-4}")
    judged = {"n": 100, "official": None, "classes": {}, "truncated": 0}
    problems = {"a": judged | {"passed": 50}, "b": judged | {"passed": 0}}
    told = {
        "scores": {},
        "benchmark": "verilog_smoke",
        "name": "run",
        "settings": {},
        "problems": problems,
        "tokens": 100_000,
    }
    (folder / "result.json").write_text(json.dumps(told | {"generation_seconds": 360}))
    return folder


@pytest.fixture
def load(tmp_path):
    """A server on v6e-8 that generates 1,000 tokens/s, prompts three times as long as answers."""
    folder = tmp_path / "bench"
    (folder / "cells").mkdir(parents=True)
    config = asdict(ServeRoot())
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    cell = {"completed": 10, "total_input_tokens": 3840, "total_output_tokens": 1280, "output_throughput": 1000.0}
    cell |= {"median_ttft_ms": 50.0, "median_tpot_ms": 10.0, "request_rate": 4.0, "max_concurrency": 8}
    (folder / "cells" / "0.json").write_text(json.dumps(cell))
    (folder / "cells" / "1.json").write_text(json.dumps(cell | {"completed": 0}))
    return folder


def test_a_run_costs_its_time_on_the_slice(run):
    figures = read([str(run)])
    assert figures.trainings[0].label == MEASURED
    assert read([str(run.parent)]) == figures  # a folder of runs stands for its runs
    assert cents(figures, "training/train/one/")["usd"] == 10.76
    assert cents(figures, "training/train/one/")["usd_per_million_real_tokens"] == 1.79
    assert cents(figures, "training/train/one/")["usd_per_hour"] == 21.52


def test_given_prices_come_before_configured_ones_before_the_tables(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["hardware"] |= {"usd_per_hour": 8.0, "spot": True}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    figures = read([str(run)])
    (training,) = figures.trainings
    assert Prices().hourly("v6e-8", "on_demand", training) == 21.6
    assert Prices().hourly("v6e-8", "spot", training) == 8.0
    assert Prices(spot={"v6e-8": 7.0}).hourly("v6e-8", "spot", training) == 7.0
    text = cost_report(figures, CostTerms(prices=Prices(on_demand={"v6e-8": 20.0}), serving_hours=HOURS))
    assert "| v6e-8 | on demand | $20.00 |  | this report | given |" in text
    assert "| $10.00 | $1.67 | $4.00 | $0.667 |" in text  # run and per million, on demand and spot


def test_a_plan_is_estimated_and_a_folder_of_plans_stands_for_its_plans():
    figures = read([str(EXPERIMENTS / "plans" / "results")])
    (plan,) = [t for t in figures.trainings if t.name == "gemma4_31b, lora r=64, v5p-8, fsdp=1 tp=4"]
    known = json.loads((EXPERIMENTS / "plans/results/gemma4_31b_v5p8_lora_fsdp1_tp4.json").read_text())
    found = cents(Figures(trainings=[plan]), f"training/{plan.name}/")
    assert len({t.name for t in figures.trainings}) == len(figures.trainings)  # several meshes of a slice
    assert plan.label == ESTIMATED
    assert found["usd"] == round(known["usd_estimate"]["on_demand"]["mid"], 2)
    assert found["usd_per_million_real_tokens"] == round(known["usd_per_million_real_tokens"], 2)
    usd = known["usd_estimate"]["on_demand"]
    text = cost_report(Figures(trainings=[plan]), CostTerms(serving_hours=HOURS))
    assert f"| ${usd['high']:.2f} to ${usd['low']:.2f} |" in text  # never a point


def test_a_load_by_context_length(load, caplog):
    (point,) = read([str(load)]).points
    assert (point.input_tokens, point.output_tokens, point.slice, point.sequences) == (384, 128, "v6e-8", 8)
    assert (point.ttft_seconds, point.tpot_seconds, point.whole) == (0.05, 0.01, True)
    assert "skipped 1 cells with failed requests or without a completed one: 1.json" in caplog.text
    generated = 21.6 / 3.6  # 3.6 million tokens an hour
    assert total_usd_per_million(point, Prices(), "on_demand") == pytest.approx(generated / 4)


def test_prompts_from_the_cache_are_not_held_against_the_ceiling(load):
    path = load / "cells" / "0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prefix_cache_hits": 300}))
    (point,) = read([str(load)]).points
    assert (point.whole, point.ttft_seconds) == (False, None)


def test_a_solved_problem_by_time_on_the_slice(evaluation):
    (one,) = (figures := read([str(evaluation)])).evaluations
    found = solved(one, figures, Prices(), "on_demand")
    assert (round(found.usd, 3), round(found.usd_per_pass, 5)) == (1.08, 0.0216)
    assert solved(one, figures, Prices(), "spot").usd == pytest.approx(0.1 * 4 * 0.59267, abs=1e-5)


def test_a_solved_problem_by_tokens_where_the_slice_has_no_price(evaluation, load):
    (evaluation / "config.yaml").write_text("hardware: {name: local}")
    figures = read([str(evaluation), str(load)])
    figures.points += [replace(figures.points[0], name="dearer", output_tokens_per_second=500.0)]
    found = solved(figures.evaluations[0], figures, Prices(), "on_demand")
    assert found.usd == pytest.approx(0.1 * 21.6 / 3.6)  # at the cheapest load
    assert "(estimated)" in found.by


def test_what_an_endpoint_generated_is_not_priced_by_the_client_or_by_another_model(evaluation, load):
    (evaluation / "config.yaml").write_text(
        "{hardware: {name: v6e-4}, model: {name: tiny}, eval: {endpoint: http://h/v1}}"
    )
    figures = read([str(evaluation), str(load)])
    (one,) = figures.evaluations
    assert one.slice == "endpoint"
    assert "(estimated)" in solved(one, figures, Prices(), "on_demand").by  # by its tokens at the only load's rate
    sizes = [ARCHITECTURES[name] for name in ("gemma4_31b", "gemma4_e2b")]
    served = [Serving(model=ModelDemand.of(size), slice=SLICES["v6e-8"]) for size in sizes]
    (point,) = figures.points
    figures.points = [replace(point, serving=each) for each in served]
    assert solved(one, figures, Prices(), "on_demand") is None  # which of the two it was is not known
    known = replace(one, model=served[1].model)
    assert solved(known, figures, Prices(), "on_demand").usd > 0
    assert (
        solved(replace(one, model=ModelDemand.of(ARCHITECTURES["gemma4_12b"])), figures, Prices(), "on_demand") is None
    )


def test_training_and_serving_of_any_set(run, load):
    figures = read([str(run), str(load)])
    pairs = {pair.slice: pair for pair in together(figures, ["v6e-4", "local"])}
    assert set(pairs) == {"v6e-8", "v6e-4", "local"}
    assert pairs["v6e-8"].usd(24, Prices(), "on_demand") == pytest.approx(10.80 + 24 * 21.60)
    assert pairs["v6e-4"].usd(24, Prices(), "on_demand") == pytest.approx(10.80 + 24 * 10.80)
    assert pairs["local"].usd(24, Prices(), "on_demand") is None
    assert pairs["local"].usd(24, Prices(on_demand={"local": 0.1}), "on_demand") == pytest.approx(10.80 + 2.4)


# ── the command line ───────────────────────────────────────────────────────────────────────────────────────────────


def test_every_kind_of_record_in_one_report(run, evaluation, load, capsys):
    words = [str(run), str(evaluation), str(load), "spot_prices={v6e-8: 9}", "serving_hours=[2]"]
    assert main(["cost", *words]) == 0
    text = capsys.readouterr().out
    for title in ("Prices", "Training", "Serving, by context length", "Per solved problem", "Training and serving"):
        assert f"\n## {title}" in text
    assert "| train/one | v6e-8 | v6e-8 | on demand | $10.80 | $21.60 | $54.00 |" in text
    assert "| train/one | v6e-8 | v6e-8 | spot | $4.50 | $9.00 | $22.50 |" in text


def test_folders_may_follow_the_subject():
    assert spelt_out(["cost", "a/b", "c.yaml", "out=x"]) == ["cost=[a/b,c.yaml]", "out=x"]
    assert spelt_out(["plausibility", "it's, here"]) == ["plausibility=['it\\'s, here']"]
    assert spelt_out(["sweep=a"]) == ["sweep=a"]


def test_all_refusals_come_together(tmp_path, capsys):
    words = ["cost", str(tmp_path / "nope"), "prices={v6e8: 3}", "serving_hours=[-1]", "metric=usd", f"out={tmp_path}"]
    assert main(words) == 2
    told = capsys.readouterr().err
    assert "nope: no such folder" in told
    assert "prices.v6e8=3.0: no such slice; did you mean v6e-8" in told
    assert "serving_hours: -1.0: hours, 0 or more" in told
    assert "metric=usd: only with sweep=<folder>" in told
    assert "give a file in a folder that exists" in told


@pytest.mark.parametrize(
    ("record", "file", "content", "message"),
    [
        ("run", "result.json", "{", "result.json: damaged"),
        ("run", "config.yaml", "a: [", "config.yaml: damaged, not valid YAML"),
        ("run", "config.yaml", None, "config.yaml is missing; it says which slice this ran on"),
        ("load", "cells/0.json", "{", "0.json: damaged"),
        ("load", "config.yaml", "a: [", "config.yaml: damaged, not valid YAML"),
    ],
)
def test_a_damaged_record_is_named(request, record, file, content, message):
    folder = request.getfixturevalue(record)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises(UserError, match=message):
        read([str(folder)])


def test_a_run_that_failed_before_it_trained_has_no_cost(run):
    (run / "result.json").write_text('{"kind": "training", "version": 1, "status": "failed", "error": "no rows"}')
    with pytest.raises(UserError, match="one: the run failed before it trained"):
        read([str(run)])


def test_a_plan_and_a_run_are_held_against_what_they_train(tmp_path):
    """Fewer layers and whole modules beside them: another ceiling than that of adapters everywhere."""
    known = json.loads((EXPERIMENTS / "plans/results/gemma4_31b_v5p8_lora_fsdp1_tp4.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps(known))
    lora = LoraConfig(rank=2, layers=["-6-"], modules_to_train=["norms", "embeddings"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"lora": asdict(lora)}))
    (plan,) = read([str(tmp_path)]).trainings
    assert plan.lora == replace(lora, rank=known["lora_rank"])
    (alone,) = read([str(tmp_path / "plan.json")]).trainings
    assert alone.lora == LoraConfig(rank=known["lora_rank"])


def test_a_plan_that_does_not_fit_costs_nothing(tmp_path, caplog):
    known = json.loads((EXPERIMENTS / "v6e8_qlora/plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps(known | {"fits": False}))
    assert read([str(tmp_path)]) == Figures()
    assert "skipped, the plan does not fit" in caplog.text


def test_a_folder_without_a_record_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"no run \(result\.json, config\.yaml\), plan \(plan\.json\), evaluation, bench"
    ):
        read([str(tmp_path)])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("label: guessed", "label='guessed' source='me': give label as one of measured, estimated, quoted, given"),
        ("point: []", "no such key 'point'; did you mean points"),
        ("setups: {a: {slice: v6e-9, model: gemma4_31b}}", "setups.a: slice='v6e-9': give one of"),
        ("setups: {a: {slice: v6e-8, model: gemma}}", "setups.a: model='gemma': give one of gemma4_31b"),
        ("setups: {a: {slice: v6e-8, model: tiny, kv_dtype: fp9}}", "setups.a: kv_dtype='fp9': give one of"),
        ("points: [{name: x, setup: b}]", "points.0: setup='b': no such setup"),
        ("trainings: [{name: x, slice: v5p-8}]", "trainings.0: hours missing"),
        ("trainings: [{name: x, slice: v5p, hours: 1}]", "trainings.0: slice='v5p': give one of v5p-8"),
        ("trainings: [{name: x, slice: v5p-8, hours: long}]", "trainings.0: hours='long': give a number"),
        (
            "trainings: [{name: x, slice: v5p-8, hours: 1, rate_over_hours: true}]",
            "give real_tokens_per_second and hours",
        ),
        ("evaluations: [{name: x, slice: v6e-8, samples: 1, passing: 1, model: big}]", "evaluations.0: model='big'"),
        ("benchmarks: [{folder: gone}]", "benchmarks.0: folder='gone': contains no results of a benchmark"),
        ("points: [", "not valid YAML"),
    ],
)
def test_what_is_wrong_with_written_figures_is_said(tmp_path, entry, message):
    label = "" if entry.startswith("label") else "label: given\n"
    (tmp_path / "figures.yaml").write_text(f"source: me\n{label}{entry}\n")
    with pytest.raises(UserError) as refused:
        read([str(tmp_path)])
    assert message in str(refused.value)
    assert str(tmp_path / "figures.yaml") in str(refused.value)


def test_a_rate_is_multiplied_with_hours_only_where_it_is_their_mean(tmp_path):
    """One that leaves out compilation is not the rate of the hours that are paid for."""
    entry = "name: x, slice: v5p-8, hours: 2, real_tokens_per_second: 1000"
    rows = [f"trainings: [{{{entry}}}]", f"trainings: [{{{entry}, rate_over_hours: true}}]"]
    tokens = []
    for row in rows:
        (tmp_path / "figures.yaml").write_text(f"source: me\nlabel: quoted\n{row}\n")
        (training,) = read([str(tmp_path)]).trainings
        tokens.append(training.real_tokens)
    assert tokens == [None, 7_200_000]


def test_a_benchmark_is_given_a_setup_by_a_written_file(tmp_path, load):
    (load / "config.yaml").unlink()
    (tmp_path / "figures.yaml").write_text(
        "label: given\nsource: me\n"
        "setups: {tuned: {slice: v6e-8, model: gemma4_31b, weights_dtype: fp8, replicas: 2}}\n"
        "benchmarks: [{folder: bench, setup: tuned, system: TPU}]\n"
    )
    (point,) = read([str(tmp_path / "figures.yaml")]).points
    assert (point.label, point.system, point.slice, point.serving.replicas) == (MEASURED, "TPU", "v6e-8", 2)
