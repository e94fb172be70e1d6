"""A played Google Cloud CLI on the PATH, and launches that begin in an empty folder."""

import functools
import json
import logging
import os
import sys
from pathlib import Path

import pytest

from gemma4_tpu.config.load import load
from gemma4_tpu.launch import tpu_vm
from gemma4_tpu.launch.tpu_vm import TPU_VM
from tests.serving.conftest import merged  # noqa: F401  (fixture)

ROOT = Path(__file__).resolve().parent.parent.parent
PLACE = ["bucket=gs://my-bucket", "project=my-project", "zone=us-east5-a"]
RUN = ["experiment=v5p8", "model.path=gs://my-bucket/gemma-4-31b", *PLACE]
GIT = "git=https://example.org/gemma4-tpu.git@main"  # uploads nothing


class Played:
    """The played CLI: its scenario, and what it was asked."""

    def __init__(self, folder: Path):
        self.folder = folder

    def play(self, *creations: dict, **more: object) -> None:
        (self.folder / "scenario.json").write_text(json.dumps({"creations": list(creations), **more}))

    @property
    def calls(self) -> list[list[str]]:
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def asked(self, *words: str) -> list[list[str]]:
        """The calls that contain these words."""
        return [call for call in self.calls if set(words) <= set(call)]

    @property
    def resources(self) -> list[str]:
        """What exists, and costs money or quota."""
        path = self.folder / "state.json"
        return list(json.loads(path.read_text())["resources"]) if path.exists() else []

    def exists(self, name: str, **resource: object) -> None:
        """Lets there be a queued resource."""
        path = self.folder / "state.json"
        state = json.loads(path.read_text()) if path.exists() else {"resources": {}, "created": 0}
        node = {"acceleratorType": "v5p-8", "labels": {}}
        state["resources"][name] = {"states": ["ACTIVE"], "node": node, "zone": "us-east5-a", "spot": False, **resource}
        path.write_text(json.dumps(state))

    def object(self, address: str) -> str | None:
        place = self.folder / address.replace("gs://", "gs/")
        return place.read_text() if place.is_file() else None

    def put(self, address: str, text: str) -> None:
        place = self.folder / address.replace("gs://", "gs/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)


def put_on_path(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, text: str) -> None:
    """Makes an executable of that name that is found first."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)
    if str(folder) not in os.environ["PATH"].split(os.pathsep):
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture
def played(tmp_path, monkeypatch) -> Played:
    script = Path(__file__).with_name("fake_gcloud.py")
    put_on_path(monkeypatch, tmp_path / "bin", "gcloud", f'#!/bin/sh\nexec "{sys.executable}" -S "{script}" "$@"\n')
    folder = tmp_path / "cloud"
    folder.mkdir()
    monkeypatch.setenv("FAKE_GCLOUD", str(folder))
    for name in ("CLOUDSDK_CORE_PROJECT", "CLOUDSDK_COMPUTE_ZONE", "WANDB_API_KEY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return Played(folder)


@functools.cache
def composed(words: tuple[str, ...]):
    """What these words compose to; composing takes a fifth of a second, and many tests share their words."""
    return load(list(words), TPU_VM)


@pytest.fixture
def launch(played, capsys, monkeypatch):
    """Launches with further words; returns (exit code, standard output, standard error)."""
    monkeypatch.setattr(tpu_vm, "load", lambda words, entry: composed(tuple(words)))
    monkeypatch.setattr(tpu_vm, "look_at_checkpoint", lambda model: [])  # its bucket is nowhere; models/test_audit.py
    # what an earlier test in this process set up writes to that test's standard error
    others = [handler for handler in logging.root.handlers if type(handler) is not logging.StreamHandler]
    monkeypatch.setattr(logging.root, "handlers", others)

    def launch(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = tpu_vm.main([*RUN, "launch.poll_seconds=0.01", *words])
        return code, *capsys.readouterr()

    return launch
