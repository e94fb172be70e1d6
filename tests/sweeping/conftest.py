"""Sweeps whose jobs are stand-ins: real processes, signals and run folders, in a fraction of a second each."""

import csv
import json
import sys
from pathlib import Path

import pytest

from gemma4_tpu.sweeping import sites
from gemma4_tpu.sweeping.state import Sweep
from gemma4_tpu.train import main

ROOT = Path(__file__).parents[2]
STAND_IN = [sys.executable, str(Path(__file__).parent / "job.py")]


class Sweeps:
    """Runs `python -m gemma4_tpu.train -m …` in this process, in an empty folder."""

    def __init__(self, folder: Path):
        self.folder = folder / "sweep"
        self.behave()

    def behave(self, **jobs: dict):
        """What each job is to do (`all` of them), see job.py; names with dots are given as a dictionary."""
        Path("behaviour.json").write_text(json.dumps(jobs))

    def __call__(self, *words: str, exit_code: int = 0) -> Sweep:
        with pytest.raises(SystemExit) as ended:
            main(["-m", "model.path=random:0", f"hydra.sweep.dir={self.folder}", *words])
        assert ended.value.code == exit_code
        return Sweep.open(self.folder)

    @property
    def starts(self) -> list[str]:
        """The jobs in the order of their starts."""
        path = Path("starts.txt")
        return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def table(self) -> list[dict[str, str]]:
        with (self.folder / "sweep.csv").open() as file:
            return list(csv.DictReader(file))


@pytest.fixture
def sweep(tmp_path, monkeypatch) -> Sweeps:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train"])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def stand_in(entry, words, run_dir):
        return [*STAND_IN, *words, f"run_dir='{run_dir}'"]

    monkeypatch.setattr(sites, "command", stand_in)
    return Sweeps(tmp_path)
