"""A container engine that is played on the PATH, a merged folder, and a server in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from gemma4_tpu import assets
from gemma4_tpu.architectures import ARCHITECTURES, to_hf_config
from gemma4_tpu.serve import main
from tests.ports import free_port
from tests.serving import TINY, fake_docker_path

MODULE = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
"""That an adapter adapts."""
FLAGS = Path(assets.ROOT, "vllm_0_32_flags.txt")


class Docker:
    """The played engine: what it was told to do, and what it was asked."""

    def __init__(self, folder: Path):
        self.folder = folder

    def play(self, **scenario):
        (self.folder / "scenario.json").write_text(json.dumps(scenario))

    @property
    def calls(self):
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def last(self):
        """Image, command, mounts and environment of the last container."""
        return json.loads((self.folder / "last.json").read_text())

    @property
    def containers(self):
        return list((self.folder / "containers").glob("*"))


@pytest.fixture
def docker(tmp_path, monkeypatch):
    folder = tmp_path / "docker"
    programs = folder / "bin"
    programs.mkdir(parents=True)
    program = programs / "docker"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {fake_docker_path()} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_DOCKER", str(folder))
    monkeypatch.setenv("FAKE_FLAGS", str(FLAGS))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("HF_TOKEN", "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    yield Docker(folder)
    for pid in folder.glob("containers/*/pid"):  # of a test that failed
        try:
            os.kill(int(pid.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            continue


@pytest.fixture
def port():
    return free_port()


@pytest.fixture
def merged(tmp_path):
    """Makes a merged folder as far as anything here looks."""

    def make(architecture="gemma4_31b", *, probe=None, folder="model", multimodal=True, **changes):
        place = tmp_path / folder
        place.mkdir(parents=True)
        config = to_hf_config(ARCHITECTURES[architecture]) | changes
        if multimodal:
            config = {
                "model_type": "gemma4",
                "architectures": ["Gemma4ForConditionalGeneration"],
                "text_config": config,
            }
        (place / "config.json").write_text(json.dumps(config))
        (place / "model.safetensors").touch()
        (place / "tokenizer.json").write_text("{}")
        if probe is not None:
            (place / "probe.json").write_text(json.dumps({"prompts": probe}))
        return place

    return make


@pytest.fixture
def base(merged):
    return merged("gemma4_e2b", folder="base")


@pytest.fixture
def adapted(tmp_path, base):
    """Makes a run folder with an adapter, as far as anything here looks."""

    def make(name="a", *, fingerprint="f", probe=None, modules=(MODULE,), **changes):
        run = tmp_path / name
        folder = run / "adapter"
        folder.mkdir(parents=True)
        (run / "checkpoints").mkdir()
        (run / "config.yaml").write_text("{}")
        (run / "provenance.json").write_text(json.dumps({"fingerprints": {"base": fingerprint}}))
        config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "base_model_name_or_path": str(base)}
        (folder / "adapter_config.json").write_text(json.dumps(config | changes))
        factors = {f"{m}.lora_{x}.weight": np.zeros((2, 2), np.float32) for m in modules for x in "AB"}
        save_file(factors, folder / "adapter_model.safetensors")
        if probe is not None:
            (folder / "probe.json").write_text(json.dumps({"prompts": probe}))
        return run

    return make


@pytest.fixture
def serve(docker, port, tmp_path, monkeypatch):
    """Runs `python -m gemma4_tpu.serve` in this process; returns its exit code. `record` is the record's folder."""
    monkeypatch.setattr("gemma4_tpu.serving.server.POLL_SECONDS", 0.05)

    def run(model, *words):
        given = [f"run={model}", f"serving.port={port}", f"run_dir={tmp_path / 'record'}", *words]
        return main(given)

    run.record = tmp_path / "record"
    return run


@pytest.fixture
def stop_when_ready(serve):
    """Sends this process a signal as soon as the server that it serves is announced."""
    threads = []

    def arm(number=signal.SIGINT, sign="ready"):
        def watch():
            until = time.monotonic() + 120
            path = serve.record / "log.txt"
            while time.monotonic() < until:
                if path.exists() and sign in path.read_text():
                    os.kill(os.getpid(), number)
                    return
                time.sleep(0.02)

        threads.append(threading.Thread(target=watch, daemon=True))
        threads[-1].start()

    yield arm
    for thread in threads:
        thread.join()


@pytest.fixture
def process(docker, port, tmp_path):
    """Starts `python -m gemma4_tpu.serve` as a process of its own."""
    started = []

    def run(model, *words):
        command = [sys.executable, "-m", "gemma4_tpu.serve", f"run={model}", f"serving.port={port}"]
        command += [f"run_dir={tmp_path / 'record'}", *words]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield run
    for one in started:
        if one.poll() is None:
            one.kill()
        one.communicate()


@pytest.fixture(scope="session")
def tiny_engine():
    """The embedded server's engine in this process, with the tiny model."""
    from gemma4_tpu.serving.local_engine import LocalEngine
    from gemma4_tpu.serving.local_metrics import Metrics
    from tests.serving.local_requests import started

    made = started(LocalEngine(TINY, "float32", Metrics("m"), sequences=8, prompt_tokens=512))
    yield made
    made.stop()
