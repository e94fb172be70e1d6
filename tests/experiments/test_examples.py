"""The examples to fork: each runs as its page says, and learns what it is about."""

import re
import subprocess
import sys

import pytest

from tests.cpu_compiler import unhurried
from tests.house.scripts import ROOT

EXAMPLES = sorted(path.parent.name for path in (ROOT / "examples").glob("*/run.py"))


def test_each_is_short_and_told():
    page = (ROOT / "examples/README.md").read_text(encoding="utf-8")
    for name in EXAMPLES:
        assert len((ROOT / f"examples/{name}/run.py").read_text(encoding="utf-8").splitlines()) < 60
        assert f"python -m examples.{name}.run" in page


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_it_learns(name, tmp_path):
    words = [sys.executable, "-m", f"examples.{name}.run"]
    done = subprocess.run(
        words, cwd=tmp_path, env=unhurried() | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    told = r"^(?:{}):(?: \d+ samples .*\n  accuracy)?\D*([0-9.]+)"
    base, tuned = (float(re.search(told.format(who), done.stdout, re.M)[1]) for who in ("base", "tuned|run"))
    assert base == 0 and tuned >= (8 if tuned > 1 else 0.5)
