"""What ends a run early: patience and time, both to the very bits of a run that nothing happened to."""

import json
import subprocess
import sys
import time

import pytest

from gemma4_tpu.config.schema import TrainerConfig
from gemma4_tpu.errors import PREEMPTED, TERMINATED, UserError
from gemma4_tpu.tracking.result import Result
from gemma4_tpu.training.endings import Patience, TimeLimit, check_patience
from gemma4_tpu.training.hosts import Hosts
from tests.training.conftest import HARD
from tests.training.test_hosts import Two
from tests.training.test_resume import last_state, rows


def patience(losses, **settings) -> list[int]:
    """The evaluations at which a run would end, saved and restored at each of them."""
    trainer, position, ends = TrainerConfig(**settings), {}, []
    for number, loss in enumerate(losses):
        one = Patience.of(trainer, position)
        one.add(loss)
        position = json.loads(json.dumps({"patience": one.saved()}))
        ends += [number] if one.exhausted else []
    return ends


def test_only_evaluations_in_a_row_that_do_not_lower_the_loss_count():
    losses = [3.0, 2.0, 2.0, 1.9, 2.5, 1.95, 1.8]
    assert patience(losses, patience=2) == [5]
    assert patience(losses, patience=2, min_delta=0.15) == [3, 4, 5]  # 1.9 is not enough below 2.0, 1.8 is
    assert patience(losses) == []
    # small steps add up: the lowest that counted is what the next are compared with
    assert patience([3.0, 2.95, 2.85, 2.8], patience=2, min_delta=0.1) == []


def test_patience_without_held_out_rows_is_refused():
    with pytest.raises(UserError, match=r"trainer.patience=2: no rows are held out.* give data.heldout"):
        check_patience(TrainerConfig(patience=2), heldout=False)


def test_the_clock_of_a_time_limit():
    assert not TimeLimit("1h", Hosts()).reached() and not TimeLimit(None, Hosts()).reached()
    limit = TimeLimit("0.05s", Hosts())
    time.sleep(0.06)
    assert limit.reached()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_stopped_by_time_it_goes_on_and_ends_by_patience_with_the_very_bits(shallow, tmp_path):
    """With an average of the values and another optimizer's state, too."""
    words = [*HARD, "optimizer=muon", "optimizer.warmup_updates=0", "trainer.ema_decay=0.9", "trainer.eval_every=2",
             "trainer.patience=2", "trainer.min_delta=9", "checkpoint.every=3"]  # fmt: skip
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    shallow(*words, f"run_dir={whole}", cwd=tmp_path)
    result = Result.read(whole / "result.json")
    assert (result.status, result.updates) == ("finished", 4)
    assert "trainer.patience=2: 2 consecutive held-out evaluations were not below" in result.ended

    told = shallow(*words, f"run_dir={broken}", "trainer.time_limit=1s", cwd=tmp_path)
    stopped = Result.read(broken / "result.json")
    assert (stopped.status, stopped.updates) == ("stopped", 1)
    assert (
        "trainer.time_limit=1s has passed; saved, and the same command" in stopped.ended
        and stopped.ended in told.stderr
    )
    shallow(*words, f"run_dir={broken}", cwd=tmp_path)
    assert rows(broken) == rows(whole) and rows(whole)[-1]["update"] == 4
    (update, expected), (again, found) = last_state(whole), last_state(broken)
    assert update == again == 4 and found.keys() == expected.keys()
    assert not [name for name in expected if found[name].tobytes() != expected[name].tobytes()]
    ended = Result.read(broken / "result.json")
    assert (ended.status, ended.ended, ended.heldout_loss_last) == ("finished", result.ended, result.heldout_loss_last)

    once_more = shallow(*words, f"run_dir={broken}", cwd=tmp_path)
    assert "ended after update 4 of 8 by trainer.patience=2" in once_more.stderr
    assert "nothing left to do, nothing changed; to train further, set a larger trainer.patience" in once_more.stderr
    (broken / "result.json").unlink()  # killed between checkpoint and result
    shallow(*words, f"run_dir={broken}", cwd=tmp_path)
    assert Result.read(broken / "result.json").ended == result.ended and rows(broken) == rows(whole)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_stop_at_the_same_update_by_the_clock_of_the_first(shallow, tmp_path):
    run = tmp_path / "run"
    two = Two(shallow, run, "trainer.time_limit=1s")
    ends = two.wait(300)
    assert [code for code, _ in ends] == [0, 0], ends
    assert Result.read(run / "result.json").status == "stopped"
    assert rows(run)[-1]["update"] == 1


SIGNALLED = """
import os, signal, sys, time
from gemma4_tpu.training.preemption import Preemption

with Preemption() as preemption:
    if sys.argv[1] == "saving":
        preemption.something_to_save()
    os.kill(os.getpid(), signal.SIGTERM)
    while not preemption.requested:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(300)
"""


@pytest.mark.parametrize(("when", "code", "told"), [
    ("starting", PREEMPTED, "there is nothing to save"), ("saving", TERMINATED, "a second SIGTERM: exiting at once"),
])  # fmt: skip
def test_nothing_waits_before_the_first_update_or_after_a_second_sigterm(when, code, told):
    command = [sys.executable, "-c", SIGNALLED, when]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == code and told in done.stderr
