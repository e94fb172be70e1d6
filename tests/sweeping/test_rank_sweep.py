"""The committed 2 × 2 sweep, shorter: real trainings, one preempted by a real SIGTERM, one killed."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gemma4_tpu.sweeping.state import Sweep
from gemma4_tpu.tracking.metrics import read_metrics
from gemma4_tpu.tracking.result import Result
from tests.cpu_compiler import flags

ROOT = Path(__file__).parents[2]
SHORT = [
    "model.path=random:0", "data.sequence_length=64", "data=chat_jsonl", "data.train.0.path=rows.jsonl",
    "data.heldout_fraction=0.2", "trainer.global_batch_sequences=2", "trainer.max_updates=60", "trainer.eval_every=20",
    "trainer.remat=none", "optimizer.warmup_updates=0", "checkpoint.every=5",
]  # fmt: skip
UNTOUCHED = "lora.rank-4+optimizer.learning_rate-0.001"
KILLED = "lora.rank-4+optimizer.learning_rate-0.004"
PREEMPTED = "lora.rank-32+optimizer.learning_rate-0.001"


def write_rows(path: Path) -> None:
    row = '{"messages": [{"role": "user", "content": "%s"}, {"role": "assistant", "content": "%d"}]}\n'
    path.write_text("".join(row % ("count " + "x" * (n % 7), n % 7) for n in range(60)))


@pytest.mark.slow
def test_two_by_two_with_a_preempted_and_a_failing_job(tmp_path):
    write_rows(tmp_path / "rows.jsonl")
    environment = {
        **os.environ, "PYTHONPATH": f"{ROOT / 'tests/without_torch'}{os.pathsep}{ROOT}", "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags(devices=1),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip
    script = str(ROOT / "experiments" / "rank_sweep" / "interrupted.py")
    command = [sys.executable, script, *SHORT, "hydra.sweep.dir=sweep", "hydra.launcher.parallel=2"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=560)
    assert done.returncode == 1, done.stderr[-3000:]
    sweep = Sweep.open(tmp_path / "sweep")
    told = {name: (job.status, job.starts) for name, job in sweep.jobs.items()}
    assert told == {
        UNTOUCHED: ("finished", 1),
        KILLED: ("failed", 1),
        PREEMPTED: ("finished", 2),
        "lora.rank-32+optimizer.learning_rate-0.004": ("finished", 1),
    }
    assert "killed by signal 9" in sweep.jobs[KILLED].error
    preempted = sweep.log_path(sweep.jobs[PREEMPTED]).read_text()
    assert "SIGTERM: saving at the next update boundary" in preempted
    assert "resumed from the checkpoint at update" in preempted
    rows = [row["update"] for row in read_metrics(sweep.folder / PREEMPTED / "metrics.jsonl") if "loss" in row]
    assert rows == list(range(1, 61))  # nothing is missing, nothing twice

    # ── what the folder holds ──────────────────────────────────────────────────────────────────────────────────────
    with (sweep.folder / "sweep.csv").open() as file:
        table = {row["job"]: row for row in csv.DictReader(file)}
    results = {name: Result.read(sweep.folder / name / "result.json") for name in table if name != KILLED}
    assert all(float(table[name]["heldout_loss_last"]) == told.heldout_loss_last for name, told in results.items())
    best = min(results, key=lambda name: results[name].heldout_loss_last)
    assert f"`{best}`" in (sweep.folder / "sweep.md").read_text()
    assert (sweep.folder / "plots" / "parallel_coordinates.png").stat().st_size > 10_000


def test_the_parent_imports_no_jax(tmp_path):
    """On jobs that are refused, so that none is started; the whole of a sweep is there otherwise."""
    command = [sys.executable, "-X", "importtime", "-m", "gemma4_tpu.train", "-m", "model.path=random:0", "mesh.tp=3,5"]
    command += ["hardware=v5p8", "hydra.launcher.plan=false", "hydra.sweep.dir=sweep"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert "2 jobs: 2 refused" in done.stdout, done.stderr[-2000:]
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert {"gemma4_tpu.sweeping.processes", "gemma4_tpu.reporting.sweep_plots"} <= imported
    assert not imported & {"jax", "tunix", "qwix", "flax"}
