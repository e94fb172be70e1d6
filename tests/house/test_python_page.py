"""docs/python.md: what it shows runs, one block after the other, in a process of its own."""

import re
import subprocess
import sys

import pytest

from tests.house.scripts import ROOT
from tests.tpu_compiler import skip_without_tpu_compiler

PAGE = (ROOT / "docs/python.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_page_runs_as_it_stands(tmp_path):
    skip_without_tpu_compiler()
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    assert len(blocks) >= 5
    done = subprocess.run([sys.executable, "-c", "\n".join(blocks)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert "It is 4" in done.stdout or any("→" in line for line in said)
    assert said[-1].startswith("fits ")
