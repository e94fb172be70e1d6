"""A run that begins from trained adapters, and what a resume says of its length and its learning rate."""

import json
import shutil
from pathlib import Path

import pytest

from gemma4_tpu.tracking.metrics import read_metrics
from gemma4_tpu.tracking.result import Result
from gemma4_tpu.training.start import FILE
from tests.training.conftest import HARD

SHORT = [*HARD, "trainer.eval_every=0", "trainer.max_updates=2"]
PER_START = ("log.txt", ".lock")
"""Written by every start, also one that has nothing to do."""


@pytest.fixture(scope="module")
def first(shallow, tmp_path_factory) -> Path:
    """Two updates, the second one at a learning rate of 0; started with Hydra's word for the folder."""
    run = tmp_path_factory.mktemp("first") / "run"
    shallow(*SHORT, f"hydra.run.dir={run}", cwd=run.parent)
    return run


def fingerprints(run: Path) -> dict[str, str]:
    return json.loads((run / "provenance.json").read_text())["fingerprints"]


@pytest.mark.slow
def test_a_new_run_begins_where_the_adapters_were_and_repeats_and_goes_on(shallow, first, tmp_path):
    origin, run = shutil.copytree(first, tmp_path / "origin"), tmp_path / "run"
    words = [*SHORT, f"lora.start={origin}", f"run_dir={run}", "optimizer.schedule=constant"]
    begun = shallow(*words, cwd=tmp_path)
    assert f"lora.start: update 2 of {origin}: loaded all" in begun.stderr
    before = read_metrics(run / "metrics.jsonl")[0]
    assert before["update"] == 0
    assert before["heldout_loss"] == Result.read(first / "result.json").heldout_loss_last  # to the bit
    record = json.loads((run / FILE).read_text())
    assert record["sha256"] == fingerprints(run)["start"] and record["fresh"] == []

    repeated = shallow(f"replay={run}", f"run_dir={tmp_path / 'again'}", cwd=tmp_path)
    assert "losses bit-identical to the recorded ones" in repeated.stderr
    assert fingerprints(tmp_path / "again") == fingerprints(run)

    shutil.rmtree(origin)  # the checkpoint holds more
    longer = shallow(*words, "trainer.max_updates=3", cwd=tmp_path)
    assert "lora.start is not read again: the checkpoint at update 2" in longer.stderr
    assert "3 updates (before: 2): the learning rate goes from" in longer.stderr  # and stays what it was
    assert "changed since the run started" not in longer.stderr
    assert Result.read(run / "result.json").updates == 3


@pytest.mark.slow
def test_past_the_end_there_is_nothing_to_do_and_nothing_is_touched(shallow, first, tmp_path):
    kept = {path: path.read_bytes() for path in first.rglob("*") if path.is_file() and path.name not in PER_START}
    for length, asked in (("trainer.max_updates=1", 1), ("trainer.max_updates=2", 2)):
        done = shallow(*SHORT, length, f"run_dir={first}", cwd=tmp_path)
        assert f"2 updates are done, and this command asks for {asked}: nothing left to do" in done.stderr
        assert {path: path.read_bytes() for path in kept} == kept


@pytest.mark.slow
def test_a_jump_of_the_learning_rate_is_refused_until_allowed(shallow, first, tmp_path):
    run = shutil.copytree(first, tmp_path / "run")
    recorded = (run / "config.yaml").read_bytes()
    words = [*SHORT, "trainer.max_updates=4", f"run_dir={run}"]
    refused = shallow(*words, cwd=tmp_path, exit_code=2)
    told = "4 updates (before: 2): the learning rate goes from 0 at update 2, the last one done, to "
    assert told in refused.stderr and "checkpoint.resume_allow=[learning_rate]" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert (run / "config.yaml").read_bytes() == recorded
    allowed = shallow(*words, "checkpoint.resume_allow=[learning_rate]", cwd=tmp_path)
    assert told in allowed.stderr
    assert Result.read(run / "result.json").updates == 4
