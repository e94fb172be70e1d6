"""Records that are valid JSON or YAML, with values that nothing of ours writes: one message that names the file."""

import json
import math
import random
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import yaml

from gemma4_tpu.costing.cost import Prices
from gemma4_tpu.errors import UserError
from gemma4_tpu.evals.harness import HarnessMetric, HarnessOutcome, HarnessTask
from gemma4_tpu.reporting import curves, page
from gemma4_tpu.reporting.costs import CostTerms
from gemma4_tpu.reporting.page import show_runs
from gemma4_tpu.tracking.files import read_json
from gemma4_tpu.tracking.metrics import read_metrics
from gemma4_tpu.tracking.records import CELL, HARNESS, LOAD_TEST, config_of, read_record, result_of, write_record
from tests.reporting.conftest import EXPERIMENTS, evaluate, leave, merge, plan, serve

WRONG = ("x", None, [1], {"a": {"b": "x"}}, True, 7, -1, 0, math.nan, 1.5, [], {}, "")
"""Values that take each other's place."""
READ = 500
"""Mutations whose file is read, of about 16,000."""
REPORTED = 8
"""Of these, both of those that are refused and of those that are not, that go through the whole report."""
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
    for name, source in PLANS.items():
        shutil.copy(source(), plan(run / "plans" / name) / "plan.json")
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
    places = ("*/plan.json", "*/plans/*.json", "plans/results/*.json")
    paths = [path for place in places for path in sorted(EXPERIMENTS.glob(place))]
    return next(path for path in paths if test(read_json(path)))


PLANS = {
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
    """The value with another one at a place; `KeyError`: without that key."""
    if not at:
        return new
    inner = value
    for key in at[:-1]:
        inner = inner[key]
    if new is KeyError:
        del inner[at[-1]]
    else:
        inner[at[-1]] = new
    return value


def written(path: Path, at, new) -> str:
    """The file's text with that change; in the first of several rows."""
    text = path.read_text()
    if path.suffix == ".jsonl":
        first, _, rest = text.partition("\n")
        return json.dumps(changed(json.loads(first), at, new)) + "\n" + rest
    if path.suffix == ".yaml":
        return yaml.safe_dump(changed(yaml.safe_load(text), at, new))
    return json.dumps(changed(json.loads(text), at, new))


def mutations(folder: Path):
    """(file, place, value) of everything that can be changed in the records of a folder."""
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".json", ".jsonl") or path.name == "config.yaml":
            text = path.read_text()
            content = json.loads(text.partition("\n")[0] if path.suffix == ".jsonl" else text) if (
                path.suffix != ".yaml") else yaml.safe_load(text)  # fmt: skip
            yield from ((path, at, new) for at in places(content) for new in (*WRONG, KeyError))
            yield from ((path, (), new) for new in WRONG)


@contextmanager
def damaged(path: Path, at, new):
    """The file with that change, for a while."""
    before = path.read_bytes()
    path.write_text(written(path, at, new))
    try:
        yield
    except UserError as told:
        if path.name not in str(told) or "damaged" not in str(told):
            raise AssertionError(f"{path}: {at} = {new!r}: {told}") from told
        raise
    except Exception as error:
        raise AssertionError(f"{path}: {at} = {new!r}: {error!r}") from error
    finally:
        path.write_bytes(before)


def read(path: Path):
    """What every command that needs this file does first."""
    if path.suffix == ".jsonl":
        read_metrics(path)
    elif path.name == "config.yaml":
        config_of(path.parent)
    elif path.name == "result.json":
        result_of(path.parent)
    else:
        read_record(path, CELL if path.parent.name == "cells" else None)


def report(run: Path):
    prices = Prices(on_demand={"local": 0.36}, spot={})
    terms = CostTerms(prices=prices, serving_hours=[2.0], serving_slices=[])
    assert show_runs([str(run)], [], terms, str(run.parent / "page.md")) == 0


def test_a_report_of_damaged_values_is_a_page_or_one_message(everything):
    """Most are refused as they are read. Of the others, which another type or version could have, and of the refused,
    some go through the whole report.
    """
    report(everything)
    draw = random.Random(0).sample
    tried = draw(list(mutations(everything)), READ)
    refused, passed = [], []
    for one in tried:
        try:
            with damaged(*one):
                read(one[0])
            passed.append(one)
        except UserError:
            refused.append(one)
    assert len(refused) > READ / 3 < len(passed)
    for one in draw(passed, REPORTED):
        with suppress(UserError), damaged(*one):
            report(everything)
    for one in draw(refused, REPORTED):
        with pytest.raises(UserError), damaged(*one):
            report(everything)
