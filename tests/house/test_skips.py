"""CI is red where a test was skipped for a reason that tests/allowed_skips.txt does not name, or that must run."""

import os
import re
import subprocess
import sys

import pytest

from tests.conftest import OUT_OF_TIME
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
    allowed = tmp_path / "listed.txt"
    allowed.write_text(listed)
    check(told, tmp_path, "-n", str(workers), "--allowed-skips", str(allowed))


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ("test_other.py", None),
        ("test_other.py,test_some.py", "test_some.py has to run here: 1 tests passed, 2 were skipped"),
        ("test_gone.py", "test_gone.py has to run here: 0 tests passed, 0 were skipped"),
    ],
)
def test_a_file_that_has_to_run_fails_if_it_does_not(files, told, tmp_path):
    check(told, tmp_path, "-n", "0", "--must-run", files)


def test_what_would_begin_too_late_is_left_out_unless_it_has_to_run(tmp_path):
    (tmp_path / "test_some.py").write_text("def test_runs(): pass")
    (tmp_path / "test_other.py").write_text("def test_runs(): pass")
    done = run(tmp_path, "-n", "1", "-rs", "--begin-before", "1", "--must-run", "test_other.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed, 1 skipped" in done.stdout
    assert f"test_some.py: {OUT_OF_TIME}" in done.stdout


def check(told, place, *options):
    """Runs tests of two files, of which one skips; CI fails if it has something to tell."""
    (place / "test_some.py").write_text(TESTS)
    (place / "test_other.py").write_text("def test_runs(): pass")
    done = run(place, *options)
    assert done.returncode == (1 if told else 0), done.stdout + done.stderr
    assert "2 passed, 2 skipped" in done.stdout
    assert told is None or told in done.stdout


def run(place, *options):
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-c", "/dev/null", *options, str(place)],
        cwd=ROOT, env={**os.environ, "PYTEST_ADDOPTS": ""}, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip


def test_what_ci_must_run_is_there():
    """A renamed file would fail CI only after an hour."""
    named = re.search(r"must_run=(\S+)", (ROOT / ".ci/run").read_text())[1].split(",")
    assert len(named) >= 4 and all((ROOT / name).is_file() for name in named)
