"""On narrow and wide terminals: a row of figures is one line, a value wraps within its column, a bar is one line."""

import re
from dataclasses import replace

import pytest

from gemma4_tpu.planning.estimate import PlanResult
from gemma4_tpu.planning.search import Found
from gemma4_tpu.reporting.plan_rows import plan_rows
from gemma4_tpu.reporting.plans import print_plan, print_search
from gemma4_tpu.tracking.logs import console
from gemma4_tpu.tracking.progress import Progress
from gemma4_tpu.tracking.records import read_record
from tests.house.scripts import ROOT


@pytest.fixture(params=[60, 200])
def columns(request, monkeypatch):
    """A terminal of so many columns, as the commands see it."""
    for name, value in {"COLUMNS": str(request.param), "FORCE_COLOR": "1", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    console.cache_clear()
    yield request.param
    console.cache_clear()


def plain(shown: str) -> list[str]:
    """Lines without colours and cursor movements, those of a bar one after the other."""
    return re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", shown).replace("\r", "\n").splitlines()


@pytest.fixture(scope="module")
def plan():
    return PlanResult(**read_record(ROOT / "experiments/v5p8/plan.json").values)


def test_a_plan_keeps_its_columns(columns, plan, tmp_path, capsys):
    print_plan(plan, tmp_path)
    lines = plain(capsys.readouterr().out)[1:]
    rows = lines[: next(number for number, line in enumerate(lines) if not line.strip())]
    assert max(map(len, rows)) <= columns
    labels = [label for label, _ in plan_rows(plan)]
    width = max(map(len, labels))
    begun = [row[:width].strip() for row in rows]
    assert [label for label in begun if label] == [label.strip() for label in labels]
    assert all(row[:width].isspace() for row, label in zip(rows, begun, strict=True) if not label)


def test_a_search_has_a_line_for_each_candidate(columns, plan, tmp_path, capsys):
    tried = [plan, replace(plan, remat="decoder", rows_per_update=16), replace(plan, fits=False)]
    print_search(Found(results=[{"plan": one} for one in tried], front=[plan], skipped=[]), tmp_path)
    _, head, *rows = plain(capsys.readouterr().out)
    cost = f"{plan.usd_per_million_real_tokens:.3f}"
    assert head.split()[0] == "mesh" and [row.split()[-1] for row in rows[:2]] == [cost, cost]
    assert "does not fit (" in rows[2] and rows[3].strip() == ""


def test_a_bar_is_one_line(columns, capsys):
    with Progress(320) as bar:
        bar.log({"loss": 0.1234, "heldout_loss": 0.2345, "real_tokens_per_second": 123456.0}, 160)
    lines = plain(capsys.readouterr().err)
    assert any("160/320" in line and "loss 0.1234" in line for line in lines)
    assert max(map(len, lines)) <= columns
