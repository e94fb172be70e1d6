"""Runs with another objective than supervised tuning: it is learnt, told of everywhere, and exact over kills."""

import gzip
import json
import shutil

import numpy as np
import pytest

from gemma4_tpu.assets import ROOT
from gemma4_tpu.tracking.metrics import read_metrics
from gemma4_tpu.tracking.result import Result
from gemma4_tpu.training.began import REFERENCE_FOLDER
from tests.training.conftest import HARD

WORDS = [
    *HARD, "objective=dpo", "data=chat_jsonl", "data.heldout_fraction=0.2", "data.sequence_length=512",
    "trainer.max_updates=6", "trainer.eval_every=3", "optimizer.schedule=constant",
]  # fmt: skip
LOSSES = ("loss", "heldout_loss", "accuracy", "margin", "heldout_accuracy", "heldout_margin")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Answers as they are, and the same with one operator or word put wrong."""
    with gzip.open(ROOT / "verilog_smoke/train.jsonl.gz", "rt") as file:
        rows = [json.loads(line)["messages"] for _, line in zip(range(100), file, strict=False)]
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    with path.open("w") as file:
        for *before, answer in rows:
            text = answer["content"]
            worse = text.replace("&", "|") if "&" in text else text.replace("endmodule", "end")
            pair = {"prompt": before, "chosen": text, "rejected": worse}
            file.write(json.dumps(pair) + "\n")
    return path


def losses(run):
    return [
        (row["update"], key, row[key]) for row in read_metrics(run / "metrics.jsonl") for key in LOSSES if key in row
    ]


@pytest.mark.slow
def test_held_out_pairs_come_to_be_told_apart(train, pairs, tmp_path):
    """The tiny model that travels with the package, whose answers are near both sides."""
    words = [
        *WORDS,
        f"data.train={pairs}",
        "model.path=embedded:tiny",
        "lora.dropout=0",
        "optimizer.learning_rate=1e-3",
    ]
    done = train(*words, "run_dir=run", "tracker=jsonl", cwd=tmp_path)
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    before, *_, after = [row for row in rows if "heldout_loss" in row]
    assert before["heldout_loss"] == pytest.approx(np.log(2), abs=1e-5) and before["heldout_margin"] == pytest.approx(
        0, abs=1e-4
    )
    assert after["heldout_accuracy"] > 0.85 and after["heldout_margin"] > 0.1 and after["heldout_loss"] < 0.65
    assert "(accuracy 0." in done.stderr or "(accuracy 1." in done.stderr
    assert "heldout_accuracy" in done.stdout
    told = Result.read(tmp_path / "run/result.json").measures
    assert told["heldout_margin"] == after["heldout_margin"] and told["accuracy"] == rows[-2]["accuracy"]
    tracked = [json.loads(line) for line in (tmp_path / "run/tracker.jsonl").read_text().splitlines()]
    assert any("heldout_chosen_reward" in json.dumps(event) for event in tracked)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_bit_against_the_adapters_that_it_began_from(shallow, pairs, tmp_path):
    """`lora.start`: the reference is a copy, and where it came from need not be there any more."""
    words = [*WORDS, f"data.train={pairs}"]
    shallow(*words, "trainer.max_updates=2", "trainer.eval_every=0", "run_dir=first", cwd=tmp_path)
    words += ["lora.start=first"]
    whole = tmp_path / "whole"
    shallow(*words, f"run_dir={whole}", cwd=tmp_path)
    begun = next(row for row in read_metrics(whole / "metrics.jsonl") if row["update"] == 0)
    assert begun["heldout_loss"] == pytest.approx(np.log(2), abs=1e-5)  # the reference is where it begins

    process = shallow.start(*words, "run_dir=killed", cwd=tmp_path)
    for line in process.stderr:
        if "checkpoint at update 4" in line:
            process.kill()
    process.communicate()
    shutil.rmtree(tmp_path / "first")
    assert (tmp_path / "killed/checkpoints" / REFERENCE_FOLDER).is_dir()
    again = shallow(*words, "run_dir=killed", cwd=tmp_path)
    assert "resumed from the checkpoint" in again.stderr
    assert losses(tmp_path / "killed") == losses(whole)

    shutil.rmtree(tmp_path / "killed/checkpoints" / REFERENCE_FOLDER)
    refused = shallow(*words, "run_dir=killed", "trainer.max_updates=8", cwd=tmp_path, exit_code=2)
    assert "the run's reference can't be read" in refused.stderr


@pytest.mark.slow
def test_a_run_on_several_devices_has_the_same_losses(shallow, pairs, tmp_path):
    words = [*WORDS, f"data.train={pairs}", "lora.dropout=0", "trainer.max_updates=3"]
    shallow(*words, "run_dir=one", cwd=tmp_path)
    shallow(*words, "run_dir=four", "mesh.fsdp=2", "mesh.tp=2", "mesh.dp=1", cwd=tmp_path, devices=4)
    one, four = (losses(tmp_path / name) for name in ("one", "four"))
    assert [entry[:2] for entry in one] == [entry[:2] for entry in four]
    for (update, key, value), (*_, other) in zip(one, four, strict=True):
        if update and "accuracy" not in key:  # before, margins are rounding, and which sign it has is chance
            assert other == pytest.approx(value, rel=1e-3, abs=1e-4), (update, key)
