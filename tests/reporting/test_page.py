"""`python -m gemma4_tpu.report run=<run folder>`: what it finds, what it says, and what it says is not there."""

import json
import re

import gcsfs
import pytest
import yaml

from gemma4_tpu.evals.harness import HarnessMetric, HarnessOutcome, HarnessTask
from gemma4_tpu.report import main, spelt_out
from gemma4_tpu.reporting.html import html_page
from gemma4_tpu.tracking.files import read_json
from gemma4_tpu.tracking.records import HARNESS, write_record
from tests.reporting.conftest import ENDPOINT, EXPERIMENTS, evaluate, leave, merge, plan, serve, train, words_of

RECORD = read_json(EXPERIMENTS / "smoke" / "result.json")
LOSSES = f"{RECORD['heldout_loss_first']:.4f} → {RECORD['heldout_loss_last']:.4f}"
TOKENS = f"{RECORD['real_tokens']:,}, {RECORD['target_tokens']:,} of them with loss, fill {RECORD['fill']:.1%}"


def report(*words):
    assert main(list(words)) == 0


def refusal(capsys, *words):
    capsys.readouterr()
    assert main(list(words)) == 2
    return capsys.readouterr().err


@pytest.fixture
def everything(run):
    merge(run)
    evaluate(run / "evaluations/1", "run", [2, 2, 1, 0])
    evaluate(run / "evaluations/1/base", "base", [0, 0, 0, 0])
    serve(run / "servings/1", run)
    return run


def test_one_page_from_plan_to_cost(everything, tmp_path, capsys):
    planned = read_json(plan(tmp_path / "planned") / "plan.json")
    report(f"run={everything}", f"records={tmp_path / 'planned'}", "prices={local: 0.36}", "serving_hours=[2]")
    assert "1 plan, 1 merge, 1 evaluation, 1 serving, 0 benchmarks" in capsys.readouterr().out
    told = words_of(everything / "report.md")
    for heading in ("At a glance", "Plan", "Training", "Merged model", "Evaluation", "Serving", "Cost",
                    "Configuration", "Provenance"):  # fmt: skip
        assert f"## {heading} " in told
    for row in (
        f"| Held-out loss, before and after | {LOSSES} | *measured* |",  # training
        f"| Real tokens | {TOKENS} | *measured* |",
        f"| Run | gemma4_31b, qlora nf4 r=64, remat {planned['remat']}, on v6e-8 (",  # plan
        "| Logits off by | 3.3e-03 (3.1e-03 is rounding to bfloat16) | *measured* |",  # merge
        "| 1 | run | verilog_smoke | 4 | 2 | strict | @1 **0.625** |",  # evaluation
        "| 1 | base | verilog_smoke | 4 | 2 | strict | @1 **0.000** |",
        "answers 4 of 4 stored prompts like the merged model",  # serving
        "| local | on demand | $0.36 | | this report | given |",  # cost
        "- `experiment=smoke`",  # configuration
        f"commit `{read_json(everything / 'provenance.json')['code']['git_commit'][:12]}`",  # provenance
    ):
        assert row in told.replace("\\_", "_").replace("\\#", "#"), row
    assert "run is 0.625 above base" in told
    assert re.search(r"real tokens trained, [\d,]+ tokens/s with a limit of [\d,]+ tokens/s, \d+%: \*\*possible", told)
    assert "*estimated* by the TPU compiler" in told


def test_each_figure_in_a_table_of_facts_says_who_says_so(everything):
    report(f"run={everything}")
    lines = (everything / "report.md").read_text().splitlines()
    start = lines.index("### Result")
    rows = [line.split(" | ") for line in lines[start + 4 : lines.index("### Data")] if line.startswith("|")]
    unmarked = [row[0] for row in rows if not re.match(r"\*(measured|estimated|quoted)\*", row[2])]
    assert unmarked == ["| Status", "| Peak device memory"]  # `not reported by this backend`


