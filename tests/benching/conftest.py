"""Scripted servers, and benchmarks against them."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gemma4_tpu.bench import main
from tests.serving.conftest import docker, merged, port  # noqa: F401  (fixtures)

SERVER = Path(__file__).with_name("scripted_server.py")


class Played:
    """A scripted server that runs."""

    def __init__(self, folder, script):
        self._log = folder / "answers.jsonl"
        with open(self._log, "w") as file:
            self.process = subprocess.Popen([sys.executable, str(SERVER), json.dumps(script)], stdout=file)
        while not self._log.read_text().endswith("\n"):
            assert self.process.poll() is None
            time.sleep(0.01)
        self.endpoint = f"http://127.0.0.1:{self._log.read_text().split()[0]}"

    @property
    def answers(self):
        return [json.loads(line) for line in self._log.read_text().splitlines()[1:]]

    def stop(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture
def played(tmp_path_factory):
    """Starts scripted servers; they end with the test."""
    running = []

    def start(**script):
        running.append(Played(tmp_path_factory.mktemp("server"), script))
        return running[-1]

    yield start
    for server in running:
        server.stop()


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    """Runs the entry point in an empty folder: (exit code, folder of the benchmark, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(server, *words, run_dir="run"):
        endpoint = [f"endpoint={server.endpoint}"] if server else []
        code = main([*endpoint, f"run_dir={run_dir}", *words])
        said = capsys.readouterr()
        return code, tmp_path / run_dir, said.out, said.err

    return run


def cell(folder, name):
    return json.loads((folder / "cells" / f"{name}.json").read_text())
