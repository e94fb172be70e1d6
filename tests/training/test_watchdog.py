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
    time.sleep(300)

log = Path(sys.argv[1])
with Watchdog(2, log, lambda reason: log.with_name("reason").write_text(reason)) as watchdog:
    with watchdog.paused():
        time.sleep(2.5)
    for _ in range(6):
        time.sleep(0.4)
        watchdog.progress()
    log.with_name("alive").touch()
    hanging_collective()
"""


def test_no_progress_dumps_every_stack_and_exits_with_its_own_code(tmp_path):
    log = tmp_path / "log.txt"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(HANG), log], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == STALLED
    assert (tmp_path / "alive").exists()  # neither compilation nor slow progress counted as a stall
    assert "hanging_collective" in log.read_text() and "hanging_collective" in done.stderr
    assert "trainer.stall_seconds=2" in (tmp_path / "reason").read_text()


def test_null_never_ends_anything():
    with Watchdog(None, None) as watchdog:
        watchdog.progress()
        time.sleep(0.05)
