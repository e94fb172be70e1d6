"""`launch/demo.sh` with a Python that only pretends: the order of the steps, and a server that never outlives them."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

import gemma4_tpu
from tests.processes import wait_for

DEMO = Path(gemma4_tpu.__file__).parents[1] / "launch/demo.sh"
WAIT_SECONDS = 180
"""Each step starts a Python."""
PRETENDS = """#!{python}
import os, sys, time
words = sys.argv[1:]
if words[0] == "-c":
    exec(words[1])
    sys.exit()
name = words[1].removeprefix("gemma4_tpu.")
with open(os.environ["STEPS"], "a") as file:
    print(name, os.getpid(), *words[2:], file=file)
if name == "serve" and name != os.environ.get("FAILS"):
    print("endpoint: http://127.0.0.1", flush=True)
    time.sleep(600)
time.sleep(600 if name == os.environ.get("HANGS") else 0)
sys.exit(name == os.environ.get("FAILS"))
"""


class Demo:
    """The script under way, in a process group of its own, as on a terminal."""

    def __init__(self, folder: Path, **environment: str):
        python = folder / "python"
        python.write_text(PRETENDS.format(python=sys.executable))
        python.chmod(0o755)
        self._steps = folder / "steps.txt"
        (folder / "run").mkdir()
        own = {"PYTHON": str(python), "STEPS": str(self._steps), "DEMO_RUN": str(folder / "run")}
        self.process = subprocess.Popen(
            [str(DEMO), "lora.rank=8"], env={**os.environ, **own, **environment}, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    @property
    def steps(self) -> dict[str, list[str]]:
        """Step → pid and arguments, in their order; a step that comes twice is here once."""
        lines = self._steps.read_text().splitlines() if self._steps.exists() else []
        return {name: rest for name, *rest in map(str.split, lines)}

    def wait_for(self, step: str) -> None:
        wait_for(lambda: step in self.steps or self.process.poll() is not None, seconds=WAIT_SECONDS)
        assert step in self.steps

    def server_is_gone(self) -> bool:
        return not psutil.pid_exists(int(self.steps["serve"][0]))


def test_the_whole_path_in_order_around_one_run_folder(tmp_path):
    demo = Demo(tmp_path)
    assert demo.process.wait(WAIT_SECONDS) == 0
    assert list(demo.steps) == ["train", "merge", "evaluate", "serve", "bench", "report"]
    assert demo.steps["train"][1:] == [f"run_dir={tmp_path / 'run'}", "lora.rank=8"]
    assert demo.steps["report"][1:] == [f"run={tmp_path / 'run'}", "prices={local:0.10}"]
    assert demo.server_is_gone()


def test_a_step_that_fails_ends_it_and_the_server(tmp_path):
    demo = Demo(tmp_path, FAILS="bench")
    assert demo.process.wait(WAIT_SECONDS) == 1
    assert "report" not in demo.steps
    assert demo.server_is_gone()


def test_a_server_that_does_not_start_ends_it(tmp_path):
    demo = Demo(tmp_path, FAILS="serve")
    assert demo.process.wait(WAIT_SECONDS) == 1
    assert "bench" not in demo.steps


def test_shellcheck_finds_nothing():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: sudo apt-get install shellcheck")
    assert subprocess.run(["shellcheck", str(DEMO)], capture_output=True, text=True, check=False).stdout == ""


@pytest.mark.parametrize("to_all", [True, False], ids=["to all", "to the script"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_and_the_server(number, code, to_all, tmp_path):
    demo = Demo(tmp_path, HANGS="bench")
    demo.wait_for("bench")
    (os.killpg if to_all else os.kill)(demo.process.pid, number)
    assert demo.process.wait(WAIT_SECONDS) == code
    assert demo.server_is_gone()
