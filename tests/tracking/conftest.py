"""Run folders to write into, and child processes where a test needs one of its own."""

import os
import subprocess
import sys
import textwrap

import pytest

from gemma4_tpu.tracking.run import RunFolder

CONFIG = {
    "name": "t",
    "lora": {"rank": 16, "targets": ["attention", "mlp"]},
    "trainer": {"seed": 0, "max_updates": 100, "log_every": 1},
    "mesh": {"dp": 1, "fsdp": None, "tp": None},
}


@pytest.fixture
def run(tmp_path):
    folder = RunFolder.open("unused", "t", str(tmp_path / "run"), "auto", config=CONFIG, overrides=["name=t"])
    yield folder
    folder.close()


@pytest.fixture
def python():
    """Runs code in a new Python process and returns the finished process."""

    def start(code: str, *arguments: str, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess:
        env = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")} | environment
        command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, check=False)

    return start
