"""The kill harness: a short form of it on training, merging and evaluating, and what it must not let pass."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.killing import CODES, Killed, Process, problems

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "chaos.py"
SHARED = Path("/dev/shm")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_few_random_kills_lose_nothing_but_time(train, tmp_path):
    state = tmp_path / "state.json"
    done = subprocess.run(
        [sys.executable, SCRIPT, "--kills", "8", "--each", "4", "--commands", "train,evaluate", "--seconds", "800",
         "--seed", "3", "--folder", tmp_path / "work", "--state", state],
        capture_output=True, text=True, env=train.environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    kept = json.loads(state.read_text())
    counts, evaluated = kept["train"], kept["commands"]["evaluate"]
    assert {what.split()[0] for what in counts["kills"]} == {"train", "merge"} and sum(counts["kills"].values()) >= 4
    assert evaluated["series"] == evaluated["went_on"] > 0
    assert counts["equal_weights"] == counts["equal_metrics"] == counts["equal_merges"] == counts["series"] > 0
    assert not counts["unrecoverable"] + counts["different"] + counts["wrong"] + evaluated["wrong"]


def say(text: str) -> None:
    os.write(2, text.encode())


def command(*, says=("\ninterrupted; the same command resumes\n",), code=143, leaves=lambda: None):
    """One that is asked to end, says this, leaves something and exits."""

    def main(words: list[str]) -> int:
        def stop(number, frame):
            leaves()
            for text in says:
                say(text)
            os._exit(code)

        signal.signal(signal.SIGTERM, stop)
        say("10:00:00 started\n")
        time.sleep(300)
        return 0

    return main


def share():
    (SHARED / f"test_chaos_{os.getpid()}_x").touch()


def keep_running():
    if os.fork() == 0:
        time.sleep(300)
        os._exit(0)


SERVES = Killed("server", "", lambda place: [], lambda place: None, ready="ready")


@pytest.mark.parametrize(
    ("main", "subject", "complete", "told"),
    [
        (command(), None, False, None),
        (command(says=("10:00:01 WARNING: SIGTERM: saving\n", "10:00:02 WARNING: preempted and saved at update 3\n")),
         None, False, None),
        (command(says=()), None, False, "0 messages, not 1"),
        (command(says=("interrupted\n", "interrupted; resumes\n")), None, False, "2 messages, not 1"),
        (command(says=("interrupted\n", "UserWarning: leaked\n")), None, False, "also printed ['UserWarning: leaked']"),
        (command(says=("interrupted\n", "10:00:01 ERROR: no such file\n")), None, False, "also printed"),
        (command(says=("Traceback (most recent call last):\n", "interrupted\n")), None, False, "also printed"),
        (command(code=1), None, False, "exit code 1, not (143,)"),
        (command(code=0, says=()), None, True, None),
        (command(code=0, says=()), None, False, "exit code 0, but it is not complete"),
        (command(code=0), None, True, "1 messages, not 0"),
        (command(code=0, says=("10:00:01 SIGTERM: stopped\n",)), SERVES, True, None),
        (command(code=0, says=()), SERVES, True, "0 messages, not 1"),
        (command(leaves=lambda: (Path(os.environ["TMPDIR"]) / "x").touch()), None, False, "temporary folder: ['x']"),
        (command(leaves=share), None, False, "left in /dev/shm: ['test_chaos_"),
        (command(leaves=keep_running), None, False, "still running: "),
    ],
)  # fmt: skip
def test_what_a_stopped_command_may_not_do_is_found(main, subject, complete, told, tmp_path, monkeypatch):
    monkeypatch.setattr(Process.left, "__defaults__", (0.3,))
    process = Process(main, [], tmp_path / "command.txt")
    while "started" not in process.said():
        time.sleep(0.01)
    process.kill(signal.SIGTERM, 60)
    found = list(problems(process, signal.SIGTERM, CODES[signal.SIGTERM], lambda: complete, subject))
    for one in process.others():
        one.kill()
    for path in SHARED.glob(f"test_chaos_{process.pid}_*"):
        path.unlink()
    assert (len(found), found[0].find(told) >= 0) == (1, True) if told else found == [], found
