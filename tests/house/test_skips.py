"""CI is red where a test was skipped for a reason that tests/allowed_skips.txt does not name."""

import os
import subprocess
import sys

import pytest

from tests.house.scripts import ROOT

TESTS = """
import pytest
def test_runs(): pass
@pytest.mark.skipif(True, reason="no such machine: never here")
def test_needs_a_machine(): pass
def test_needs_a_program(): pytest.skip("no such program (1.2)")
"""


@pytest.mark.parametrize(
    ("listed", "workers", "told"),
    [
        ("no such machine  # why\nno such program (  # why\n", 0, None),
        ("# no such program\nno such machine\n", 0, "1 × no such program (1.2)"),
        ("no such program (1.2)\n", 1, "1 × no such machine: never here"),
    ],
)
def test_a_skip_that_is_not_listed_fails(listed, workers, told, tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    allowed = tmp_path / "listed.txt"
    allowed.write_text(listed)
    options = ["-p", "tests.conftest", "-c", "/dev/null", "-n", str(workers), "--allowed-skips", str(allowed)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(tmp_path)],
        cwd=ROOT, env={**os.environ, "PYTEST_ADDOPTS": ""}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == (1 if told else 0), done.stdout + done.stderr
    assert "1 passed, 2 skipped" in done.stdout
    assert told is None or told in done.stdout
