"""vLLM as a process, by a command that is played: the same launcher, and no process of it is left."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.processes import ends, wait_for
from tests.serving import fake_docker_path
from tests.serving.test_server import PROBE, SLOW, result


@pytest.fixture
def vllm(docker):
    """Keys that run the played command; `docker` plays its scenario."""
    program = docker.folder / "bin" / "vllm"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {fake_docker_path()} _process "$@"\n')
    program.chmod(0o755)
    return ["serving.runner=process", "serving=v6e8"]


def test_a_process_is_probed_served_and_gone(serve, stop_when_ready, merged, docker, vllm, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "s3cret" * 3)
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    model = merged(probe=PROBE)
    docker.play(lines=SLOW, answer={"5": 11, "8": 12})
    stop_when_ready(signal.SIGTERM)
    assert serve(model, *vllm) == 0
    done = result(serve)
    assert (done["status"], done["runner"], done["image"], done["probe"]["as_merged"]) == (
        "stopped",
        "process",
        None,
        2,
    )
    assert "s3cret" not in json.dumps(done)
    given = docker.last
    assert given["command"][:2] == ["serve", str(model)]
    assert given["environment"]["VLLM_API_KEY"] and "PYTHONPATH" not in given["environment"]
    assert Path(given["environment"]["VLLM_XLA_CACHE_PATH"]).is_dir()
    assert ends(given["child"])
    assert "Precompile backbone" in (serve.record / "server.log").read_text()
    assert docker.calls == []


def test_one_that_answers_like_the_base_is_stopped(serve, merged, docker, vllm, capsys):
    docker.play(answer={"5": 22, "8": 23})
    assert serve(merged(probe=PROBE), *vllm) == 2
    assert "like the base model" in capsys.readouterr().err
    assert ends(docker.last["child"])


def test_a_crash_ends_what_vllm_has_started(serve, merged, docker, vllm, capsys):
    """Its log ends though a child still holds it."""
    docker.play(lines=[[0.0, f"line {n}"] for n in range(40)], exit=3)
    assert serve(merged(), *vllm) == 2
    told = capsys.readouterr().err
    assert "exit code 3" in told and "line 39" in told
    assert ends(docker.last["child"])


def test_a_second_signal_kills_one_that_does_not_end(serve, stop_when_ready, merged, docker, vllm, monkeypatch):
    monkeypatch.setattr("gemma4_tpu.serving.server.STOP_SECONDS", 400)
    docker.play(deaf=True)
    stop_when_ready(signal.SIGINT)
    stop_when_ready(signal.SIGINT, sign="stopping the server")
    started = time.monotonic()
    assert serve(merged(), *vllm) == 0
    assert time.monotonic() - started < 200  # far less than it had
    assert ends(docker.last["child"])


def test_a_launcher_that_is_killed_leaves_no_server(process, merged, docker, vllm, tmp_path):
    docker.play(hang=True)
    running = process(merged(), *vllm)
    wait_for((docker.folder / "last.json").exists)
    parent = int(Path(f"/proc/{docker.last['child']}/stat").read_text().rsplit(")", 1)[1].split()[1])
    os.kill(running.pid, signal.SIGKILL)
    assert ends(parent)
    os.kill(docker.last["child"], signal.SIGKILL)  # vLLM ends its own; this one was deaf


def test_a_command_that_is_not_there(serve, merged, docker, capsys):
    assert serve(merged(), "serving.runner=process", "serving.executable=/nowhere/vllm") == 2
    assert "serving.executable=/nowhere/vllm: no such command" in capsys.readouterr().err
    moved = docker.folder / "vllm"
    moved.write_text("#!/nowhere/python\n")
    moved.chmod(0o755)
    assert serve(merged(folder="again"), "serving.runner=process", f"serving.executable={moved}") == 2
    assert "can't be run (No such file or directory); was its environment moved?" in capsys.readouterr().err
