"""The newest transformers in child processes, beside the one that this project asks for, which comes first in this one.

It is installed by pip, by the pins of `requirements/newest_transformers.lock`, into a folder that goes with the tests;
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
LOCK = ROOT / "requirements" / "newest_transformers.lock"
_OUT_OF_REACH = ("from versions: none", "NewConnectionError", "Name or service not known", "ReadTimeout", "ProxyError")


@cache
def _installed() -> tuple[Path, str]:
    """(folder, why it is not there)."""
    scratch = tempfile.TemporaryDirectory(prefix="newest-transformers-")
    atexit.register(scratch.cleanup)
    command = [
        sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "--no-input", "--retries=1",
        "--timeout=20", "--no-deps", "--no-compile", "--only-binary=:all:", "--require-hashes", "--target",
        scratch.name, "-r", str(LOCK),
    ]  # fmt: skip
    reason = "could not be installed: the newest transformers, no package registry is in reach"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except subprocess.TimeoutExpired:
        return Path(scratch.name), reason
    if done.returncode == 0:
        return Path(scratch.name), ""
    assert any(sign in done.stderr for sign in _OUT_OF_REACH), done.stderr
    return Path(scratch.name), reason


def newest(tokens: np.ndarray, **job: Any) -> None:
    """Runs `checkpoints._program` with the newest transformers; skips the test where that cannot be installed."""
    folder, reason = _installed()
    if reason:
        pytest.skip(reason)
    env = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    job |= {"tokens": tokens.tolist()}
    done = subprocess.run(
        [sys.executable, "-m", "tests.models.checkpoints"], input=json.dumps(job, default=str), env=env, cwd=ROOT,
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
