"""Records that are valid JSON or YAML, with values that nothing of ours writes: one message that names the file."""

import json
import math
import random
import shutil
from pathlib import Path

import pytest
import yaml

from gemma4_tpu.errors import UserError
from gemma4_tpu.evals.harness import HarnessMetric, HarnessOutcome, HarnessTask
from gemma4_tpu.report import main
from gemma4_tpu.reporting import curves, page
from gemma4_tpu.tracking.files import read_json, write_json
from gemma4_tpu.tracking.records import CELL, HARNESS, LOAD_TEST, write_record
from tests.reporting.conftest import EXPERIMENTS, evaluate, leave, merge, plan, serve

WRONG = ("x", None, [1], {"a": {"b": "x"}}, True, 7, -1, 0, math.nan, 1.5, [], {}, "")
"""Values that take each other's place."""
SAMPLED = 700
"""Mutations that the test tries, of about ten times as many."""
CELL_FIGURES = {
    "completed": 10, "total_input_tokens": 3840, "total_output_tokens": 1280, "output_throughput": 100.0,
    "request_rate": "inf", "max_concurrency": 4, "state": "ok", "median_ttft_ms": 12.0, "median_tpot_ms": 3.0,
}  # fmt: skip


@pytest.fixture
def everything(run, tmp_path, monkeypatch):
    """A run with records of every kind that a report reads."""
    merge(run)
    evaluate(run / "evaluations/1", "run", [2, 2, 1, 0], temperature=0.8)
    evaluate(run / "evaluations/1/base", "base", [0, 0, 0, 0], temperature=0.8)
    server = serve(run / "servings/1", run)
    for name, source in (("planned", "v6e8_qlora/plan.json"), ("scheduled", "plans/results"), ("drawn", "codev")):
        plan(run / "plans" / name)
        shutil.copy(SOURCES[name](), run / "plans" / name / "plan.json")
    for name in ("certificate.json", "validation.jsonl"):
        shutil.copy(EXPERIMENTS / "grpo_smoke" / name, run)
    test = leave(run / "benchmarks/1", {"bench": {}, "served": str(server)})
    write_record(test / "result.json", LOAD_TEST, {"status": "finished", "peak_output_throughput": 100.0})
    (test / "cells").mkdir()
    write_record(test / "cells/0.json", CELL, CELL_FIGURES)
    for name in ("a", "b"):
        folder = leave(run / "evaluations" / name, {"eval": {}})
        write_record(folder / "record.json", HARNESS, {})
        metric = HarnessMetric(value=0.5, stderr=0.01, higher_is_better=True)
        task = HarnessTask(version="1.0", documents=100, shots=5, metrics={"acc,none": metric})
        HarnessOutcome(model=name, lm_eval="0.4.13", settings={}, tasks={"arc": task}).write(folder)
    monkeypatch.setattr(curves, "_draw", lambda curve, lines, runs, path: path)
    monkeypatch.setattr(page, "html_page", lambda text, folder: "")
    return run


def _plan_with(test):
    paths = sorted([*EXPERIMENTS.glob("*/plan.json"), *EXPERIMENTS.glob("*/plans/*.json"), *EXPERIMENTS.glob("plans/results/*.json")])  # fmt: skip
    return next(path for path in paths if test(read_json(path)))


SOURCES = {
    "planned": lambda: EXPERIMENTS / "v6e8_qlora/plan.json",
    "scheduled": lambda: _plan_with(lambda told: told.get("step_seconds")),
    "drawn": lambda: _plan_with(lambda told: told.get("rollouts")),
}


def places(value, at=()):
    """Where a value can be changed: every key and the first item of every list, at any depth."""
    inside = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, one in inside:
        yield (*at, key)
        yield from places(one, (*at, key))


def changed(value, at, new):
    """A copy with another value at a place; `KeyError`: without that key."""
    copy = json.loads(json.dumps(value))
    inner = copy
    for key in at[:-1]:
        inner = inner[key]
    if new is KeyError:
        del inner[at[-1]]
    else:
        inner[at[-1]] = new
    return copy


def mutations(folder: Path):
    """(file, content) of everything that can be changed in the records of a folder."""
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".json":
            content = json.loads(path.read_text())
            for at in places(content):
                yield from ((path, at, new, json.dumps(changed(content, at, new))) for new in (*WRONG, KeyError))
            yield from ((path, (), new, json.dumps(new)) for new in WRONG)
        elif path.suffix == ".jsonl":
            first, *rest = path.read_text().splitlines()
            for at in places(json.loads(first)):
                for new in (*WRONG, KeyError):
                    yield path, at, new, "\n".join([json.dumps(changed(json.loads(first), at, new)), *rest]) + "\n"
        elif path.name == "config.yaml":
            content = yaml.safe_load(path.read_text())
            for at in places(content):
                yield from ((path, at, new, yaml.safe_dump(changed(content, at, new))) for new in (*WRONG, KeyError))


def test_a_report_of_damaged_values_is_a_page_or_one_message(everything, tmp_path, capsys):
    whole = list(mutations(everything))
    assert len(whole) > 10 * SAMPLED
    tried = random.Random(0).sample(whole, SAMPLED)
    words = [f"run={everything}", f"out={tmp_path / 'page.md'}", "serving_hours=[2]", "prices={local: 0.36}"]
    assert main(words) == 0
    refused = 0
    for path, at, new, content in tried:
        before = path.read_bytes()
        path.write_text(content)
        capsys.readouterr()
        try:
            code = main(words)
        except Exception as error:
            raise AssertionError(f"{path}: {at} = {new!r}: {error!r}") from error
        told = capsys.readouterr().err
        path.write_bytes(before)
        if code == 2:
            refused += 1
            assert str(path.name) in told, (path, at, new, told)
        else:
            assert code == 0
    assert refused > SAMPLED / 4
