"""The oldest transformers that pyproject.toml allows, in child processes beside the one that is installed, the newest.

It is installed by pip, by the pins of `requirements/oldest_transformers.lock`, into a folder that goes with the tests;
all else comes from this environment.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "requirements" / "oldest_transformers.lock"
_OUT_OF_REACH = ("from versions: none", "NewConnectionError", "Name or service not known", "ReadTimeout", "ProxyError")


@cache
def _installed() -> tuple[Path, str]:
    """(folder, why it is not there)."""
    scratch = tempfile.TemporaryDirectory(prefix="oldest-transformers-")
    atexit.register(scratch.cleanup)
    command = [
        sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "--no-input", "--retries=1",
        "--timeout=20", "--no-deps", "--no-compile", "--only-binary=:all:", "--require-hashes", "--target",
        scratch.name, "-r", str(LOCK),
    ]  # fmt: skip
    reason = "could not be installed: the oldest transformers, no package registry is in reach"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except subprocess.TimeoutExpired:
        return Path(scratch.name), reason
    if done.returncode == 0:
        return Path(scratch.name), ""
    assert any(sign in done.stderr for sign in _OUT_OF_REACH), done.stderr
    return Path(scratch.name), reason


def oldest(*words: str, given: str = "") -> None:
    """Runs `python -m <words>` where transformers is the oldest; skips the test where that cannot be installed."""
    folder, reason = _installed()
    if reason:
        pytest.skip(reason)
    env = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "PYTEST_ADDOPTS": ""}  # those are of this run
    done = subprocess.run(
        [sys.executable, "-m", *words], input=given, env=env, cwd=ROOT, capture_output=True, text=True, timeout=500,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-3000:]}{done.stderr[-3000:]}"


def by_oldest(tokens: np.ndarray, **job: Any) -> None:
    """`checkpoints._program` with the oldest transformers."""
    oldest("tests.models.checkpoints", given=json.dumps(job | {"tokens": tokens.tolist()}, default=str))
