"""Shapes of records: what is written passes, and a complaint names the dotted key."""

import dataclasses
import json
import math

import pytest

from gemma4_tpu.benching.all_cells import _OWN
from gemma4_tpu.errors import UserError
from gemma4_tpu.evals.endpoint_responses import _tokens
from gemma4_tpu.evals.harness import HarnessMetric, HarnessOutcome, HarnessTask
from gemma4_tpu.evals.scores import EvaluationOutcome, ProblemOutcome
from gemma4_tpu.evals.simulated import _VERDICT
from gemma4_tpu.evals.store import Samples
from gemma4_tpu.launch.record import _SHAPE, Launch
from gemma4_tpu.planning.estimate import PlanResult
from gemma4_tpu.serving.probe import _stored
from gemma4_tpu.sweeping.plan_check import _read_answer
from gemma4_tpu.sweeping.state import Sweep, SweepJob
from gemma4_tpu.tracking import shapes
from gemma4_tpu.tracking.records import PLAN, TRAINING, read_record
from gemma4_tpu.tracking.result import Result
from gemma4_tpu.tracking.shapes import LATENCIES
from gemma4_tpu.tracking.typed import ANYTHING, COUNT, FINITE, NUMBER, TEXT, each, fields, known, listed, maybe

WRONG = object()
"""A value of no shape."""


def refuses(shape, of, *within):
    """The fields of a dataclass whose value a shape doesn't check."""
    free = {"config", "launch"}
    unchecked = []
    for field in dataclasses.fields(of):
        value = {**EXAMPLES[of], field.name: WRONG}
        for key in reversed(within):
            value = {key: value}
        if shape(value, "") is None and field.name not in free:
            unchecked.append(field.name)
    return unchecked


JOB = {"name": "a", "values": {}, "words": []}
PROBLEM = {"n": 2, "passed": 1, "official": 1, "classes": {}, "truncated": 0}
PLANNED = {
    "fits": False, "slice": "v5p-8", "model": "tiny", "trained": "full", "remat": "none", "mesh": {"fsdp": 4, "tp": 1},
    "chips": 4, "sequence_length": 8, "rows_per_update": 4, "microbatches": 1, "hbm_limit_bytes_per_chip": 1,
    "hbm_bytes_per_chip": 1, "lora_rank": None,
}  # fmt: skip
EXAMPLES = {
    Result: {"status": "stopped", "seconds": 1.0, "updates": 1, "real_tokens": 1, "target_tokens": 1},
    PlanResult: PLANNED,
    EvaluationOutcome: {"name": "run", "benchmark": "b", "settings": {}, "problems": {"p": PROBLEM}},
    HarnessOutcome: {"model": "m", "lm_eval": "0.4", "settings": {}, "tasks": {}},
    Launch: {
        **dict.fromkeys(("id", "project", "zone", "slice", "run_dir", "launch_dir", "created"), "x"), "spot": True,
        "train": [], "after": [], "model_source": None, "launch": {},
    },
}  # fmt: skip
SHAPES = {
    Result: shapes.TRAINING, PlanResult: shapes.PLAN, EvaluationOutcome: shapes.EVALUATION,
    HarnessOutcome: shapes.HARNESS, Launch: _SHAPE,
}  # fmt: skip


@pytest.mark.parametrize("of", list(SHAPES))
def test_every_field_that_is_written_is_checked(of):
    assert SHAPES[of](EXAMPLES[of], "") is None
    assert refuses(SHAPES[of], of) == []


def test_parts_of_records_are_checked():
    for of, shape, whole in (
        (SweepJob, shapes.SWEEP, lambda job: {"entry": "train", "jobs": [job]}),
        (ProblemOutcome, shapes.EVALUATION, lambda one: {**EXAMPLES[EvaluationOutcome], "problems": {"p": one}}),
        (HarnessTask, shapes.HARNESS, lambda one: {**EXAMPLES[HarnessOutcome], "tasks": {"t": one}}),
        (HarnessMetric, shapes.HARNESS, lambda one: {**EXAMPLES[HarnessOutcome], "tasks": {"t": {
            "version": "1", "documents": 1, "shots": None, "metrics": {"m": one}}}}),
    ):  # fmt: skip
        good = {SweepJob: JOB, ProblemOutcome: PROBLEM}.get(of)
        good = good or {"version": "1", "documents": 1, "shots": None, "metrics": {}}
        good = {"value": 1.0, "stderr": None, "higher_is_better": None} if of is HarnessMetric else good
        assert shape(whole(good), "") is None
        for field in dataclasses.fields(of):
            assert shape(whole({**good, field.name: WRONG}), ""), (of, field.name)


