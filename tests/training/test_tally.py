"""What a run adds up: compilation, evaluations and earlier starts go where a user expects them."""

from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest

from gemma4_tpu.tracking.result import Totals
from gemma4_tpu.training import tally as tallies
from gemma4_tpu.training.prediction import Prediction
from gemma4_tpu.training.rates import Rates
from gemma4_tpu.training.tally import Tally

JOB = SimpleNamespace(
    adapter_parameters=10, in_full_parameters=0, adapted_modules=2, mesh=SimpleNamespace(local_devices=[])
)
KNOWN = Rates(flops_per_token=6.0, peak_flops_per_second=1000.0, usd_per_hour=36.0)
UNKNOWN = Rates(flops_per_token=6.0, peak_flops_per_second=None, usd_per_hour=None)
UPDATE = SimpleNamespace(real_tokens=90, target_tokens=30, fill=0.9, epoch=0.5)


@pytest.fixture
def clock(monkeypatch):
    """Seconds pass when the test says so."""
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(tallies, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    return now


def run(clock, tally, *seconds: float, losses=(2.0, 1.0, 0.5)) -> None:
    for took, loss in zip(seconds, losses, strict=False):
        clock.seconds += took
        tally.count(UPDATE, loss, {}, skipped=False)


def test_rates_leave_out_compilation_and_evaluations(clock):
    tally = Tally(JOB, KNOWN, Totals())
    run(clock, tally, 60.0)  # the first update compiles
    assert tally.row(UPDATE)["real_tokens_per_second"] == 90 / 60  # the row says what was, the result what is typical
    clock.seconds += 40.0  # a held-out evaluation
    tally.count_heldout(1.5, 1, {})
    tally.start_lap()
    run(clock, tally, 2.0, 4.0)
    row, result = tally.row(UPDATE), tally.result("finished")
    assert row["real_tokens_per_second"] == row["target_tokens_per_second"] * 3 == 180 / 6
    assert (row["update_seconds"], row["seconds"], row["usd"]) == (3.0, 106.0, 36 * 106 / 3600)
    assert row["mfu"] == pytest.approx(30 * 6 / 1000)
    assert (result.seconds, result.real_tokens_per_second, result.mfu) == (106.0, 30.0, pytest.approx(0.18))
    assert (result.updates, result.real_tokens, result.slots, result.fill) == (3, 270, 300, 0.9)


def test_an_interrupted_run_adds_up_to_the_whole(clock):
    first = Tally(JOB, KNOWN, Totals())
    run(clock, first, 60.0, 2.0)
    first.count_heldout(1.5, 2, {})
    saved = asdict(first.totals())
    clock.seconds += 5000.0  # nobody pays for the time between
    second = Tally(JOB, KNOWN, Totals(**saved))
    run(clock, second, 50.0, 2.0, losses=(0.8, 0.7))
    second.count_heldout(1.6, 4, {})
    result = second.result("finished")
    assert (result.seconds, result.updates, result.real_tokens_per_second) == (114.0, 4, 45.0)
    assert (result.train_loss_first, result.train_loss_last) == (2.0, 0.7)
    assert (result.heldout_loss_first, result.heldout_loss_last) == (1.5, 1.6)
    assert (result.heldout_loss_best, result.heldout_update_best) == (1.5, 2)


def test_what_is_not_known_is_not_told(clock):
    tally = Tally(JOB, UNKNOWN, Totals())
    run(clock, tally, 1.0)
    row, result = tally.row(UPDATE), tally.result("preempted")
    assert not {"mfu", "usd", "hbm_bytes"} & row.keys()
    assert (result.mfu, result.usd, result.hbm_peak_bytes, result.real_tokens_per_second) == (None,) * 4
    nothing = Tally(JOB, KNOWN, Totals()).result("preempted")
    assert (nothing.updates, nothing.fill, nothing.real_tokens_per_second) == (0, None, None)


def test_measured_times_are_held_against_the_plans(clock):
    tally = Tally(JOB, KNOWN, Totals(), Prediction(2.0, 8, "plan.json"))
    update = SimpleNamespace(**vars(UPDATE), arrays={"tokens": np.zeros((1, 4, 8))})
    for took in (60.0, 3.0, 2.0, 4.0):  # the first compiles
        clock.seconds += took
        tally.count(update, 1.0, {}, skipped=False)
    result = tally.result("finished")
    assert (result.update_seconds, result.update_seconds_predicted, result.predicted_by) == (3.0, 2.0, "plan.json")
    assert result.measured_over_predicted == 1.5
    assert (result.measured_over_predicted_low, result.measured_over_predicted_high) == (1.0, 2.0)


def test_without_a_plan_nothing_is_predicted(clock):
    tally = Tally(JOB, UNKNOWN, Totals())
    run(clock, tally, 60.0, 3.0)
    result = tally.result("finished")
    assert (result.update_seconds, result.update_seconds_predicted, result.measured_over_predicted) == (3.0, None, None)


def test_goodput_is_the_share_of_the_time_that_trained(clock):
    first = Tally(JOB, KNOWN, Totals(), None, overhead_seconds=10.0)  # it loads
    run(clock, first, 20.0, 5.0, 5.0)  # compiles, and trains
    saved = asdict(first.totals())
    assert first.result("preempted").goodput == 10 / 40
    second = Tally(JOB, KNOWN, Totals(**saved), None, overhead_seconds=10.0 + 3.0)  # loads; 3 s were undone
    run(clock, second, 2.0, 5.0)
    assert second.result("finished").goodput == 15 / (40 + 13 + 7)
    assert Tally(JOB, KNOWN, Totals()).result("finished").goodput is None
