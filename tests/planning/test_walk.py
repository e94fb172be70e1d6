"""The walk of a schedule, held to schedules made by hand, whose time is known."""

import pytest

from gemma4_tpu.hardware import SLICES
from gemma4_tpu.planning import calibration
from gemma4_tpu.planning.calibration import ScheduleRates
from gemma4_tpu.planning.kernels import Mask
from gemma4_tpu.planning.schedule import Op, Transfer, from_plain, plain
from gemma4_tpu.planning.walk import CORE, HBM, slowest_loop, walk
from gemma4_tpu.reporting.timeline import plot_timeline

RATES = ScheduleRates(
    clock_hertz=1e9, hbm_bytes_per_second=1e12, link_bytes_per_second=1e11, kernel_flops_per_second=1e14
)
MS = 1_000_000
"""Cycles of a millisecond."""
SYNC, ASYNC = calibration.SYNCHRONOUS_SECONDS, calibration.ASYNCHRONOUS_SECONDS


def work(name, ms, part="base_products"):
    return Op(name=name, part=part, label=name, cycles=round(ms * MS))


def copy(name, gigabytes):
    return Op(name=name, part="copies", label=name, starts=name, transfer=Transfer(hbm_bytes=gigabytes * 1e9))


def sent(name, gigabytes, *, lanes=("+x",), beside=True):
    """Over one link in each direction."""
    transfer = Transfer(sent_bytes=gigabytes * 1e9, links=len(lanes), lanes=lanes)
    return Op(name=name, part="collectives_exposed", label=name, starts=name if beside else "", transfer=transfer)


def done(name):
    return Op(name=f"{name}-done", waits_for=name)


def ms(seconds):
    return pytest.approx(seconds * 1e3, abs=1e-6)


def test_the_core_works_in_order():
    told = walk([work("a", 3), work("b", 2, "lora"), work("a", 3)], RATES)
    assert ms(told.seconds) == 8
    assert {part: round(seconds * 1e3, 6) for part, seconds in told.parts.items()} == {"base_products": 6, "lora": 2}
    assert ms(told.operations["base_products", "a", ""]) == 6
    assert told.times["base_products", "a", ""] == 2


def test_a_copy_beside_the_core_costs_only_what_it_is_waited_for():
    told = walk([copy("c", 5), work("a", 3), done("c"), work("b", 1)], RATES)  # 5 ms of copying
    assert ms(told.seconds) == 6
    assert ms(told.parts["copies"]) == 2
    assert ms(told.hidden["copies"]) == 3
    short = walk([copy("c", 2), work("a", 3), done("c")], RATES)
    assert (ms(short.seconds), ms(short.hidden["copies"])) == (3, 2)
    assert not short.parts["copies"]


def test_copies_queue_for_hbm():
    told = walk([copy("c", 2), copy("d", 2), done("d"), done("c")], RATES)
    assert ms(told.seconds) == 4


def test_a_collective_that_the_core_waits_for():
    told = walk([work("a", 1), sent("g", 0.2, beside=False)], RATES)  # 0.2 GB over 100 GB/s
    assert ms(told.seconds) == 3 + SYNC * 1e3
    assert ms(told.parts["collectives_exposed"]) == 2 + SYNC * 1e3
    assert not sum(told.hidden.values())


def test_two_links_are_twice_as_fast():
    told = walk([sent("g", 0.2, lanes=("+x", "+y"), beside=False)], RATES)
    assert ms(told.seconds) == 1 + SYNC * 1e3


def test_collectives_of_one_axis_wait_for_each_other_and_those_of_others_do_not():
    same = walk([sent("g", 0.2), sent("h", 0.2), done("g"), done("h")], RATES)
    assert ms(same.seconds) == 4 + 2 * ASYNC * 1e3
    other = walk([sent("g", 0.2), sent("h", 0.2, lanes=("+y",)), done("g"), done("h")], RATES)
    assert ms(other.seconds) == 2 + ASYNC * 1e3


