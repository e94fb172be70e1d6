"""The rendered script, run for real on a slice that is played: one host each, without TPU, systemd and metadata."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest

from gemma4_tpu.errors import OVERRUN
from gemma4_tpu.launch.render import render
from gemma4_tpu.launch.tpu_vm import new_launch
from gemma4_tpu.train import load_train
from tests.launch.conftest import ROOT, RUN, composed
from tests.processes import wait_for

PYTHON = f"""#!{sys.executable} -S
# What the slice's interpreter is asked to run; exits with the next of `codes`, or waits for a SIGTERM.
import json, os, pathlib, signal, sys, time
root = pathlib.Path(os.environ["GEMMA4_TPU_ROOT"])
with open(root / "ran.jsonl", "a") as ran:
    ran.write(json.dumps([sys.argv[2:], os.environ.get("WANDB_API_KEY"), os.getcwd()]) + "\\n")
codes = (root / "codes").read_text().split()
(root / "codes").write_text(" ".join(codes[1:]))
if codes[0] == "wait":
    signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), os._exit(42)))
    (root / "waiting").touch()
    time.sleep(600)
os._exit(int(codes[0]))
"""


SERVED = [
    "hardware=v6e8", "mesh=auto", "trainer.global_batch_sequences=4", "after=[merge,'serve serving=v6e8']",
]  # fmt: skip


class Host:
    """One host of a slice that is already installed."""

    def __init__(self, folder, played, script: str, number: int):
        self.folder, self.played, self.number = folder, played, number
        (folder / "venv/bin").mkdir(parents=True)
        (folder / "venv/bin/python").write_text(PYTHON)
        (folder / "venv/bin/python").chmod(0o755)
        (folder / "installed").touch()
        (folder / "script.sh").write_text(script)

    def start(self, *codes: object) -> subprocess.Popen:
        (self.folder / "codes").write_text(" ".join(map(str, codes)))
        settings = {"GEMMA4_TPU_ROOT": str(self.folder), "HOST": str(self.number), "PAUSE_SECONDS": "0"}
        return subprocess.Popen(["bash", str(self.folder / "script.sh"), "job"], env=os.environ | settings)

    def run(self, *codes: object) -> int:
        return self.start(*codes).wait(timeout=180)

    @property
    def ran(self) -> list[list]:
        return [json.loads(line) for line in (self.folder / "ran.jsonl").read_text().splitlines()]

    @property
    def log(self) -> str:
        return (self.folder / "launch.log").read_text()

    @property
    def deletions(self) -> int:
        return len(self.played.asked("queued-resources", "delete"))


def rendered(*words: str) -> tuple:
    job = new_launch(composed((*RUN, *words)))
    return job, render(job)


@pytest.fixture
def host(played, tmp_path):
    def host(*words: str, number: int = 0) -> Host:
        job, script = rendered(*words)
        host = Host(tmp_path / f"host-{number}", played, script, number)
        host.outcome = lambda: json.loads(played.object(f"{job.launch_dir}/outcome.json") or "null")
        host.job = job
        played.exists(job.id)
        return host

    return host


def test_trains_reports_and_deletes_the_slice(host, played):
    host = host("secrets={WANDB_API_KEY: wandb-key}")
    assert host.run(0) == 0
    ((words, key, cwd),) = host.ran
    assert words == ["gemma4_tpu.train", *host.job.train]
    assert load_train(words[1:]).root.run_dir == host.job.run_dir
    assert key == "value-of-wandb-key"
    assert cwd == str(host.folder)
    assert host.outcome() == {"code": 0, "host": 0, "reason": "finished"}
    (delete,) = played.asked("delete")
    assert delete[3:5] == ["delete", host.job.id] and {"--force", "--async", "--quiet"} <= set(delete)
    assert "value-of-wandb-key" not in host.log
    assert played.object(f"{host.job.launch_dir}/host-0.log")


def test_starts_again_after_42_and_after_crashes(host):
    host = host("launch.restarts=2")
    assert host.run(42, 42, 42, 1, 42, 134, 0) == 0
    assert len(host.ran) == 7
    assert all(ran == host.ran[0] for ran in host.ran)


@pytest.mark.parametrize(("codes", "starts"), [([2], 1), ([OVERRUN], 1), ([130], 1), ([3, 1, 3], 3)])
def test_gives_up_reports_and_deletes_the_slice(host, codes, starts):
    host = host("launch.restarts=2")
    assert host.run(*codes) == codes[-1]
    assert len(host.ran) == starts
    assert host.outcome()["code"] == codes[-1]
    assert host.deletions == 1


def test_sigterm_is_handed_on_once_and_waited_for(host):
    host = host()
    process = host.start("wait", 0)
    wait_for((host.folder / "waiting").exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=180) == 42
    assert len(host.ran) == 1
    assert "training: exit code 42" in host.log  # it was given the time to save
    assert host.outcome() is None and host.deletions == 0  # a new slice goes on


def test_what_follows_runs_once_even_over_two_slices(host, played, tmp_path):
    words = ["after=['merge export=both','evaluate eval=verilog_eval eval.problems_path=gs://my-bucket/ve']"]
    first = host(*words)
    (first.folder / "outputs/gs" / first.job.run_dir.removeprefix("gs://") / "merges").mkdir(parents=True)
    (first.folder / "outputs/evaluations").mkdir(parents=True)
    played.put("gs://my-bucket/ve/*", "a problem")
    assert first.run(0, 0, 1) == 1  # evaluate fails
    assert [ran[0][0] for ran in first.ran] == ["gemma4_tpu.train", "gemma4_tpu.merge", "gemma4_tpu.evaluate"]
    merge, evaluate = first.ran[1][0], first.ran[2][0]
    assert {"export=both", f"run={first.job.run_dir}", f"export.target={first.job.run_dir}"} <= set(merge)
    assert f"model.path={first.job.run_dir}/merged" in evaluate and "eval.problems_path=problems" in evaluate
    assert first.outcome()["reason"] == "trained, but a later stage failed" and first.deletions == 1

    (played.folder / "gs" / first.job.launch_dir.removeprefix("gs://") / "outcome.json").unlink()
    played.exists(first.job.id)
    (first.folder / "ran.jsonl").unlink()
    assert first.run(0, 0) == 0
    assert [ran[0][0] for ran in first.ran] == ["gemma4_tpu.train", "gemma4_tpu.evaluate"]


def test_the_merged_model_is_served_from_the_slices_own_disk(host, played):
    first = host(*SERVED, "run_dir=gs://my-bucket/one")
    for record in ("outputs/gs/my-bucket/one/merges", "outputs/servings"):
        (first.folder / record).mkdir(parents=True)
    played.put("gs://my-bucket/one/merged/*", "a checkpoint")
    assert first.run(0, 0, 0) == 0
    assert first.ran[2][0] == ["gemma4_tpu.serve", "serving=v6e8", "run=served"]
    assert first.outcome()["reason"] == "finished" and first.deletions == 1
    assert list((first.folder / "served").iterdir())


def test_a_run_that_is_over_is_not_begun_again(host, played):
    host = host()
    played.put(f"{host.job.launch_dir}/outcome.json", json.dumps({"code": 0, "host": 0, "reason": "finished"}))
    assert host.run(0) == 0
    assert not (host.folder / "ran.jsonl").exists()
    assert host.deletions == 1


def test_keep_leaves_the_slice_and_says_so(host):
    host = host("keep=true")
    assert host.run(0) == 0
    assert host.deletions == 0
    assert "costs money until it is deleted" in host.log


def test_a_slice_that_may_not_delete_itself_says_how_in_the_bucket(host, played):
    host = host()
    played.play(deletable=False)
    assert host.run(0) == 0
    told = f"COULD NOT DELETE {host.job.id}: it costs money until it is deleted: python -m launch.tpu_vm delete"
    assert told in host.log and told in played.object(f"{host.job.launch_dir}/host-0.log")


def test_the_other_hosts_train_the_same_and_leave_the_end_to_the_first(host, played):
    words = ["hardware=v5p16", "trainer.global_batch_sequences=4", "mesh=auto", "run_dir=gs://my-bucket/runs/one"]
    first, second = host(*words), host(*words, number=1)
    assert second.run(42, 0) == 0
    assert second.run(2) == 2  # or what ended it: the first host may be merging
    assert second.outcome() is None and second.deletions == 0
    assert first.run(42, 0) == 0
    assert first.outcome()["code"] == 0 and first.deletions == 1
    assert [ran[0] for ran in first.ran] == [ran[0] for ran in second.ran[:2]]
    assert "run_dir=gs://my-bucket/runs/one" in first.ran[0][0]


def test_an_installation_that_fails_costs_no_more(host, played):
    host = host()
    (host.folder / "installed").unlink()  # and no sources in the bucket
    assert host.run() == 1
    assert host.outcome()["reason"] == "the installation failed"
    assert host.deletions == 1


def test_boot_makes_a_service_and_a_limit(host, played, tmp_path, monkeypatch):
    host = host("max_hours=2", "keep=true")  # of which the limit takes no notice
    calls = tmp_path / "systemd.jsonl"
    for name in ("systemd-run", "systemctl"):
        place = tmp_path / "bin" / name
        place.write_text(f'#!/bin/sh\necho "{name} $*" >> "{calls}"\n')
        place.chmod(0o755)
    settings = {"GEMMA4_TPU_ROOT": str(host.folder), "HOST": "0", "PAUSE_SECONDS": "0"}
    subprocess.run(["bash", str(host.folder / "script.sh")], env=os.environ | settings, check=True, timeout=180)
    service, limit = [line for line in calls.read_text().splitlines() if line.startswith("systemd-run")]
    assert "KillMode=mixed" in service and service.endswith(f"{host.folder}/job.sh job")
    assert "--on-active=7200s" in limit and limit.endswith("job.sh expire")
    subprocess.run(["bash", str(host.folder / "job.sh"), "expire"], env=os.environ | settings, timeout=180, check=False)
    assert "systemctl stop gemma4-tpu" in calls.read_text()  # saves first
    assert host.outcome()["code"] == 42 and host.deletions == 1


NASTY = [
    'tracker.tags=["it\'s","a b","$(touch pwned)","`id`","x;y&z|w"]',
    "name=a+b",
    "tracker.group='$HOME \"q\" \\\\'",
]


def test_settings_reach_the_training_to_the_letter(host, tmp_path):
    host = host(*NASTY)
    assert host.run(0) == 0
    words = host.ran[0][0][1:]
    there, here = load_train(words).root, load_train([*NASTY, *RUN[:2]]).root
    assert there.tracker == here.tracker and there.name == here.name
    assert "$(touch pwned)" in there.tracker.tags
    assert not list(tmp_path.rglob("pwned"))


SCRIPTS = {
    "plain": [],
    "everything": [
        "hardware=v5p16", "trainer.global_batch_sequences=4", "mesh=auto", "spot=true", "launch.model_in_memory=true",
        "secrets={WANDB_API_KEY: wandb-key, HF_TOKEN: hf}", "after=[merge]", "max_hours=null", "keep=true", *NASTY,
    ],
    "evaluated": ["after=['merge export=both','evaluate eval=verilog_eval eval.problems_path=\"gs://my-bucket/ve x\"']",
                  "git=https://example.org/x.git@main"],
    "served": SERVED,
}  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_finds_nothing(name, tmp_path):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: sudo apt-get install shellcheck")
    _, script = rendered(*SCRIPTS[name])
    path = tmp_path / "startup.sh"
    path.write_text(script)
    done = subprocess.run(
        ["shellcheck", str(path), str(ROOT / "launch/install.sh")], capture_output=True, text=True, check=False
    )
    assert done.stdout == ""
    assert "wandb_v1" not in script and not re.search(r"hf_[A-Za-z0-9]{20}", script)


def test_the_model_can_be_copied_to_memory_first():
    job, script = rendered("launch.model_in_memory=true", "after=[merge]")
    assert job.model_source == "gs://my-bucket/gemma-4-31b"
    assert (
        "model.path=/dev/shm/gemma4-tpu-model" in job.train and "model.path=gs://my-bucket/gemma-4-31b" not in job.train
    )
    assert f"MODEL_SOURCE={shlex.quote(job.model_source)}" in script
    assert "export.base=gs://my-bucket/gemma-4-31b" in job.stages[0].words
