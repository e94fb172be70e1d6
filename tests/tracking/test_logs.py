"""What reaches the console and what reaches log.txt."""

import os
import pty
import subprocess
import sys

import pytest

NOISE = """if True:
    import logging, sys, warnings
    from pathlib import Path
    from gemma4_tpu.tracking.logs import setup_logging
    setup_logging(None)
    setup_logging(Path(sys.argv[1]), process=int(sys.argv[2]))
    ours = logging.getLogger("gemma4_tpu.data")
    ours.info("dropped 3 rows")
    ours.warning("capped")
    for name in ("absl", "orbax", "jax._src.dispatch", "httpx", "matplotlib.font_manager"):
        logging.getLogger(name).info("noise")
        logging.getLogger(name).warning("serious " + name)
    warnings.warn("deprecated thing")
    raise RuntimeError("boom")
"""


def test_console_and_file_get_what_is_theirs(python, tmp_path):
    log = tmp_path / "log.txt"
    done = python(NOISE, str(log), "0")
    lines, text = done.stderr.splitlines(), log.read_text()
    assert done.returncode == 1
    assert done.stdout == ""
    assert sum("dropped 3 rows" in line for line in lines) == 1  # though logging was set up twice
    assert any(line.endswith("WARNING: capped") for line in lines)
    assert all(len(line) <= 80 for line in lines)
    assert "INFO gemma4_tpu.data: dropped 3 rows" in text
    for output in (done.stderr, text):
        assert "noise" not in output
        assert "serious absl" in output
        assert "serious jax._src.dispatch" in output
    assert "deprecated thing" not in done.stderr
    assert "deprecated thing" in text
    assert done.stderr.count("RuntimeError: boom") == 1
    assert "Traceback" in text
    assert "RuntimeError: boom" in text


def test_other_processes_are_silent_below_warning(python, tmp_path):
    done = python(NOISE, str(tmp_path / "log.txt"), "1")
    assert "dropped 3 rows" not in done.stderr
    assert "capped" in done.stderr


def test_importing_tracking_imports_no_heavy_library(python):
    done = python("""if True:
        import sys
        from gemma4_tpu.tracking import files, logs, metrics, progress, provenance, records, result, run, trackers
        heavy = {"jax", "numpy", "torch", "tensorflow", "wandb", "matplotlib", "tensorboardX", "transformers"}
        print(sorted(heavy & set(sys.modules)))
        from gemma4_tpu.tracking import wandb_tracker
        print(sorted({"jax", "tensorflow"} & set(sys.modules)))
    """)
    assert done.stdout.split("\n")[:2] == ["[]", "[]"], done.stderr


PROGRESS = """if True:
    import logging, time
    from gemma4_tpu.tracking.logs import setup_logging
    from gemma4_tpu.tracking.progress import Progress
    setup_logging(None)
    with Progress(20) as progress:
        for update in range(1, 21):
            time.sleep(0.01)
            progress.advance(update)
            progress.log({"loss": 1 / update, "real_tokens_per_second": 12345.6}, update)
            if update == 10:
                logging.getLogger("gemma4_tpu.loop").info("saved a checkpoint")
"""


@pytest.mark.parametrize("no_color", ["", "1"])
def test_on_a_terminal_a_bar_stays_below_the_log_lines(no_color):
    environment = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
    environment |= {"TERM": "xterm-256color", "COLUMNS": "80"} | ({"NO_COLOR": no_color} if no_color else {})
    ours, theirs = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", PROGRESS], stderr=theirs, env=environment):
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 65536):
                shown += part
        except OSError:  # Linux says so when the other end is closed
            pass
    os.close(ours)
    text = shown.decode()
    assert "━━━" in text
    assert "20/20 loss 0.0500  12,346 tok/s  ETA 0:00:00" in text.replace("\x1b[32m", "").replace("\x1b[0m", "")
    assert "saved a checkpoint" in text
    assert ("\x1b[32m" in text) != bool(no_color)
