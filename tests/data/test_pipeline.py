"""What updates hold: every example once per epoch, the same on any number of processes, and after any restart."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from gemma4_tpu.config.schema import DataConfig
from gemma4_tpu.data.pipeline import Pipeline, heldout_batches
from gemma4_tpu.errors import UserError
from tests.data.conftest import make_examples

LENGTHS = np.random.default_rng(7).integers(3, 40, 101).tolist()
DATA = DataConfig(sequence_length=64, packing="true")
PACKINGS = ["true", "false", "buckets"]


def pipeline(lengths=LENGTHS, data=DATA, rows_per_update=6, seed=3, epochs=2, **options):
    return Pipeline(
        examples=make_examples(lengths), data=data, rows_per_update=rows_per_update, seed=seed, epochs=epochs, **options
    )


def visits(updates):
    return Counter(index for update in updates for group in update.rows for row in group for index in row)


def same(left, right):
    return left.arrays.keys() == right.arrays.keys() and all(
        np.array_equal(left.arrays[name], right.arrays[name]) for name in left.arrays
    )


def test_arrays_of_a_row_by_hand():
    examples = make_examples([3, 2])  # ids 1..4 with loss on 3, 4; ids 1001..1003 with loss on 1003
    data = DataConfig(sequence_length=7, packing="true", shuffle=False)
    (update,) = Pipeline(examples=examples, data=data, rows_per_update=1, seed=0, epochs=1)
    row = {name: array[0, 0].tolist() for name, array in update.arrays.items()}
    assert row["tokens"] == [1, 2, 3, 1001, 1002, 0, 0]
    assert row["targets"] == [2, 3, 4, 1002, 1003, 0, 0]  # never across a segment's end
    assert row["target_mask"] == [False, True, True, False, True, False, False]
    assert row["segment_ids"] == [1, 1, 1, 2, 2, 0, 0]
    assert row["positions"] == [0, 1, 2, 0, 1, 0, 0]
    assert {name: str(array.dtype) for name, array in update.arrays.items()} == {
        **dict.fromkeys(["tokens", "targets", "segment_ids", "positions"], "int32"),
        "target_mask": "bool",
    }
    assert (update.real_tokens, update.target_tokens, update.fill, update.epoch) == (5, 3, 5 / 7, 1.0)


@pytest.mark.parametrize("packing", PACKINGS)
def test_each_epoch_visits_every_example_once(packing):
    updates = list(pipeline(data=replace(DATA, packing=packing), epochs=3))
    assert visits(updates) == dict.fromkeys(range(len(LENGTHS)), 3)
    assert sum(update.real_tokens for update in updates) == 3 * sum(LENGTHS)
    assert sum(update.target_tokens for update in updates) == 3 * int(make_examples(LENGTHS).targets.sum())
    epochs = [update.epoch for update in updates]
    assert epochs == sorted(epochs)
    assert epochs[-1] == 3


@pytest.mark.parametrize("packing", PACKINGS)
def test_only_the_last_update_of_a_run_may_be_partial(packing):
    updates = list(pipeline(data=replace(DATA, packing=packing), rows_per_update=7))
    full = [all(row for group in update.rows for row in group) for update in updates]
    assert all(full[:-1])
    assert not full[-1]
    assert not updates[-1].arrays["segment_ids"][0, -1].any()  # an empty row is all padding


@pytest.mark.parametrize("packing", PACKINGS)
def test_counts_and_shapes(packing):
    run = pipeline(data=replace(DATA, packing=packing), microbatches=3)
    updates = list(run)
    assert len(updates) == run.total_updates
    for update in updates:
        length = update.arrays["tokens"].shape[-1]
        assert length in run.lengths
        assert all(array.shape == (3, 2, length) for array in update.arrays.values())
        assert update.real_tokens == np.count_nonzero(update.arrays["segment_ids"])
        assert update.target_tokens == np.count_nonzero(update.arrays["target_mask"])
        assert update.fill == update.real_tokens / (6 * length)


def test_order_depends_on_seed_and_epoch():
    def order(update_list):
        return [index for update in update_list for group in update.rows for row in group for index in row]

    data = replace(DATA, packing="false")
    once = order(pipeline(data=data))
    assert once == order(pipeline(data=data))
    assert once != order(pipeline(data=data, seed=4))
    assert once[: len(LENGTHS)] != once[len(LENGTHS) :]
    unshuffled = order(pipeline(data=replace(data, shuffle=False)))
    assert unshuffled == [*range(len(LENGTHS))] * 2


@pytest.mark.parametrize("packing", PACKINGS)
def test_two_halves_make_the_whole(packing):
    data = replace(DATA, packing=packing)
    whole = list(pipeline(data=data, microbatches=3))
    first = list(pipeline(data=data, microbatches=3, row_slice=(0, 1)))
    second = list(pipeline(data=data, microbatches=3, row_slice=(1, 2)))
    assert len(whole) == len(first) == len(second)
    for all_rows, left, right in zip(whole, first, second, strict=True):
        for name, array in all_rows.arrays.items():
            assert np.array_equal(array, np.concatenate([left.arrays[name], right.arrays[name]], axis=1))
        assert (left.real_tokens, left.target_tokens) == (all_rows.real_tokens, all_rows.target_tokens)


def test_microbatches_split_the_same_rows():
    for one, many in zip(pipeline(), pipeline(microbatches=6), strict=True):
        for name in one.arrays:
            assert np.array_equal(one.arrays[name].reshape(6, 1, -1), many.arrays[name])


def test_a_longer_run_begins_with_the_shorter_one():
    by_updates = list(pipeline(epochs=None, max_updates=9))
    assert len(by_updates) == 9
    shorter = list(pipeline(epochs=1.5))
    longer = list(pipeline(epochs=3))
    assert all(same(*pair) for pair in zip(by_updates, longer, strict=False))
    assert all(same(*pair) for pair in zip(shorter, longer, strict=False))
    assert shorter[-2].epoch < 1.5 <= shorter[-1].epoch
    assert len(list(pipeline(epochs=2, max_updates=5))) == 5


def test_less_data_than_one_update_still_trains_on_all_of_it():
    updates = list(pipeline(lengths=[5, 6], rows_per_update=8, epochs=1))
    assert len(updates) == 1
    assert visits(updates) == {0: 1, 1: 1}
    assert len(list(pipeline(lengths=[5, 6], rows_per_update=8, epochs=None, max_updates=3))) == 3


def test_weights_decide_how_often_sources_are_visited():
    examples = make_examples([5] * 30, weights=(0.5, 1.0, 2.3), sources=[0] * 10 + [1] * 10 + [2] * 10)
    data = replace(DATA, packing="false")
    run = Pipeline(examples=examples, data=data, rows_per_update=1, seed=0, epochs=4)
    counted = visits(run)
    per_source = [sum(counted[i] for i in range(k, k + 10)) for k in (0, 10, 20)]
    assert per_source == [4 * 5, 4 * 10, 4 * 23]
    assert all(counted[i] == 4 for i in range(10, 20))
    assert all(counted[i] >= 8 for i in range(20, 30))
    assert len({counted[i] for i in range(10)}) > 1  # the half is drawn anew for each epoch


def test_offending_rows_are_named():
    update = next(pipeline(data=replace(DATA, packing="false"), microbatches=3))
    rows = update.origins(microbatch=1)
    assert len(rows) == 2
    index = update.rows[1][0][0]
    assert str(rows[0][0]) == f"part0.jsonl:{index + 1}"
    assert len(update.origins()) == 6


@pytest.mark.parametrize("packing", PACKINGS)
def test_restored_position_continues_bit_identically(packing):
    data = replace(DATA, packing=packing)
    run = pipeline(data=data)
    total = run.total_updates
    expected = list(pipeline(data=data))
    for _ in range(total // 3):
        next(run)
    state = json.loads(json.dumps(run.get_state()))
    rest = list(run)
    assert all(same(*pair) for pair in zip(rest, expected[total // 3 :], strict=True))
    fresh = pipeline(data=data, microbatches=2)  # may differ: the position is in updates
    fresh.set_state(state)
    again = list(fresh)
    assert len(again) == len(rest)
    assert all(left.rows == [[row for g in right.rows for row in g][i : i + 3] for i in (0, 3)]
               for left, right in zip(again, rest, strict=True))  # fmt: skip
    run.set_state(state)  # back, in the same object
    assert all(same(*pair) for pair in zip(run, rest, strict=True))


def test_position_at_the_end_of_a_run_stays_there():
    run = pipeline(epochs=1)
    list(run)
    fresh = pipeline(epochs=1)
    fresh.set_state(run.get_state())
    assert list(fresh) == []


CONTINUE = """
import json, sys, zlib
from tests.data.test_pipeline import pipeline
run = pipeline()
run.set_state(json.loads(sys.argv[1]))
print([zlib.crc32(array.tobytes()) for update in run for array in update.arrays.values()])
"""


@pytest.mark.slow
def test_restored_position_continues_in_a_new_process():
    import zlib

    run = pipeline()
    for _ in range(run.total_updates // 2):
        next(run)
    state = json.dumps(run.get_state())
    expected = [zlib.crc32(array.tobytes()) for update in run for array in update.arrays.values()]
    done = subprocess.run([sys.executable, "-c", CONTINUE, state], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == expected


def test_position_of_another_pipeline_is_refused_with_the_difference():
    state = json.loads(json.dumps(pipeline().get_state()))
    for other, shown in [
        (pipeline(seed=4), "seed: saved 3, now 4"),
        (pipeline(data=replace(DATA, sequence_length=128)), "sequence_length: saved 64, now 128"),
        (pipeline(data=replace(DATA, packing="false")), "packing: saved 'true', now 'false'"),
        (pipeline(rows_per_update=12), "rows_per_update: saved 6, now 12"),
        (pipeline(lengths=LENGTHS[:-1]), "examples: saved"),
    ]:
        with pytest.raises(UserError, match=shown):
            other.set_state(state)


def test_heldout_pass_is_fixed_and_whole():
    examples = make_examples(LENGTHS)
    first = list(heldout_batches(examples, DATA, rows_per_update=4))
    again = list(heldout_batches(examples, DATA, rows_per_update=4))
    assert all(same(*pair) for pair in zip(first, again, strict=True))
    assert visits(first) == dict.fromkeys(range(len(LENGTHS)), 1)
    assert {update.arrays["tokens"].shape for update in first} == {(1, 4, 64)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": None}, "trainer.epochs nor trainer.max_updates"),
        ({"microbatches": 4}, "6 rows per update .* trainer.microbatches=4"),
        ({"row_slice": (1, 7)}, "row_slice"),
        ({"lengths": [65]}, "65 slots"),
        ({"data": replace(DATA, packing="buckets", buckets=[32, 128])}, "data.buckets"),
    ],
)
def test_impossible_pipelines_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        pipeline(**options)