@pytest.mark.parametrize(
    ("shape", "value", "told"),
    [
        (TEXT, 3, "the file is 3, not text"),
        (fields({"a": COUNT}), {"b": 1}, "a is missing"),
        (fields({"a": COUNT}), {"a": True}, "a is True, not a count"),
        (fields({"a": COUNT}), {"a": None}, "a is null, not a count"),
        (fields({"a": NUMBER}), {"a": "1"}, "a is '1', not a number"),
        (fields({"a": NUMBER}), {"a": 10**400}, "not a number"),
        (fields({"a": FINITE}), {"a": math.nan}, "a is nan, not a finite number"),
        (known(a=each(listed(maybe(TEXT)))), {"a": {"b": ["x", [1]]}}, "a.b[1] is a list, not text"),
        (fields({"a": COUNT}), [1], "the file is a list, not a mapping"),
        (each(TEXT), {"a": "x" * 99, "b": {}}, "b is a mapping, not text"),
    ],
)
def test_a_complaint_names_the_key_what_it_is_and_what_it_should_be(shape, value, told):
    assert told in shape(value, "")


VERDICT = {"kind": "mismatch", "official": None, "mismatches": -1, "samples": 4}
CACHED = {
    "state": "ok", "attempt": 0, "model_id": "m", "completed": 1, "failed": 0, "short_answers": 0, "p99_marked": [],
    "tokens_counted_by": "server", "prefix_cache_hit_tokens": -5.0, "prefix_cache_query_tokens": -9.0,
    **dict.fromkeys(f"{LATENCIES} chunks_per_token".split()),
    **dict.fromkeys(
        ("request_throughput", "output_throughput", "total_token_throughput", "median_sending_lag_ms"), 1.0
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "value"),
    [
        (shapes.CELL, {"request_rate": math.inf}),  # other clients' JSON has Infinity
        (shapes.SERVING, {"probe": {"told": {"told": "answers 1 of 1"}, "other": None}}),  # an adapter of that name
        (shapes.PLAN, {**PLANNED, "cost_analysis": {"flops": -1.0, "bytes_accessed": 2.0}}),
        (_VERDICT, VERDICT),  # a custom bench's counter may overflow
        (_OWN, CACHED),  # counters of several servers behind one address
    ],
)
def test_unusual_values_that_are_written_pass(shape, value):
    assert shape(value, "") is None


def test_a_count_of_tokens_that_is_none_is_unknown():
    assert [_tokens({"completion_tokens": given}) for given in (3, -1, True, 2**70, None)] == [3, *[None] * 4]


def test_unknown_keys_and_missing_optional_ones_pass():
    assert fields({"a": COUNT}, {"b": TEXT})({"a": 1, "later": {"x": [None]}}, "") is None
    assert ANYTHING(None, "") is None


def test_the_refusal_says_what_would_work(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**PLANNED, "chips": "4"}))
    with pytest.raises(UserError, match=r"plan\.json: damaged: chips is '4', not a count; .* or plan again$"):
        read_record(path)
    path.write_text(json.dumps({"kind": PLAN, "version": 1, **PLANNED}))
    with pytest.raises(UserError, match=r"plan\.json: damaged: kind is 'plan', not 'training'"):
        read_record(path, TRAINING)


@pytest.mark.parametrize(
    ("name", "content", "read", "told"),
    [
        ("sweep.json", {"entry": "train", "jobs": [{**JOB, "words": "x"}]}, lambda path: Sweep.open(path.parent),
         r"jobs\[0\]\.words is 'x', not a list"),
        ("samples.jsonl", {"problem": "p", "sample": 0}, Samples, "line 1: damaged .completion is missing"),
        ("probe.json", {"prompts": [{"tokens": "x"}]}, _stored, r"prompts\[0\]\.tokens is 'x', not a list"),
        ("answer.json", {"fits": "yes", "told": "x"}, _read_answer, "fits is 'yes', not true or false"),
    ],
)  # fmt: skip
def test_other_readers_name_the_key_too(tmp_path, name, content, read, told):
    path = tmp_path / name
    path.write_text(json.dumps(content) + "\n")
    with pytest.raises(UserError, match=told):
        read(path)
