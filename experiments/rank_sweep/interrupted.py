"""Runs the 2 × 2 sweep of the tiny model and does to two of its jobs what happens to sweeps on spot machines.

    python experiments/rank_sweep/interrupted.py [key=value …]

One job gets a SIGTERM (a preemption: it saves, and the sweep starts it again), another one a SIGKILL (as the kernel
sends it when memory runs out: it fails). Words that are given come last on the sweep's command line.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from gemma4_tpu.sweeping.state import RUNNING, Sweep
from gemma4_tpu.tracking.metrics import read_metrics

FOLDER = "outputs/rank_sweep_tiny"
COMMAND = [
    sys.executable, "-m", "gemma4_tpu.train", "-m", "name=rank_sweep_tiny",
    "lora.rank=4,32", "optimizer.learning_rate=1e-3,4e-3",
    "trainer.max_updates=80", "trainer.eval_every=20", "checkpoint.every=20",
]  # fmt: skip
SIGNALS = {
    "lora.rank-4+optimizer.learning_rate-0.004": signal.SIGKILL,
    "lora.rank-32+optimizer.learning_rate-0.001": signal.SIGTERM,
}
AFTER_UPDATES = 3
"""Updates of its own that a job has made when the signal comes."""


def main(words: list[str]) -> int:
    """The sweep's exit code."""
    folder = next((w.partition("=")[2] for w in words if w.startswith("hydra.sweep.dir=")), FOLDER)
    process = subprocess.Popen([*COMMAND, f"hydra.sweep.dir={folder}", *words])
    left = dict(SIGNALS)
    try:
        while process.poll() is None:
            time.sleep(0.05)
            for name in list(left):
                if pid := _pid_of(Path(folder), name):
                    os.kill(pid, left.pop(name))
    finally:
        process.terminate()
    return process.wait()


def _pid_of(folder: Path, name: str) -> int | None:
    """The process of a job that has made some updates; None: not yet."""
    metrics = folder / name / "metrics.jsonl"
    if not metrics.is_file() or max((row["update"] for row in read_metrics(metrics)), default=0) < AFTER_UPDATES:
        return None
    job = Sweep.open(folder).jobs.get(name)
    return job.pid if job and job.status == RUNNING else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
