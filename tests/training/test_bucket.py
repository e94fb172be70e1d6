"""A run that lives on gs://: trained, killed, resumed on another machine, merged."""

import json
import shutil
import signal
import time

import pytest

from gemma4_tpu.export.place import JOURNAL
from gemma4_tpu.merge import main as merge
from gemma4_tpu.storage import filesystem
from tests.training.test_resume import rows

WORDS = [
    "lora.rank=2", "data.sequence_length=256", "data.max_rows=60", "data.heldout=[]", "trainer.max_updates=5",
    "trainer.global_batch_sequences=2", "trainer.remat=none", "optimizer.warmup_updates=0", "checkpoint.every=2",
]  # fmt: skip


@pytest.mark.slow
def test_trained_killed_resumed_and_merged_on_a_bucket(train, tmp_path, bucket):
    run, here, there = f"{bucket}/runs/one", tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    process = train.start(*WORDS, f"run_dir={run}", cwd=here)
    fs, root = filesystem(run)
    while not fs.exists(f"{root}/checkpoints/2/commit_success.txt"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    shutil.rmtree(here)  # that machine is gone

    done = train(*WORDS, f"run_dir={run}", cwd=there)
    assert "resumed from the checkpoint at update 2" in done.stderr
    assert {"2", "4", "5"} == {name.rsplit("/", 1)[1] for name in fs.ls(f"{root}/checkpoints", detail=False)}
    whole = tmp_path / "whole"
    train(*WORDS, f"run_dir={whole}", cwd=tmp_path)
    lines = [json.loads(line) for line in fs.cat_file(f"{root}/metrics.jsonl").splitlines()]
    assert [row["loss"] for row in lines] == [row["loss"] for row in rows(whole)]
    assert json.loads(fs.cat_file(f"{root}/result.json"))["status"] == "finished"
    assert fs.exists(f"{root}/plots/loss.png") and fs.exists(f"{root}/config.yaml")

    for name in (run, whole):
        assert merge([f"run={name}", f"target={tmp_path / 'models' / str(name == run)}", "verify=stream",
                      f"run_dir={tmp_path / 'records' / str(name == run)}"]) == 0  # fmt: skip
    models = [{p.name: p.read_bytes() for p in (tmp_path / "models" / k).iterdir()} for k in ("True", "False")]
    assert models[0].pop(JOURNAL) != models[1].pop(JOURNAL)  # each names its own save
    assert models[0] == models[1]
