"""From start to end with a container engine that is played: slow compiles, crashes, conflicts, signals."""

import json
import signal
import socket
import time

import pytest

from tests.processes import wait_for

SLOW = [
    [0.0, "INFO 10-01 10:00:00 [api_server.py:1] non-default args: {'model': '/model'}"],
    [0.1, "Loading safetensors checkpoint shards:  50% Completed | 1/2 [00:01<00:01,  1.00s/it]"],
    [1.0, "INFO [compilation_manager.py:133] Precompile backbone --> {'num_tokens': 16}"],
    [1.0, "INFO [compilation_manager.py:150] Compilation of backbone --> {'num_tokens': 16} finished in 9.10 [secs]."],
    [0.1, "INFO [compilation_manager.py:150] Compilation of logits --> {} finished in 1.10 [secs]."],
]
PROBE = [{"tokens": [5, 6, 7], "merged": 11, "base": 22}, {"tokens": [8, 9], "merged": 12, "base": 23}]


def result(serve):
    return json.loads((serve.record / "result.json").read_text())


def test_a_server_starts_compiles_answers_and_leaves_nothing(
    serve, stop_when_ready, merged, docker, tmp_path, capsys, monkeypatch
):
    secret = "hf_" + "s3cr3t" * 5
    monkeypatch.setenv("HF_TOKEN", secret)
    model = merged(probe=PROBE)
    docker.play(image=False, lines=[*SLOW, [0.0, f"INFO the token is {secret}"]], answer={"5": 11, "8": 12})
    before = sorted(tmp_path.glob("*"))
    stop_when_ready(signal.SIGTERM)
    started = time.monotonic()
    assert serve(model) == 0
    seconds = time.monotonic() - started
    shown, done = capsys.readouterr(), result(serve)
    assert f"endpoint: {done['endpoint']}\nmodel: model" in shown.out
    log = (serve.record / "log.txt").read_text()
    for told in ("loading weights, 1 of 2 files", "compiling", "answers 2 of 2 stored prompts", "ready"):
        assert told in log, told
    assert "Precompile backbone" in (serve.record / "server.log").read_text()
    assert "serving: from the paper, section 7" in " ".join(shown.err.split())  # before the start
    assert (done["status"], done["version"], done["probe"]["as_merged"]) == ("stopped", "0.32.0+played", 2)
    assert 0 < done["ready_seconds"] < seconds
    assert ["pull", "vllm/vllm-tpu:v0.32.0"] in docker.calls
    assert done["image_digest"] == "vllm/vllm-tpu@sha256:" + "0" * 64
    assert docker.containers == []
    assert docker.calls[-2][:2] == ["stop", "-t"]  # asked before it is removed
    assert sorted(tmp_path.glob("*")) == sorted([*before, serve.record, tmp_path / "cache"])
    assert docker.last["mounts"] == {"/model": str(model), "/cache": str(tmp_path / "cache/gemma4_tpu/vllm")}
    assert (tmp_path / "cache/gemma4_tpu/vllm").is_dir()
    # The token is handed on by name, and shown nowhere.
    assert docker.last["environment"]["HF_TOKEN"] == secret
    places = [shown.out, shown.err, json.dumps(docker.calls)]
    places += [path.read_text() for path in serve.record.rglob("*") if path.is_file()]
    assert not any(secret in text for text in places)
    assert "the token is ***" in (serve.record / "server.log").read_text()


def test_a_server_that_answers_like_the_base_is_refused(serve, merged, docker, capsys):
    docker.play(answer={"5": 22, "8": 23})
    assert serve(merged(probe=PROBE)) == 2
    assert "like the base model" in capsys.readouterr().err
    assert docker.containers == []
    assert result(serve)["status"] == "failed"


def test_a_known_error_comes_with_its_remedy(serve, merged, docker, capsys):
    line = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 35G of 31G"
    docker.play(lines=[[0.05, "INFO loading"], [0.0, line], [0.0, "INFO bye"]], exit=1)
    assert serve(merged()) == 2
    told = capsys.readouterr().err
    assert "lower serving.max_model_len" in told and line in told
    assert docker.containers == []


def test_a_known_error_of_a_server_that_hangs_ends_it_early(serve, merged, docker, capsys, monkeypatch):
    monkeypatch.setattr("gemma4_tpu.serving.server.TROUBLE_SECONDS", 0.3)
    monkeypatch.setattr("gemma4_tpu.serving.server.STOP_SECONDS", 1)
    docker.play(lines=[[0.0, "jaxlib.XlaRuntimeError: RESOURCE_EXHAUSTED: Attempting to reserve 6.14G"]], hang=True)
    assert serve(merged()) == 2
    assert "HBM" in capsys.readouterr().err
    assert docker.containers == []


