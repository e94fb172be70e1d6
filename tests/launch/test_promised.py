"""tests/promised.sh: what README's demo and plan have to leave, one line for each thing that is missing."""

import subprocess

import pytest

from gemma4_tpu.planning.estimate import PlanResult
from gemma4_tpu.reporting.plans import print_plan
from gemma4_tpu.tracking.records import read_record
from tests.house.scripts import ROOT

FILES = (
    "result.json", "merged/model.safetensors", "servings/demo/result.json", "evaluations/run/result.json",
    "evaluations/served/result.json", "plots/loss.png", "plots/fill.png", "merges/demo/deltas.png",
)  # fmt: skip
PAGE = "| run |  | dollars |\n|---|---|---|\n| a | *measured* | local | 0.01 | $0.0009 | $0.05 |\n"


@pytest.fixture
def kept(tmp_path, capsys):
    """A run folder with all that is promised, and what a plan by the schedule prints."""
    for name in FILES:
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text("x")
    (tmp_path / "run/report.html").write_text('<img src="data:image/png;base64,x">')
    (tmp_path / "run/report.md").write_text(PAGE)
    print_plan(PlanResult(**read_record(ROOT / "experiments/v5p8/plan.json").values), tmp_path)
    (tmp_path / "plan.txt").write_text(capsys.readouterr().out)
    return tmp_path


@pytest.mark.parametrize(
    ("file", "holds", "told"),
    [
        (None, "", None),
        ("run/plots/loss.png", "", "loss.png is missing or empty"),
        ("run/merges/demo/deltas.png", "", "deltas.png is empty"),
        (
            "run/report.md",
            "No price is known for local, so no cost is shown",
            "does not say what the training run cost",
        ),
        ("plan.txt", "Run  3 updates: 2 min to 3 min\nOn demand  $1 to $2\n", "by the compiler's schedule"),
    ],
)
def test_what_is_missing_is_said(file, holds, told, kept):
    if file:
        (kept / file).write_text(holds)
    done = subprocess.run(
        [ROOT / "tests/promised.sh", kept / "run", kept / "plan.txt"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, told is None or told in done.stdout) == (1 if told else 0, True), done.stdout