def test_a_synchronous_collective_waits_for_the_links_that_it_needs():
    told = walk([sent("g", 0.2), work("a", 1), sent("h", 0.1, beside=False), done("g")], RATES)
    assert ms(told.seconds) == 3 + (SYNC + ASYNC) * 1e3


def test_links_and_hbm_are_different_queues():
    told = walk([copy("c", 2), sent("g", 0.2), done("c"), done("g")], RATES)
    assert ms(told.seconds) == 2 + ASYNC * 1e3


def test_a_loop_runs_its_trips():
    body = (copy("c", 3), work("a", 2), done("c"))
    told = walk([work("before", 1), Op(name="loop", trips=10, body=body)], RATES)
    assert ms(told.seconds) == 1 + 10 * 3
    assert (ms(told.parts["copies"]), ms(told.hidden["copies"])) == (10, 20)
    assert ms(slowest_loop(told).seconds) == 3
    assert sum(told.parts.values()) == pytest.approx(told.seconds)


def test_loops_in_loops_multiply():
    inner = Op(name="inner", trips=3, body=(work("a", 1),))
    told = walk([Op(name="outer", trips=4, body=(inner, work("b", 5)))], RATES)
    assert ms(told.seconds) == 4 * (3 + 5)
    assert told.times["base_products", "a", ""] == 12
    assert ms(slowest_loop(told).seconds) == 8  # the inner one takes 12 ms, the outer one 20 of its own
    layers = Op(name="layers", trips=10, body=(work("a", 1),))
    microbatches = Op(name="microbatches", trips=2, body=(work("c", 1), layers))
    assert ms(slowest_loop(walk([microbatches], RATES)).seconds) == 1


def test_a_copy_that_a_loop_outlasts_costs_nothing():
    told = walk([copy("c", 5), Op(name="loop", trips=10, body=(work("a", 1),)), done("c")], RATES)
    assert ms(told.seconds) == 10


def test_an_attention_kernel_takes_the_blocks_that_it_visits():
    mask = Mask(None, 512, 512)
    kernel = Op(name="splash", part="attention", kernel_flops=1e12, mask=mask)
    assert ms(walk([kernel], RATES).seconds) == 10
    assert ms(walk([kernel], RATES, lambda one: 0.7 if one == mask else 1.0).seconds) == 7


def test_what_has_no_cycles_takes_its_bytes():
    told = walk([Op(name="reshape", transfer=Transfer(hbm_bytes=2e9))], RATES)
    assert ms(told.seconds) == 2 + calibration.OTHER_SECONDS * 1e3


def test_schedules_survive_json():
    ops = (
        copy("c", 1),
        Op(name="loop", trips=3, body=(sent("g", 0.1, lanes=("+x", "-y")), done("g"))),
        Op(name="splash", part="attention", kernel_flops=1e9, mask=Mask(1024, 512, 512), place="models/splash.py:94"),
    )
    assert from_plain(plain(ops)) == ops


def test_a_group_of_layers_is_drawn(tmp_path):
    body = (copy("c", 3), sent("g", 0.1), work("a", 2), done("c"), done("g"), work("n", 1, "elementwise"))
    told = walk([Op(name="loop", trips=10, body=body)], RATES)
    once = slowest_loop(told)
    assert {event.row for event in once.events} == {CORE, HBM, "+x"}
    plot_timeline(told, "a group", tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", [name for name, known in SLICES.items() if known.topology])
def test_every_tpu_slice_has_rates(name):
    rates = ScheduleRates.of(SLICES[name])
    assert 1e9 < rates.clock_hertz < 3e9
    # A matrix unit is 128 × 128 or 256 × 256: the peak is a whole number of them.
    units = SLICES[name].chip.peak_flops_per_second / (2 * 128 * 128 * rates.clock_hertz)
    assert units == pytest.approx(round(units), rel=0.01)
