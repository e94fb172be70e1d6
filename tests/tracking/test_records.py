"""Records have a kind and a version; those from before are known by their form."""

import json
import re
from pathlib import Path

import pytest
import yaml

from gemma4_tpu.errors import UserError
from gemma4_tpu.tracking import records
from gemma4_tpu.tracking.result import Result
from gemma4_tpu.tracking.run import RunFolder

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def test_what_is_written_is_read_with_its_kind(tmp_path):
    path = tmp_path / "cell.json"
    records.write_record(path, records.CELL, {"ratio": float("nan"), "state": "failed"}, compact=True)
    assert json.loads(path.read_text()) == {"kind": "cell", "version": 1, "ratio": "NaN", "state": "failed"}
    found = records.read_record(path)
    assert found.kind == records.CELL and list(found.values) == ["ratio", "state"]


def test_a_record_of_a_later_version_is_refused(tmp_path):
    (tmp_path / "plan.json").write_text('{"kind": "plan", "version": 2, "trained": {"rank": 8}}')
    with pytest.raises(UserError, match=r"plan\.json: a plan of version 2; this gemma4-tpu reads up to 1"):
        records.read_record(tmp_path / "plan.json")


@pytest.mark.parametrize("content", ["{", "[1]", "7"])
def test_a_damaged_result_is_named(tmp_path, content):
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(UserError, match=r"result\.json: damaged"):
        records.result_of(tmp_path)


def test_a_run_folder_says_what_it_is_of_while_it_is_under_way(tmp_path):
    config = {"trainer": {}, "plan": {}, "eval": {}}  # whatever its configuration holds
    with_kind = RunFolder.open("", "t", str(tmp_path / "one"), "auto", config=config, kind=records.SERVING)
    assert records.kind_of(with_kind.path) == records.SERVING
    assert not records.result_of(with_kind.path).values
    with pytest.raises(RuntimeError):
        with_kind.work(_fail)
    found = records.result_of(with_kind.path)
    assert (found.kind, found.failed, found.values["error"]) == (records.SERVING, True, "no server")


def _fail() -> int:
    raise RuntimeError("no server")


def test_a_plan_does_not_take_the_folder_of_its_run(tmp_path):
    for kind in (records.PLAN, records.TRAINING, records.PLAN):
        folder = RunFolder.open("", "t", str(tmp_path / "run"), "auto", config={"name": "t"}, kind=kind)
        folder.close()
    assert records.kind_of(tmp_path / "run") == records.TRAINING
    for name in ("record.json", "result.json"):
        (tmp_path / "run" / name).unlink(missing_ok=True)
    (tmp_path / "run/metrics.jsonl").touch()  # of an earlier version
    RunFolder.open("", "t", str(tmp_path / "run"), "auto", config={"name": "t"}, kind=records.PLAN).close()
    assert records.kind_of(tmp_path / "run") == records.TRAINING


def test_a_result_keeps_its_figures(tmp_path):
    result = Result(status="finished", updates=3, real_tokens=7, heldout_loss_last=float("inf"))
    result.write(tmp_path / "result.json")
    assert records.read_record(tmp_path / "result.json").kind == records.TRAINING
    assert Result.read(tmp_path / "result.json") == result


# ── before there were kinds ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["smoke", "verilog_eval_smoke"])
def test_committed_runs_are_trainings(name):
    assert records.kind_of(EXPERIMENTS / name) == records.TRAINING
    found = records.result_of(EXPERIMENTS / name)
    assert found.kind == records.TRAINING and found.values["real_tokens"] > 0


def test_committed_plans_say_their_rank():
    paths = [*EXPERIMENTS.glob("*/plan.json"), *EXPERIMENTS.glob("plans/results/*.json")]
    assert len(paths) > 50
    for path in paths:
        found = records.read_record(path)
        full = found.values["trained"] == "full"
        assert found.kind == records.PLAN
        assert found.values["lora_rank"] == (None if full else int(re.search(r"r=(\d+)", found.values["trained"])[1]))


@pytest.mark.parametrize(
    ("group", "kind"), [("eval", "evaluation"), ("export", "merge"), ("serving", "serving"), ("bench", "load_test")]
)
def test_folders_of_other_commands_are_known_by_their_configuration(tmp_path, group, kind):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({group: {}, "model": {}}))
    (tmp_path / "result.json").write_text('{"status": "failed", "error": "x", "version": "0.9"}')
    assert records.kind_of(tmp_path) == kind
    assert records.result_of(tmp_path).kind == kind


def test_a_result_of_vllm_bench_serve_is_a_cell(tmp_path):
    told = dict.fromkeys(["output_throughput", "total_input_tokens", "total_output_tokens", "completed"], 1)
    (tmp_path / "any.json").write_text(json.dumps(told | {"backend": "vllm"}))
    assert records.read_record(tmp_path / "any.json").kind == records.CELL
