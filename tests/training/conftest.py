"""Runs of the real command line in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cpu_compiler import flags

REPO = Path(__file__).parents[2]

# Everything that makes a bitwise resume hard: dropout, accumulation, packing, asynchronous saves.
HARD = [
    "model.path=random:0", "lora.rank=4", "lora.dropout=0.1", "data.sequence_length=256", "data.max_rows=120",
    "data.heldout=[]", "data.heldout_fraction=0.1",
    "trainer.global_batch_sequences=4", "trainer.microbatches=2", "trainer.max_updates=8", "trainer.eval_every=4",
    "trainer.remat=none", "optimizer.warmup_updates=0", "checkpoint.every=2", "checkpoint.keep=4",
]  # fmt: skip


class Command:
    """A training on one CPU device, with a compilation cache that the runs of a session share; without PyTorch."""

    def __init__(self, cache: Path, *program: str):
        self._cache, self._program = cache, program

    def environment(self, devices: int = 1) -> dict[str, str]:
        """Of a process with so many CPU devices."""
        return {
            **os.environ, "PYTHONPATH": f"{REPO / 'tests/without_torch'}{os.pathsep}{REPO}",
            "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags(devices),
            "JAX_COMPILATION_CACHE_DIR": str(self._cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }  # fmt: skip

    def start(self, *overrides: str, cwd: Path, devices: int = 1) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, *self._program, *overrides], cwd=cwd, env=self.environment(devices), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def __call__(self, *overrides: str, cwd: Path, exit_code: int = 0, devices: int = 1) -> subprocess.CompletedProcess:
        process = self.start(*overrides, cwd=cwd, devices=devices)
        out, err = process.communicate(timeout=600)
        assert process.returncode == exit_code, f"exit {process.returncode}\n{out}\n{err}"
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.getbasetemp().parent / "compilation-cache"  # one for all test workers


@pytest.fixture(scope="session")
def train(cache) -> Command:
    """`python -m gemma4_tpu.train`."""
    return Command(cache, "-m", "gemma4_tpu.train")


@pytest.fixture(scope="session")
def shallow(cache) -> Command:
    """The same with a `tiny` of two layers."""
    return Command(cache, str(Path(__file__).with_name("shallow.py")))
