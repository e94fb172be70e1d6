"""The kill harness, short: a few kills of training, merging and evaluating, the same in the end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "chaos.py"


@pytest.mark.slow
def test_a_few_random_kills_lose_nothing_but_time(train, tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--kills", "8", "--each", "4", "--commands", "train,evaluate", "--seconds", "120",
         "--seed", "3", "--folder", tmp_path / "work"],
        capture_output=True, text=True, env=train.environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    evaluated = counts["commands"]["evaluate"]
    assert sum(counts["kills"].values()) >= 4 and evaluated["series"] == evaluated["went_on"] > 0
    assert counts["equal_weights"] == counts["equal_metrics"] == counts["equal_merges"] == counts["series"] > 0
    assert not counts["unrecoverable"] and not counts["different"] and not evaluated["wrong"]
