"""A run that is killed and resumed ends with the very bits of one that was not."""

import random
import signal
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from gemma4_tpu.config.schema import TrainerConfig
from gemma4_tpu.errors import PREEMPTED, UserError
from gemma4_tpu.tracking.metrics import read_metrics
from gemma4_tpu.tracking.result import Result
from gemma4_tpu.tracking.run import RunFolder
from gemma4_tpu.training.resume import nothing_left
from tests.training.conftest import HARD

SAME_WHENEVER = ("update", "loss", "heldout_loss", "grad_norm", "learning_rate", "real_tokens", "epoch")


def last_state(run: Path) -> tuple[int, dict[str, np.ndarray]]:
    """(update, every saved array by name) of the newest checkpoint."""
    with ocp.CheckpointManager(run / "checkpoints", item_names=("state", "position")) as manager:
        update = manager.latest_step()
        saved = manager.restore(update, args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]
    groups = {name: value for name, value in saved.items() if isinstance(value, dict)}
    flat = {f"{group}/{name}": np.asarray(x) for group, value in groups.items() for name, x in value.items()}
    return update, flat


def rows(run: Path) -> list[dict]:
    return [{k: row[k] for k in SAME_WHENEVER if k in row} for row in read_metrics(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def whole(shallow, tmp_path_factory):
    """A run that nothing happened to."""
    run = tmp_path_factory.mktemp("reference") / "whole"
    shallow(*HARD, f"run_dir={run}", cwd=run.parent)
    return run


@pytest.mark.slow
def test_preempted_killed_and_damaged_it_ends_with_the_very_bits(shallow, tmp_path, whole):
    broken, chance = tmp_path / "broken", random.Random(20)
    process = shallow.start(*HARD, f"run_dir={broken}", cwd=tmp_path)
    kill_when(process, broken, 3)
    process.send_signal(signal.SIGUSR2)  # as SLURM does before the time is over; it becomes a SIGTERM
    _, error = process.communicate(timeout=300)
    assert process.returncode == PREEMPTED, error
    assert "preempted and saved at update" in error
    saved = Result.read(broken / "result.json")
    assert saved.status == "preempted" and saved.updates == rows(broken)[-1]["update"]  # nothing was lost

    process = shallow.start(*HARD, f"run_dir={broken}", cwd=tmp_path)
    kill_when(process, broken, 5)
    time.sleep(chance.uniform(0.0, 0.6))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL

    newest = max(int(place.name) for place in (broken / "checkpoints").iterdir() if place.name.isdecimal())
    victim = max((broken / "checkpoints" / str(newest) / "state").rglob("*"), key=lambda path: path.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    done = shallow(*HARD, f"run_dir={broken}", cwd=tmp_path)
    assert f"the checkpoint at update {newest} is damaged" in done.stderr
    assert "differs from what was saved" in done.stderr and "falling back" in done.stderr

    assert rows(broken) == rows(whole)
    (update, expected), (resumed_update, found) = last_state(whole), last_state(broken)
    assert update == resumed_update == 8
    assert found.keys() == expected.keys()
    different = [name for name in expected if found[name].tobytes() != expected[name].tobytes()]
    assert not different
    results = [Result.read(run / "result.json") for run in (whole, broken)]
    for key in (
        "updates",
        "real_tokens",
        "target_tokens",
        "heldout_loss_first",
        "heldout_loss_last",
        "train_loss_first",
    ):
        assert getattr(results[0], key) == getattr(results[1], key), key


def test_a_run_whose_checkpoints_are_gone_keeps_its_record(tmp_path):
    folder = RunFolder.open("unused", "t", str(tmp_path / "run"), "auto", config={})
    trainer = TrainerConfig()
    for unsaved in (Result(status="preempted"), Result(status="failed", updates=3)):
        folder.leave_result(unsaved)
        assert nothing_left(folder, None, 8, trainer) is None
    folder.leave_result(Result(status="stopped", updates=3))
    with pytest.raises(UserError, match=r"stopped after update 3, but .*checkpoints has no checkpoint to resume from"):
        nothing_left(folder, None, 8, trainer)
    folder.close()


def kill_when(process, run: Path, update: int) -> None:
    """Waits until that update is logged."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and any(r["update"] >= update for r in read_metrics(run / "metrics.jsonl")):
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError("the run made no progress")


@pytest.mark.slow
def test_a_finished_run_stays_as_it_is(shallow, tmp_path):
    run = tmp_path / "run"
    short = [*HARD, "trainer.max_updates=2", "trainer.eval_every=0"]
    shallow(*short, f"run_dir={run}", cwd=tmp_path)
    before, result = rows(run), Result.read(run / "result.json")
    shallow(*short, f"run_dir={run}", cwd=tmp_path)
    assert rows(run) == before
    again = Result.read(run / "result.json")
    assert (again.updates, again.heldout_loss_last) == (result.updates, result.heldout_loss_last)
    refused = shallow(*short, f"run_dir={run}", "lora.rank=8", cwd=tmp_path, exit_code=2)
    assert "lora.rank" in refused.stderr
    assert "Traceback" not in refused.stderr
