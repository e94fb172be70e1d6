"""Sweeps as batch jobs, on a real SLURM cluster of one node; the jobs are stand-ins, the signals are SLURM's."""

import json
import os
import re
import signal
import subprocess

import pytest

from gemma4_tpu.config.sweeps import Slurm
from gemma4_tpu.sweeping import slurm
from gemma4_tpu.sweeping.slurm import batch_script
from tests.sweeping.cluster import cluster  # noqa: F401 (fixture)
from tests.sweeping.test_multirun import when

SWEPT = ["hydra/launcher=slurm", "hydra.launcher.plan=false", "lora.rank=4,8"]


def said_by(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_a_sweep_is_requeued_times_out_goes_on_without_its_parent_and_skips_what_is_done(
    sweep, cluster, monkeypatch, caplog  # noqa: F811
):  # fmt: skip
    monkeypatch.setattr(slurm, "_SECONDS_BETWEEN_QUESTIONS", 2.0)
    sweep.behave(**{"lora.rank-4": {"preempted": 1}, "lora.rank-8": {"seconds": 50, "slow_starts": 1}})
    limits = ["hydra.launcher.timeout_min=1", "hydra.launcher.save_seconds=55", "hydra.launcher.sbatch=[--overcommit]"]

    # The parent is stopped: the jobs go on in the queue, under their overrides.
    watch = when(lambda: len(sweep.starts) == 2, lambda: os.kill(os.getpid(), signal.SIGINT))
    left = sweep(*SWEPT, *limits, exit_code=130)
    watch.join()
    assert "continue in SLURM's queue" in caplog.text
    assert [job.status for job in left.jobs.values()] == ["running", "running"]
    numbers = {job.name: job.pid for job in left.jobs.values()}
    assert "lora.rank-8" in said_by("squeue", "--noheader", "--format=%j")

    # The same command follows them. One exited with 42, the other was told by SLURM that its time is nearly over.
    done = sweep(*SWEPT, *limits)
    assert [job.status for job in done.jobs.values()] == ["finished", "finished"]
    assert {job.name: job.pid for job in done.jobs.values()} == numbers and "taken over" in caplog.text
    assert all(job.starts == 1 for job in done.jobs.values())
    for number in numbers.values():
        assert "Restarts=1" in said_by("scontrol", "show", "job", str(number))
    assert sorted(sweep.starts) == ["lora.rank-4"] * 2 + ["lora.rank-8"] * 2
    rows = [json.loads(line)["update"] for line in (sweep.folder / "lora.rank-8/metrics.jsonl").open()]
    assert rows == [0, 1, 2]  # no update twice

    sweep(*SWEPT, *limits)
    assert len(sweep.starts) == 4 and "2 finished before, 0 to run" in caplog.text

    # What fails, and what is cancelled, keeps nobody else from going on.
    sweep.behave(**{"lora.rank-2": {"error": "no such rank"}, "lora.rank-16": {"seconds": 60}})
    names = {"lora.rank-16"}
    watch = when(lambda: names <= set(sweep.starts), lambda: said_by("scancel", "--name=lora.rank-16"))
    failed = sweep(*SWEPT[:2], "lora.rank=2,4,8,16", *limits, exit_code=1)
    watch.join()
    assert [failed.jobs[f"lora.rank-{rank}"].status for rank in (2, 4, 8)] == ["failed", "finished", "finished"]
    assert failed.jobs["lora.rank-2"].error == "no such rank"
    assert "is gone without an exit code" in failed.jobs["lora.rank-16"].error
    assert said_by("squeue", "--noheader") == ""


def test_without_slurm_the_message_says_where_to_start(sweep, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    sweep(*SWEPT, exit_code=2)
    assert "error: hydra/launcher=slurm: there is no sbatch on this machine" in capsys.readouterr().err


def test_a_batch_script_says_what_the_settings_say(tmp_path):
    settings = Slurm(partition="tpu", nodes=2, timeout_min=90, save_seconds=60, sbatch=["--account=me"])
    command = ["python", "-m", "gemma4_tpu.train", "name=a b", "run_dir='/x'"]
    text = batch_script("lora.rank-4", command, tmp_path / "a b.sh", tmp_path / "50%.log", settings)
    flags = re.findall(r"^#SBATCH (.*)$", text, re.M)
    assert flags == [
        "--job-name=lora.rank-4", f"--output={tmp_path}/50%%.log", "--open-mode=append", "--requeue", "--nodes=2",
        "--ntasks-per-node=1", "--time=90", "--signal=USR2@60", "--partition=tpu", "--account=me",
    ]  # fmt: skip
    assert "srun --kill-on-bad-exit=1 python -m gemma4_tpu.train 'name=a b'" in text
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
