"""Child processes whose output becomes a file: without secrets, as it comes, and never longer than this process."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from gemma4_tpu.children import run_logged
from tests.processes import ends, is_alive, wait_for
from tests.training.test_security import SECRETS

ENDLESS = '#!/bin/sh\necho $$ > "$PID_FILE"\nexec sleep 600\n'
CALLS = {
    "execute": "engine.ContainerEngine('endless').execute('c', ['x'], Path('log'))",
    "logs": "engine.ContainerEngine('endless').logs('c').wait()",
    "pull": "engine.ContainerEngine('endless').pull('image')",
    "bench": "vllm_place.OnThisMachine(ServingConfig(executable='endless'), None).run(['bench'], Path('log'))",
    "lm_eval": "harness_job._run(['endless'], Path('log'), EvalConfig(), 'tokenizer')",
}
"""Every child of these modules, by what starts it."""
IMPORTS = """
from pathlib import Path
from gemma4_tpu.benching import vllm_place
from gemma4_tpu.config.serving import ServingConfig
from gemma4_tpu.config.tasks import EvalConfig
from gemma4_tpu.evals import harness_job
from gemma4_tpu.serving import engine
"""


def python(tmp_path, code):
    return run_logged([sys.executable, "-u", "-c", code], tmp_path / "log")


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux ends children with their parent")
@pytest.mark.parametrize("call", CALLS)
def test_a_child_ends_with_a_parent_that_is_killed(call, tmp_path):
    program, told = tmp_path / "endless", tmp_path / "pid"
    program.write_text(ENDLESS)
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "PID_FILE": str(told)}
    parent = subprocess.Popen([sys.executable, "-c", IMPORTS + CALLS[call]], env=environment, cwd=tmp_path)
    child = int(wait_for(lambda: told.exists() and told.read_text().strip()))
    assert is_alive(child) and parent.poll() is None
    parent.kill()
    parent.wait()
    assert ends(child)


def test_lines_are_in_the_file_at_once_and_without_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_SERVICE_PASSWORD", SECRETS["MY_SERVICE_PASSWORD"])
    go = tmp_path / "go"
    code = f"""
import os, pathlib, sys, time
print("Namespace(base_url='http://me:planted@host/v1', key='" + os.environ["MY_SERVICE_PASSWORD"] + "')")
while not pathlib.Path({str(go)!r}).exists(): time.sleep(0.02)
sys.stderr.write("10%|#\\r20%|##\\n\\nthe end")
sys.exit(3)
"""
    codes = []
    runner = threading.Thread(target=lambda: codes.append(python(tmp_path, code)))
    runner.start()
    wait_for(lambda: (tmp_path / "log").exists() and (tmp_path / "log").read_text().endswith("\n"))
    go.touch()
    runner.join()
    said = (tmp_path / "log").read_text()
    assert codes == [3]
    assert said == "Namespace(base_url='http://***@host/v1', key='***')\n10%|#\n20%|##\nthe end\n"


def test_what_a_child_has_left_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("gemma4_tpu.children._DRAIN_SECONDS", 300.0)
    left = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid)"
    started = time.monotonic()
    assert python(tmp_path, left) == 0
    assert time.monotonic() - started < 200  # its output does not end by itself
    assert ends(int((tmp_path / "log").read_text()))


@pytest.mark.parametrize("deaf", [False, True])
def test_one_that_is_watched_ends_when_the_watcher_raises(deaf, tmp_path, monkeypatch):
    monkeypatch.setattr("gemma4_tpu.children.END_SECONDS", 0.5)
    seen = []

    def watch(pid, silent_seconds):
        seen.append(pid)
        if silent_seconds > 0.5 and "ready" in (tmp_path / "log").read_text():
            raise RuntimeError("silent")

    ignore = f"import signal, time; signal.signal({int(signal.SIGTERM)}, signal.SIG_IGN if {deaf} else signal.SIG_DFL)"
    with pytest.raises(RuntimeError, match="silent"):
        run_logged(
            [sys.executable, "-u", "-c", f"{ignore}; print('ready'); time.sleep(600)"], tmp_path / "log", watch=watch
        )
    assert not is_alive(seen[-1])


def test_a_program_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        run_logged(["/no/such/program"], tmp_path / "log")
