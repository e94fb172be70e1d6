"""A run that lives on gs://: trained, killed, resumed on another machine, merged."""

import json
import re
import shutil
import signal
import time

import fsspec
import gcsfs
import pytest

from gemma4_tpu.errors import STORAGE_GONE
from gemma4_tpu.export.place import JOURNAL
from gemma4_tpu.merge import main as merge
from gemma4_tpu.storage import filesystem
from gemma4_tpu.train import main
from tests.gcs import emulator
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
    # The one at update 4 may have been complete as well before the signal came.
    assert re.search(r"resumed from the checkpoint at update [24]\b", done.stderr)
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


@pytest.mark.slow
def test_a_bucket_that_pauses_is_waited_for_and_one_that_is_gone_ends_the_run_with_what_it_did(
    shallow, tmp_path, bucket, monkeypatch
):  # fmt: skip
    words = [
        "model.path=random:0", "lora.rank=2", "data.sequence_length=256", "data.max_rows=60", "data.heldout=[]",
        "trainer.max_updates=400", "trainer.global_batch_sequences=1", "trainer.remat=none", "checkpoint.every=5",
        "optimizer.warmup_updates=0", "optimizer.schedule=constant", "storage.deadline=15s",
    ]  # fmt: skip
    with emulator() as (server, address):
        for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
            monkeypatch.setenv(name, address)
        fs = gcsfs.GCSFileSystem(token="anon", endpoint_url=address, skip_instance_cache=True)
        fs.mkdir("mine")
        run = "gs://mine/runs/one"
        process = shallow.start(*words, f"run_dir={run}", cwd=tmp_path)
        local = tmp_path / "outputs/gs/mine/runs/one"
        _until(process, lambda: _updates(local) >= 12)
        server.send_signal(signal.SIGSTOP)  # it pauses for less than the deadline
        time.sleep(2)
        server.send_signal(signal.SIGCONT)
        paused_at = _updates(local)
        _until(process, lambda: _updates(local) >= paused_at + 12)
        server.kill()  # and is gone for good
        _, err = process.communicate(timeout=300)
    assert process.returncode == STORAGE_GONE, err
    assert f"{run}/checkpoints: no answer for 15 s (storage.deadline)" in err.splitlines()[-1], err
    assert f"run_dir={local} resumes" in err.splitlines()[-1]
    assert "Traceback" not in err and len(err.splitlines()) < 60
    saved = int(re.search(r"Saved at update (\d+) on this machine", err)[1])
    assert saved >= paused_at + 12 and json.loads((local / "result.json").read_text())["status"] == "failed"

    done = shallow(*words, f"run_dir={local}", f"trainer.max_updates={saved + 2}", cwd=tmp_path)
    assert f"resumed from the checkpoint at update {saved}" in done.stderr
    assert [row["update"] for row in rows(local)] == list(range(1, saved + 3))


def test_a_bucket_that_is_not_there_at_the_start_is_one_message(bucket, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gemma4_tpu.tracking.bucket._SECONDS_AT_THE_ENDS", 0.5)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")  # nobody listens there
    fsspec.filesystem("gs").clear_instance_cache()
    assert main(["run_dir=gs://bucket/run", "model.path=random:0"]) == STORAGE_GONE
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("error: gs://bucket/run: no answer for 0.5 s") and len(said) == 1


def _updates(run) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def _until(process, ready) -> None:
    deadline = time.monotonic() + 300
    while not ready():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
