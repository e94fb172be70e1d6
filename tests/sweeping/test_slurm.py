"""Sweeps as batch jobs, on a real SLURM cluster of one node; most jobs are stand-ins, the signals are SLURM's."""

import json
import os
import re
import signal
import subprocess
import sys

import psutil
import pytest

from gemma4_tpu.config.sweeps import Slurm
from gemma4_tpu.sweeping import sites, slurm
from gemma4_tpu.sweeping.slurm import batch_script
from gemma4_tpu.sweeping.state import SweepJob
from tests.sweeping.cluster import cluster  # noqa: F401 (fixture)
from tests.sweeping.test_multirun import when
from tests.training.conftest import HARD, REPO, cache, shallow  # noqa: F401 (fixtures)
from tests.training.test_resume import rows

SHALLOW = str(REPO / "tests/training/shallow.py")
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
    watch = when(lambda: len(sweep.starts) >= 2, lambda: os.kill(os.getpid(), signal.SIGINT))
    left = sweep(*SWEPT, *limits, exit_code=130)
    watch.join()
    assert "continue in SLURM's queue" in caplog.text
    assert [job.status for job in left.jobs.values()] == ["running", "running"]
    numbers = {job.name: job.pid for job in left.jobs.values()}
    assert "lora.rank-8" in said_by("squeue", "--noheader", "--format=%j")

    # As if the parent had been killed between sbatch and its record of it.
    left.jobs["lora.rank-8"] = SweepJob(name="lora.rank-8", values={"lora.rank": "8"}, words=[])
    left.save()

    # The same command follows them. One exited with 42, the other was told by SLURM that its time is nearly over.
    done = sweep(*SWEPT, *limits)
    assert [job.status for job in done.jobs.values()] == ["finished", "finished"]
    assert {job.name: job.pid for job in done.jobs.values()} == numbers and "taken over" in caplog.text
    assert [job.starts for job in done.jobs.values()] == [1, 0]  # nothing was submitted again
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


@pytest.mark.slow
def test_a_training_run_that_slurm_tells_to_save_is_requeued_and_comes_out_bit_identical(
    sweep, cluster, shallow, monkeypatch  # noqa: F811
):  # fmt: skip
    """SLURM's signal reaches every process of the step: those of the tracker and of the hard limits, too."""
    # Updates enough that SLURM's signal, sent after the third, comes before the last.
    words = [*HARD, "trainer.max_updates=20", "trainer.eval_every=10", "tracker=wandb", "tracker.mode=offline"]
    whole = sweep.folder.with_name("whole")
    shallow(*words, f"run_dir={whole}", cwd=whole.parent)

    monkeypatch.setattr(slurm, "_SECONDS_BETWEEN_QUESTIONS", 2.0)
    monkeypatch.setattr(
        sites, "command", lambda entry, told, run_dir: [sys.executable, SHALLOW, *told, f"run_dir='{run_dir}'"]
    )
    for name, value in shallow.environment().items():
        monkeypatch.setenv(name, value)
    reached = []

    def lines() -> list:
        return [line for path in sweep.folder.glob("*/metrics.jsonl") for line in path.open()]

    def tell():
        commands = ((one, one.info["cmdline"] or []) for one in psutil.process_iter(["cmdline"]))
        (run,) = [one for one, words in commands if words[1:2] == [SHALLOW] and str(sweep.folder) in words[-1]]
        reached.extend(child.cmdline() for child in run.children())
        said_by("scancel", "--signal=USR2", said_by("squeue", "--noheader", "--format=%A").strip())

    watch = when(lambda: len(lines()) > 3, tell)
    done = sweep("hydra/launcher=slurm", "hydra.launcher.plan=false", *words)
    watch.join()
    (job,) = done.jobs.values()
    log, run = sweep.folder.joinpath("logs", f"{job.name}.log").read_text(), sweep.folder / job.name
    assert job.status == "finished" and "Restarts=1" in said_by("scontrol", "show", "job", str(job.pid)), log
    assert "preempted and saved at update" in log and "resumed from the checkpoint" in log and "Traceback" not in log
    assert rows(run) == rows(whole)
    assert len(reached) == 2 and any("overseer.py" in " ".join(words) for words in reached), reached


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