def test_what_is_not_there_is_said_in_a_line(run, capsys):
    report(f"run={run}")
    told = words_of(run / "report.md")
    for line in (
        "No plan was found", "Not merged", "Not evaluated", "Not served", "Not benchmarked",
        "Not recorded, so not drawn: device memory", "Not judged: no peaks are known for local",
        "No price is known for local",
    ):  # fmt: skip
        assert told.count(line) == 1
    of_run = [f"{name} run=outputs" for name in ("merge", "evaluate", "serve")]
    for words in ("plan replay=outputs", *of_run, "bench served="):
        assert f"`python -m gemma4_tpu.{words}" in told
    assert "$" not in told.replace("'prices={", "")


def test_device_memory_is_drawn_where_it_is_counted(run):
    rows = [json.loads(line) | {"hbm_bytes": 3 << 30} for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report(f"run={run}")
    assert "![hbm](report_plots/hbm.png)" in (run / "report.md").read_text()
    assert "Not recorded" not in (run / "report.md").read_text()


def test_a_run_that_is_not_over_and_one_that_failed(run):
    (run / "result.json").unlink()
    report(f"run={run}")
    told = words_of(run / "report.md")
    assert "No `result.json`: the run has not ended, or it was killed." in told
    assert "| Training | has not ended |" in told
    failed = train(run.with_name("failed"), status="failed", error="update 3: loss nan | see log.txt")
    report(f"run={failed}")
    assert r"failed: update 3: loss nan \| see log.txt" in words_of(failed / "report.md")


def test_records_whose_work_failed_are_named(run):
    leave(run / "evaluations/1", {"eval": {}}, status="failed", error="no simulator")
    leave(run / "merges/1", {"export": {}}, status="failed", error="the disk is full")
    leave(run / "benchmarks/1", {"bench": {}})
    report(f"run={run}")
    told = words_of(run / "report.md")
    assert "1: failed: no simulator." in told
    assert "| Status | failed: the disk is full |" in told
    assert "1: not finished (no `result.json`)." in told


def test_records_elsewhere_are_found_where_they_name_the_run(run, tmp_path, capsys):
    server, outputs = serve(run / "servings/1", run), tmp_path / "outputs"
    leave(outputs / "benchmarks/ours", {"bench": {}, "served": str(server)})
    leave(outputs / "benchmarks/other", {"bench": {}, "served": "outputs/train/smoke2/servings/1"})
    evaluate(outputs / "evaluations/ours", "endpoint", [1], **ENDPOINT)
    evaluate(outputs / "evaluations/moved", "model", [1], config={"model": {"path": str(run / "merged")}})
    evaluate(outputs / "evaluations/other", "endpoint", [1], **{**ENDPOINT, "model": "smoke2"})
    leave(outputs / "plan/ours", {"plan": {}, "replay": str(run)})
    report(f"run={run}")
    assert "1 plan, 0 merges, 2 evaluations, 1 serving, 1 benchmark" in capsys.readouterr().out
    told = (run / "report.md").read_text()
    assert "| moved | model |" in told and "| ours | endpoint |" in told and "other" not in told


def test_scores_of_lm_eval_have_a_section_of_their_own(run):
    for name, value in (("base", 0.75), ("tuned", 0.25)):
        folder = leave(run / "evaluations" / name, {"eval": {}})
        write_record(folder / "record.json", HARNESS, {})
        metric = HarnessMetric(value=value, stderr=0.01, higher_is_better=True)
        task = HarnessTask(version="1.0", documents=100, shots=5, metrics={"acc,none": metric})
        HarnessOutcome(model=name, lm_eval="0.4.13", settings={}, tasks={"arc": task}).write(folder)
    report(f"run={run}")
    told = words_of(run / "report.md")
    assert "## Other benchmarks " in told
    assert "| tuned | tuned | arc | 1.0 | 5 | 100 | acc,none ↑ | 0.2500 | 0.0100 |" in told
    assert "base 0.7500, tuned 0.2500: +0.5000 [+0.4723, +0.5277], by standard errors: better" in told.replace("\\", "")


def test_several_runs_side_by_side(run, tmp_path, capsys):
    second = train(tmp_path / "outputs/train/second", heldout_loss_last=0.3)
    config = yaml.safe_load((second / "config.yaml").read_text())
    config["lora"]["rank"] = 99
    (second / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    evaluate(second / "evaluations/1", "run", [2])
    report(f"run=[{run},{second}]", "out=both.md")
    told = words_of(tmp_path / "both.md")
    heads, row = "| configuration | train/smoke | train/second |", "| `lora.rank` | 4 | 99 | | result |"
    assert f"{heads} |---|---|---| {row}" in re.sub("-{3,}", "---", told)
    assert f"| Held-out loss, before and after | {LOSSES} | {LOSSES.split()[0]} → 0.3000 | *measured* |" in told
    assert "| train/second | pass@1 on verilog\\_smoke, run | 1.000" in told
    assert "## train/smoke" in told and "### Training" in told and told.count("## Cost") == 1
    drawn = {path.name for path in (tmp_path / "both_plots").iterdir() if path.suffix}
    assert drawn == {"loss.png", "heldout_loss.png", "learning_rate.png", "throughput.png"}
    default = (tmp_path / "outputs").glob("reports/*/report.html")
    assert not list(default)
    report(f"run=[{run},{second}]")
    assert len(list((tmp_path / "outputs").glob("reports/*/report.html"))) == 1


def test_a_run_on_a_bucket(run, tmp_path, bucket, capsys):
    place = f"{bucket}/runs/one"
    merge(run)
    files = gcsfs.GCSFileSystem()
    for path in run.rglob("*"):
        if path.is_file():
            files.pipe_file(f"{place}/{path.relative_to(run).as_posix()}", path.read_bytes())
    report(f"run={place}")
    assert "1 merge" in capsys.readouterr().out
    page = tmp_path / "outputs/gs" / place.removeprefix("gs://") / "report.md"
    assert LOSSES in page.read_text()


def test_refusals(run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    second, lost = train(tmp_path / "second"), evaluate(tmp_path / "lost", "endpoint", [1])
    assert "not a run folder" in refusal(capsys, "run=empty")
    assert "run=gone: no such folder" in refusal(capsys, "run=gone")
    assert "is given twice" in refusal(capsys, f"run=[{run},{run}]")
    assert "not the folder of a training run" in refusal(capsys, f"run={leave(tmp_path / 'merged', {'export': {}})}")
    assert "no plan (plan.json), evaluation" in refusal(capsys, f"run={run}", "records=empty")
    assert "names none of the runs" in refusal(capsys, f"run=[{run},{second}]", f"records={lost}")
    assert "a name that ends in .md" in refusal(capsys, f"run={run}", "out=page.html")
    assert "records=['empty']: only with run=<folder>" in refusal(capsys, f"cost={run}", "records=empty")
    (run / "result.json").write_text("{")
    assert "result.json" in refusal(capsys, f"run={run}")


def test_folders_need_no_brackets():
    assert spelt_out(["run=a/b", "records=c d.json"]) == ["run=[a/b]", "records=['c d.json']"]
    assert spelt_out(["run=[a,b]", "out=c.md"]) == ["run=[a,b]", "out=c.md"]
    assert spelt_out(["run", "a", "b", "out=c.md"]) == ["run=[a,b]", "out=c.md"]


def test_texts_of_records_stay_texts(run):
    """Whatever a record holds: no element, no row, no link comes of it."""
    nasty = "<script>alert(1)</script> | `x` **b** [l](http://example.com/x.png) ![i](http://example.com/y.png)"
    run = train(run.with_name("nasty"), status="failed", error=nasty)
    (run / "overrides.yaml").write_text(yaml.safe_dump([nasty]))
    report(f"run={run}")
    page = (run / "report.html").read_text()
    assert page.count("&lt;script&gt;") == 2  # in the status and among the overrides
    assert "<script" not in page and "<b>" not in page
    assert not re.search(r'(src|href)="(?!data:|#|[\w/]+\.(md|json)")', page)


def test_the_html_holds_its_pictures(run):
    report(f"run={run}")
    page = (run / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 3
    assert "default-src 'none'" in page
    made = html_page("# Title\n\n![gone](gone.png) ![net](http://127.0.0.1/x.png)\n\n*measured* and *so*\n", run)
    assert "(no image: gone)" in made and "(no image: net)" in made and "127.0.0.1" not in made
    assert '<em class="by measured">measured</em> and <em>so</em>' in made
    assert "<title>Title</title>" in made
    assert html_page("| a |\n|---|\n| failed: x |\n| **impossible** |\n| ok |\n", run).count('<td class="bad">') == 2
