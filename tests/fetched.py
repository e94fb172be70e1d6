"""Tools that tests run as they are: SkyPilot, xpk, lm-evaluation-harness. Their dependencies are many and none of ours.

Each lives in an environment of its own, made once in the user's cache folder. The test is skipped where no package
registry can be reached; if one can, and the tool can't be installed from it, the test fails.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

_OUT_OF_REACH = ("error sending request", "HTTP status server error", "operation timed out")
LOCKS = Path(__file__).resolve().parents[1] / "requirements"


def tool(requirement: str) -> Path:
    """The `bin` folder of an environment that holds this tool, such as `xpk==1.13.0`."""
    place = _made(
        requirement, lambda at: [["venv", str(at)], ["pip", "install", "--python", f"{at}/bin/python", requirement]]
    )
    return place / "bin"


def locked(name: str) -> Path:
    """The `bin` folder of an environment that holds what `requirements/<name>.lock` says."""
    lock = LOCKS / f"{name}.lock"
    digest = hashlib.sha256(lock.read_bytes()).hexdigest()[:12]
    place = _made(
        f"{name}=={digest}",
        lambda at: [
            ["venv", str(at)],
            ["pip", "install", "--python", f"{at}/bin/python", "--require-hashes", "--no-deps", "-r", str(lock)],
        ],
    )
    return place / "bin"


def installed(*requirements: str) -> Path:
    """A folder for PYTHONPATH that holds these packages, without what they depend on."""
    return _made(requirements[0], lambda at: [["pip", "install", "--no-deps", "--target", str(at), *requirements]])


def _made(requirement: str, commands: Callable[[Path], list[list[str]]]) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemma4_tpu/tools"
    place = root / requirement.replace("==", "-")
    root.mkdir(parents=True, exist_ok=True)
    with place.with_name(f"{place.name}.lock").open("w") as lock:  # other workers need it, too
        fcntl.flock(lock, fcntl.LOCK_EX)
        return place if (place / "complete").exists() else _make(requirement, place, commands)


def _make(requirement: str, place: Path, commands: Callable[[Path], list[list[str]]]) -> Path:
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if uv is None:
        pytest.skip(f"{requirement} is tried only where uv can install it")
    shutil.rmtree(place, ignore_errors=True)
    for command in commands(place):
        try:
            done = subprocess.run([uv, "--quiet", *command], capture_output=True, text=True, timeout=150, check=False)
        except subprocess.TimeoutExpired:
            pytest.skip(f"could not be installed in time: {requirement}")
        if any(sign in done.stderr for sign in _OUT_OF_REACH):
            pytest.skip(f"could not be installed: {requirement}, no package registry is in reach")
        assert done.returncode == 0, f"{requirement} can't be installed: {done.stderr[-2000:]}"
    (place / "complete").touch()
    return place
