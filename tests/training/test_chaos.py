"""The chaos benchmark, short: a few kills, the same bits in the end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "chaos.py"


@pytest.mark.slow
def test_a_few_random_kills_lose_nothing_but_time(train, tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--kills", "5", "--seconds", "60", "--seed", "3", "--folder", tmp_path / "work"],
        capture_output=True, text=True, env=train.environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert sum(counts["kills"].values()) == 5
    assert counts["equal_weights"] == counts["equal_metrics"] == counts["equal_merges"] == counts["series"] > 0
    assert not counts["unrecoverable"] and not counts["different"]
