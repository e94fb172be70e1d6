"""metrics.jsonl: strict rows, in order, without gap or duplicate whatever happened before."""

import json
import math

import numpy as np
import pytest

from gemma4_tpu.tracking.metrics import MetricsFile, read_metrics


def write(path, updates, after_update=None):
    metrics = MetricsFile(path, after_update=after_update)
    for update in updates:
        metrics.log({"loss": 0.5 * update, "é": 1}, update)
        if update % 2 == 0:
            metrics.log({"heldout": update}, update)
    metrics.close()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_rows_are_there_as_soon_as_log_returns(path):
    metrics = MetricsFile(path)
    metrics.log({"loss": np.float32(0.5), "tokens": np.int64(7)}, 1)
    assert read_metrics(path) == [{"update": 1, "loss": 0.5, "tokens": 7}]


def test_numbers_that_are_not_finite_stay_strict_json_and_read_back(path):
    MetricsFile(path).log({"a": float("nan"), "b": np.float32("inf"), "c": float("-inf")}, 1)

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    (row,) = read_metrics(path)
    assert math.isnan(row["a"])
    assert (row["b"], row["c"]) == (math.inf, -math.inf)


def test_killed_at_any_byte_and_resumed_from_any_earlier_update_the_file_is_the_uninterrupted_one(path):
    write(path, range(5))
    whole = path.read_bytes()
    for end in range(len(whole) + 1):
        logged = whole[:end].count(b"\n")
        last_whole_update = json.loads(whole.splitlines()[logged - 1])["update"] if logged else -1
        # all rows of an update precede its checkpoint, so a checkpoint can exist up to the update before the last
        for checkpoint in [None, *range(0, last_whole_update, 2)]:
            path.write_bytes(whole[:end])
            write(path, range(0 if checkpoint is None else checkpoint + 1, 5), after_update=checkpoint)
            assert path.read_bytes() == whole, (end, checkpoint)


def test_a_torn_last_line_is_left_out_on_reading(path):
    path.write_text('{"update": 1}\n{"update": 2}\n{"upda')
    assert read_metrics(path) == [{"update": 1}, {"update": 2}]


def test_damage_in_the_middle_is_an_error_that_names_the_line(path):
    path.write_text('{"update": 1}\n{"upd\n{"update": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)


def test_updates_cannot_go_back(path):
    metrics = MetricsFile(path, after_update=5)
    with pytest.raises(ValueError, match="update 4 after those of update 5"):
        metrics.log({}, 4)


def test_other_processes_write_nothing(path):
    metrics = MetricsFile(path, write=False)
    metrics.log({"loss": 1.0}, 1)
    metrics.close()
    assert not path.exists()
    assert read_metrics(path) == []
