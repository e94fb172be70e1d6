"""A run that hangs ends with its stacks in log.txt; one that compiles does not."""

import subprocess
import sys
import textwrap
import time

from gemma4_tpu.errors import STALLED
from gemma4_tpu.training.watchdog import Watchdog

HANG = """
import sys, time
from pathlib import Path
from gemma4_tpu.training.watchdog import Watchdog

def hanging_collective():
    time.sleep(60)

log = Path(sys.argv[1])
with Watchdog(0.5, log, lambda reason: log.with_name("reason").write_text(reason)) as watchdog:
    with watchdog.paused():
        time.sleep(1.2)
    for _ in range(4):
        time.sleep(0.2)
        watchdog.progress()
    log.with_name("alive").touch()
    hanging_collective()
"""


def test_no_progress_dumps_every_stack_and_exits_with_its_own_code(tmp_path):
    log = tmp_path / "log.txt"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(HANG), log], capture_output=True, text=True, timeout=50
    )
    assert done.returncode == STALLED
    assert (tmp_path / "alive").exists()  # neither compilation nor slow progress counted as a stall
    assert "hanging_collective" in log.read_text() and "hanging_collective" in done.stderr
    assert "trainer.stall_seconds=0.5" in (tmp_path / "reason").read_text()


def test_null_never_ends_anything():
    with Watchdog(None, None) as watchdog:
        watchdog.progress()
        time.sleep(0.05)
