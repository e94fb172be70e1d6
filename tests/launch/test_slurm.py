"""A sweep on SLURM: submitit's own launcher, handed our configuration, up to the batch script that sbatch is given."""

import importlib.util
import os
import subprocess
import sys
import time

import pytest

from tests.launch.conftest import ROOT, put_on_path
from tests.launch.test_tools import installed

SWEEP = [sys.executable, "-m", "gemma4_tpu.train", "-m", "hydra/launcher=slurm", "lora.rank=4,8"]


def test_a_sweep_becomes_an_array_of_jobs(tmp_path, monkeypatch):
    plugins = installed("submitit==1.5.4", "hydra-submitit-launcher==1.2.0", "cloudpickle")
    monkeypatch.chdir(tmp_path)
    put_on_path(
        monkeypatch, tmp_path / "bin", "sbatch", f'#!/bin/sh\ncp "$1" {tmp_path}/batch.sh\necho Submitted batch job 7\n'
    )
    for name in ("srun", "sacct"):
        put_on_path(monkeypatch, tmp_path / "bin", name, "#!/bin/sh\n")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{plugins}")
    command = [*SWEEP, "hydra.launcher.partition=tpu", "hydra.launcher.nodes=2", "name=ranks"]
    log = tmp_path / "log.txt"
    with log.open("w") as file:
        sweep = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "batch.sh").exists() and sweep.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert (tmp_path / "batch.sh").exists(), log.read_text()
    finally:
        sweep.kill()
        sweep.wait()
    batch = (tmp_path / "batch.sh").read_text()
    for line in (
        "--array=0-1%2",
        "--job-name=ranks",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--partition=tpu",
        "--time=1440",
    ):
        assert f"#SBATCH {line}\n" in batch
    assert sys.executable in batch and "submitit" in batch  # which runs the job as a sweep of one machine does


def test_without_submitit_the_install_command_is_named(tmp_path):
    if importlib.util.find_spec("submitit"):
        pytest.skip("submitit is installed here")
    done = subprocess.run(
        SWEEP, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 2
    assert "pip install 'gemma4-tpu[slurm]'" in done.stderr and "Traceback" not in done.stderr
