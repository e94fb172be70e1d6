"""A sample of the random cheats, with the scanner and without it; the record of a full run is in docs/judging.md."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.evals.verilog.designs import needs_iverilog

pytestmark = [needs_iverilog, pytest.mark.slow]


@pytest.mark.parametrize("options", [(), ("--unscanned",)], ids=["scanned", "unscanned"])
def test_no_random_cheat_passes(options):
    module = "tests.evals.verilog.cheat_generator"
    command = [sys.executable, "-m", module, "--count", "80", "--seed", "7", *options]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert report["passed"] == []
    assert sum(report["kinds"].values()) == report["count"] == 80
    assert report["kinds"]["mismatch"] >= 10  # not all of them are refused for their text, or don't compile
