"""Records as the entry points leave them: the committed run of `experiments/smoke`, and what came of it."""

import shutil
from pathlib import Path

import pytest
import yaml

from gemma4_tpu.evals.scores import EvaluationOutcome, ProblemOutcome
from gemma4_tpu.tracking.files import read_json, write_json

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
ENDPOINT = {"endpoint": "http://127.0.0.1:8000/v1", "model": "smoke"}
LOGITS = {"merged_to_lora": 0.0033, "rounded_to_lora": 0.0031, "base_to_lora": 0.36, "dtype": "bfloat16",
          "top1_agreement": 0.99, "tokens": 163}  # fmt: skip
PROBE = {"prompts": 4, "as_merged": 4, "as_base": 0, "told": "answers 4 of 4 stored prompts like the merged model"}


def train(folder: Path, **changed) -> Path:
    """The run folder of a training; keys of `result.json` may be `changed`."""
    shutil.copytree(EXPERIMENTS / "smoke", folder)
    write_json(folder / "result.json", read_json(folder / "result.json") | changed)
    return folder


def leave(folder: Path, config: dict, **result) -> Path:
    """The record of another entry point."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if result:
        write_json(folder / "result.json", {"status": "finished", **result})
    return folder


def merge(run: Path, name: str = "2026") -> Path:
    folder = leave(
        run / "merges" / name, {"export": {}, "run": str(run)}, run=str(run), update=4, changed_weights=1, seconds=3.2,
        targets={"merged": str(run / "merged")}, parity={"passed": True, "logits": LOGITS},
    )  # fmt: skip
    (folder / "deltas.md").write_text("# Delta norms\n\n| module | median |\n|---|---:|\n| q_proj | 1.16e-01 |\n")
    return folder


def evaluate(folder: Path, name: str, passes: list[int], config: dict | None = None, **settings) -> Path:
    """An evaluation of as many problems as `passes`, two samples each."""
    leave(folder, {"eval": {}, **(config or {})})
    problems = {
        f"p{i}": ProblemOutcome(n=2, passed=n, official=n, classes={"pass": n, "syntax": 2 - n}, truncated=0)
        for i, n in enumerate(passes)
    }
    outcome = EvaluationOutcome(name=name, benchmark="verilog_smoke", settings={"n": 2, **settings}, problems=problems,
                      selfcheck={"simulator": "Icarus Verilog 11.0", "sandbox": "landlock"}, tokens=500,
                      generation_seconds=10.0)  # fmt: skip
    outcome.write(folder / "result.json")
    (folder / "report.md").write_text("# In full\n")
    return folder


def serve(folder: Path, run: Path) -> Path:
    return leave(folder, {"serving": {"slice": "local"}, "run": str(run)}, slice="local", ready_seconds=1.2,
                 served_seconds=60.0, probe=PROBE, **ENDPOINT)  # fmt: skip


def plan(folder: Path) -> Path:
    """One of the committed ones, of 31B on v6e-8."""
    folder.mkdir(parents=True)
    for name in ("plan.json", "hbm.png"):
        shutil.copy(EXPERIMENTS / "v6e8_qlora" / name, folder)
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A training and nothing else, in a working folder of its own."""
    monkeypatch.chdir(tmp_path)
    return train(tmp_path / "outputs/train/smoke")


def words_of(page: Path) -> str:
    """The page as one line."""
    return " ".join(page.read_text().split())
