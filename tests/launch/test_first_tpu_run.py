"""Every command of docs/first_tpu_run.md, run in order in a cloud that is played: launches for real, the other entry
points as far as their configuration is checked, everything else by its name and flags."""

import contextlib
import io
import os
import re
import subprocess
import sys
import threading
from multiprocessing.connection import Listener

import pytest

from gemma4_tpu.config.load import load
from gemma4_tpu.evaluate import EVALUATE
from gemma4_tpu.hardware import SLICES
from gemma4_tpu.launch import gke, parcel, tpu_vm
from gemma4_tpu.merge import MERGE
from gemma4_tpu.plan import PLAN
from gemma4_tpu.prices import ON_DEMAND, slice_price
from gemma4_tpu.train import TRAIN
from tests.launch.conftest import ROOT, put_on_path

PAGE = (ROOT / "docs/first_tpu_run.md").read_text()
BLOCKS = [re.sub(r"^  ", "", body, flags=re.M) if indent else body
          for indent, body in re.findall(r"^( *)```bash\n(.*?)^ *```", PAGE, re.M | re.S)]  # fmt: skip
ENTRIES = {f"gemma4_tpu.{entry.name}": entry for entry in (EVALUATE, MERGE, PLAN, TRAIN)}
LAUNCHERS = {"launch.tpu_vm": tpu_vm.main, "launch.gke": gke.main}
PYTHON = f"""#!{sys.executable} -S
# `python`, as the page calls it: asks the test to run the command in its own process, which saves the start-up.
import os, sys
from multiprocessing.connection import Client
with Client(os.environ["PYTHON_OF_TEST"], authkey=b"test") as client:
    client.send((sys.argv[1:], dict(os.environ)))
    code, out, err = client.recv()
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(code)
"""
GIT = """#!/bin/sh
if [ "$1" = clone ] && [ "$2" = --depth ]; then mkdir -p verilog-eval/dataset_spec-to-rtl; else exec {git} "$@"; fi
"""
NOTHING = "#!/bin/sh\n"


def in_this_process(arguments: list[str], environment: dict[str, str]) -> tuple[int, str, str]:
    """Runs `python -m MODULE …`; returns (exit code, standard output, standard error)."""
    dash_m, module, *words = arguments
    assert dash_m == "-m"
    out, err = io.StringIO(), io.StringIO()
    before = dict(os.environ)
    os.environ.update({name: value for name, value in environment.items() if name.startswith("CLOUDSDK")})
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            if module in LAUNCHERS:
                speed = ["launch.poll_seconds=0.01"] if module == "launch.tpu_vm" and "=" in words[0] else []
                code = LAUNCHERS[module]([*words, *speed])
            else:
                load(words, ENTRIES[module])
                code = 0
    finally:
        os.environ.clear()
        os.environ.update(before)
    return code, out.getvalue(), err.getvalue()


@pytest.mark.slow
def test_every_command_of_the_page_runs(played, tmp_path, monkeypatch):
    played.play({"states": ["WAITING_FOR_RESOURCES", "ACTIVE", "OVER:0"]})
    for name in ("result.json", "evaluations"):
        played.put(f"gs://my-gemma-project-gemma/runs/v5p8/{name}", "{}")
    git = subprocess.run(["which", "git"], capture_output=True, text=True, check=True).stdout.strip()
    for name, text in {"python": PYTHON, "git": GIT.format(git=git), "make": NOTHING, "hf": NOTHING}.items():
        put_on_path(monkeypatch, tmp_path / "bin", name, text)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").touch()
    (tmp_path / "rows.jsonl").touch()
    monkeypatch.setenv("PYTHON_OF_TEST", str(tmp_path / "socket"))
    for launcher in (gke, tpu_vm):  # the page's bucket is nowhere; tests/models/test_audit.py
        monkeypatch.setattr(launcher, "look_at_checkpoint", lambda model: [])
    # test_tpu_vm.py has the real one
    monkeypatch.setattr(parcel, "pack", lambda folder, checkout: [tmp_path / "rows.jsonl"])
    runs: list[list[str]] = []
    with Listener(str(tmp_path / "socket"), authkey=b"test") as listener:
        script = "set -euo pipefail\n" + "\n".join(BLOCKS)
        bash = subprocess.Popen(["bash", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        said: list[str] = []
        reader = threading.Thread(target=lambda: (said.extend(bash.communicate()), _wake(listener)))
        reader.start()
        while True:
            with listener.accept() as client:
                try:
                    arguments, environment = client.recv()
                except EOFError:  # bash has ended
                    break
                runs.append(arguments)
                client.send(in_this_process(arguments, environment))
        reader.join()
    assert bash.returncode == 0, said[1][-3000:]

    commands = re.findall(r"^python -m .*", "\n".join(BLOCKS), re.M)
    assert len(runs) == len(commands) >= 12
    assert played.resources == []  # nothing is left that costs
    (run,) = [call for call in played.asked("queued-resources", "create") if "v5p8" in call[4]][:1]
    assert f"--accelerator-type={SLICES['v5p-8'].accelerator_type}" in run
    assert "nothing launched here is in my-gemma-project us-east5-a" in said[0]


def _wake(listener: Listener) -> None:
    """Ends the wait for further commands."""
    from multiprocessing.connection import Client

    with contextlib.suppress(OSError):
        Client(listener.address, authkey=b"test").close()


def test_the_page_names_our_prices():
    price = slice_price(SLICES["v5p-8"], ON_DEMAND)
    assert f"${price.usd_per_hour:.2f} per hour" in PAGE and price.date in PAGE
    assert f"${3 * price.usd_per_hour:.2f}" in PAGE
    plans = (ROOT / "experiments/plans/README.md").read_text()
    (estimated,) = re.findall(r"\| training \| ([^|]+) \|", PAGE)
    assert "for the same slice and job here: " in plans and estimated in plans
