"""Reading a schedule: the text of a program that was compiled to the end, shortened by hand."""

from pathlib import Path

import pytest

from gemma4_tpu.hardware import SLICES
from gemma4_tpu.planning import calibration, counts, hlo, origins, schedule
from gemma4_tpu.planning.calibration import ScheduleRates
from gemma4_tpu.planning.links import Grid
from gemma4_tpu.planning.walk import walk

V5P8 = SLICES["v5p-8"]
GRID = Grid.of(V5P8, [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0)])
TEXT = (Path(__file__).parent / "texts" / "scheduled.hlo").read_text(encoding="utf-8")


def read(text, grid=GRID):
    return schedule.read(hlo.parse(text), origins.read(text), grid)


def test_each_kind_of_operation_is_read():
    ops = {op.name: op for op in read(TEXT)}
    body = {op.name: op for op in ops["loop"].body}
    assert ops["loop"].trips == 10
    assert body["fusion.2"].cycles == 932092
    assert body["copy-start.1"].starts == body["copy-done.1"].waits_for == "copy-start.1"
    assert body["copy-start.1"].transfer.hbm_bytes == 5376 * 5376 * 2  # read there, written to on-chip memory
    reduce = body["all-reduce.1"].transfer
    assert (reduce.sent_bytes, reduce.links, reduce.lanes) == (2 * 3 / 4 * 4096 * 5376 * 2, 2, ("+x", "+y"))
    assert ops["slice-start.1"].transfer.hbm_bytes == 1024
    assert ops["slice-done.1"].waits_for == "slice-start.1"
    assert not {"given", "zero", "a.1", "b.1"} & set(ops)  # take no time


@pytest.mark.parametrize("packages", ["/home/someone/site-packages/", ""], ids=["whole paths", "as plans strip them"])
def test_parts_by_what_is_computed_and_where(packages):
    ops = {op.name: op for op in read(TEXT.replace("/home/someone/site-packages/", packages))}
    body = {op.name: op for op in ops["loop"].body}
    assert body["fusion.2"].part == schedule.BASE
    assert body["fusion.1"].part == schedule.LORA
    assert ops["fusion.3"].part == schedule.OPTIMIZER
    assert ops["zeros"].part == schedule.ELEMENTWISE


def test_operations_tell_their_place_in_our_source():
    ops = {op.name: op for op in read(TEXT)}
    assert ops["loop"].body[1].place == "models/gemma4.py:105 (_project)"
    assert ops["fusion.3"].place == "step/train_step.py:109 (Step.train)"  # the innermost line of ours
    # What the compiler added itself is named after what takes it.
    assert (ops["zeros"].label, ops["zeros"].place) == (
        "broadcast for jvp()/while",
        "step/train_step.py:109 (Step.train)",
    )
    older = TEXT.replace("stack_frame_id=3", 'source_file="/x/gemma4_tpu/step/loss.py" source_line=79')
    assert {op.name: op for op in read(older)}["fusion.3"].place == "step/loss.py:79"
    assert all(not op.place for op in schedule.read(hlo.parse(TEXT), origins.Frames(), GRID))


OFFLOADED = """HloModule jit_train, is_scheduled=true, num_partitions=4

%called (c.0: bf16[1024,5376]) -> bf16[4096,5376] {
  %c.0 = bf16[1024,5376]{1,0} parameter(0)
  ROOT %gather.1 = bf16[4096,5376]{1,0} all-gather(%c.0), replica_groups=[1,4]<=[4], dimensions={0}
}

%async (s.0: bf16[1024,5376]) -> bf16[4096,5376] {
  %s.0 = bf16[1024,5376]{1,0} parameter(0)
  ROOT %call.1 = bf16[4096,5376]{1,0} call(%s.0), to_apply=%called
}

ENTRY %main (a: bf16[1024,5376]) -> bf16[4096,5376] {
  %a = bf16[1024,5376]{1,0} parameter(0)
  %call-start = ((bf16[1024,5376]{1,0}), bf16[4096,5376]{1,0}, u32[]) async-start(%a), calls=%async
  ROOT %call-done = bf16[4096,5376]{1,0} async-done(%call-start)
}
"""


def test_a_collective_that_another_core_runs_takes_its_time_on_the_links():
    """tpu7x gives gathers to its sparse cores, each in a call."""
    start, done = read(OFFLOADED)
    assert (start.part, start.starts, done.waits_for) == (schedule.COLLECTIVES, "call-start", "call-start")
    assert (start.transfer.sent_bytes, start.transfer.links) == (3 / 4 * 4096 * 5376 * 2, 2)


def test_the_whole_is_walked():
    rates = ScheduleRates.of(V5P8)
    told = walk(read(TEXT), rates)
    fetched = 5376 * 5376 * 2 / (2765e9 * calibration.HBM_REACHED)  # 23 µs, beside 10 µs of LoRA's product
    reduced = 2 * 3 / 4 * 4096 * 5376 * 2 / (2 * 100e9 * calibration.LINK_REACHED) + calibration.SYNCHRONOUS_SECONDS
    once = fetched + 932092 / 1.75e9 + reduced
    assert told.seconds == pytest.approx(70000 / 1.75e9 + 10 * once + 1750 / 1.75e9)
    assert told.hidden[schedule.COPIES] == pytest.approx(10 * 17500 / 1.75e9, rel=1e-3)


def test_a_collective_beside_products_is_waited_for_where_it_ends():
    text = (Path(__file__).parent / "texts" / "async_gather.hlo").read_text(encoding="utf-8")
    grid = Grid.of(SLICES["v5p-32"], [(x, y, z) for z in range(4) for x in range(2) for y in range(2)])
    start, beside, end = read(text, grid)
    assert start.starts == end.waits_for == "async-collective-start.1"
    assert start.transfer.sent_bytes == 3 * 64 * 512 * 2
    # device_ids=([4,4]T(1,0)) along 'axis_1': devices 0 to 3, a square
    assert (start.transfer.links, start.transfer.lanes) == (2, ("+x", "+y"))
    assert (beside.part, beside.starts, beside.waits_for) == (schedule.BASE, "", "")


@pytest.mark.parametrize(
    ("windows", "again"),
    [
        ('"42","4","1"', 41 * 4096 * 5376 * 2),  # rows come again for each window of features
        ('"1","4","1"', 0),
        ('"2","4","3"', 1 * 4096 * 5376 * 2),  # the weight too, but it lies in on-chip memory
        ('"1","1","1"', 0),
        ('"2","4","3","1"', 0),  # an order that is not known
    ],
)
def test_products_read_again_what_passes_window_by_window(windows, again):
    module = hlo.parse(TEXT.replace('"42","4","1"', windows))
    assert counts.count(module).read_again == 10 * again


def test_weights_in_hbm_are_read_again_too():
    text = TEXT.replace("%copy-done.1), kind=kOutput", "%w), kind=kOutput").replace('"42","4","1"', '"2","4","3"')
    assert counts.count(hlo.parse(text)).read_again == 10 * (1 * 4096 + 3 * 5376) * 5376 * 2