def test_an_unknown_crash_shows_the_last_lines(serve, merged, docker, capsys):
    docker.play(lines=[[0.0, f"line {n}"] for n in range(40)], exit=3)
    assert serve(merged()) == 2
    told = capsys.readouterr().err
    assert "exit code 3" in told and "line 39" in told and "line 2\n" not in told
    assert result(serve)["error"] == "the server did not start: exit code 3; its last lines:"


def test_the_first_exception_of_vllms_processes_is_told(serve, merged, docker, capsys):
    """As vLLM 0.32 logs it: the process that started the failed one raises again, and names no cause."""
    worker = "(Worker pid=7) ERROR 11-26 22:35:35 [multiproc_executor.py:953]"
    lines = [
        f"{worker}     raise ValueError(", f"{worker} ValueError: Failed to find a kernel. Reasons:",
        f"{worker}  CPUWNA16LinearKernel cannot implement it", "(EngineCore pid=3) INFO 11-26 [m.py:4] shutdown",
        "(EngineCore pid=3) ERROR 11-26 22:35:40 [core.py:1510] Exception: WorkerProc initialization failed",
        *[f"  File {n}" for n in range(30)], "RuntimeError: Engine core initialization failed. See root cause above.",
    ]  # fmt: skip
    docker.play(lines=[[0.0, line] for line in lines], exit=1)
    assert serve(merged()) == 2
    told = "exit code 1: ValueError: Failed to find a kernel. Reasons:\n   CPUWNA16LinearKernel cannot implement it\n("
    assert told in capsys.readouterr().err
    assert result(serve)["error"].endswith("exit code 1: ValueError: Failed to find a kernel. Reasons:")


def test_a_server_that_dies_later_is_told(serve, merged, docker, capsys):
    docker.play(dies=1, dies_after=0.5)
    assert serve(merged(), "serving.probe=false") == 2
    assert "ended by itself: exit code 1" in capsys.readouterr().err
    assert docker.containers == []
    assert result(serve)["served_seconds"] > 0


def test_no_answer_in_time(serve, merged, docker, capsys):
    docker.play(lines=[[0, line] for _, line in SLOW], hang=True)
    assert serve(merged(), "serving.ready_timeout_seconds=4") == 2  # far more than a busy machine takes to say all that
    told = capsys.readouterr().err
    assert "does not answer after" in told and "compiling, 2 programs done" in told
    assert docker.containers == []


@pytest.mark.parametrize(
    ("scenario", "advice"),
    [
        ({"daemon": False}, "systemctl start docker"),
        (
            {"image": False, "pull_error": "manifest for vllm/vllm-tpu:v0.32.0 not found: manifest unknown"},
            "no such image",
        ),
        ({"run_error": 'could not select device driver "" with capabilities: [[gpu]]'}, "container toolkit"),
    ],
    ids=["no daemon", "no image", "no toolkit"],
)
def test_an_engine_that_refuses(serve, merged, docker, capsys, scenario, advice):
    docker.play(**scenario)
    assert serve(merged()) == 2
    assert advice in capsys.readouterr().err
    assert docker.containers == []


def test_a_container_of_another_server_is_left_alone(serve, merged, docker, capsys, port):
    other = docker.folder / "containers" / ("f" * 64)
    other.mkdir(parents=True)
    (other / "name").write_text(f"gemma4-serve-{port}")
    assert serve(merged()) == 2
    assert f"docker rm -f gemma4-serve-{port}" in capsys.readouterr().err
    assert docker.containers == [other]


def test_a_port_that_is_taken(serve, merged, docker, capsys, port):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        assert serve(merged()) == 2
    assert f"serving.port={port}: can't listen on 127.0.0.1 (Address already in use)" in capsys.readouterr().err
    assert docker.calls == []
    docker.play(lines=[[0.0, "OSError: [Errno 98] Address already in use"]], exit=1)  # taken after the check
    assert serve(merged(folder="again")) == 2
    assert "set another serving.port" in capsys.readouterr().err


def test_a_signal_while_it_compiles(process, merged, docker, tmp_path):
    docker.play(lines=SLOW, hang=True)
    running = process(merged())
    log = tmp_path / "record" / "log.txt"
    wait_for(lambda: running.poll() is not None or (log.exists() and "compiling" in log.read_text()), seconds=120)
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=120)
    assert running.returncode == 130
    assert docker.containers == []
    assert json.loads((tmp_path / "record/result.json").read_text())["status"] == "interrupted"


@pytest.fixture
def heeding_sighup():
    """As where it isn't ignored: `nohup make test` would leave it so."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("heeding_sighup")
def test_a_second_signal_kills_a_server_that_does_not_end(serve, stop_when_ready, merged, docker, monkeypatch):
    monkeypatch.setattr("gemma4_tpu.serving.server.STOP_SECONDS", 400)
    docker.play(deaf=True)
    stop_when_ready(signal.SIGHUP)
    stop_when_ready(signal.SIGINT, sign="stopping the server")
    started = time.monotonic()
    assert serve(merged()) == 0
    assert time.monotonic() - started < 200  # far less than it had
    assert docker.containers == []
