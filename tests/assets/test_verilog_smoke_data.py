"""The committed `verilog_smoke` rows: well formed, apart from each other, and what the generator makes."""

import gzip
import json
import shutil

import pytest

from experiments.verilog_smoke.design import MadeProblem
from experiments.verilog_smoke.families import FAMILIES
from experiments.verilog_smoke.make_data import make_problems
from experiments.verilog_smoke.prompts import answer, chat_row
from experiments.verilog_smoke.simulate import all_pass
from gemma4_tpu.assets import ROOT

FOLDER = ROOT / "verilog_smoke"


def _rows(name):
    with gzip.open(FOLDER / name, "rt") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def train():
    return _rows("train.jsonl.gz")


@pytest.fixture(scope="module")
def heldout():
    return _rows("heldout.jsonl.gz")


@pytest.fixture(scope="module")
def problems():
    return [MadeProblem.from_row(row) for row in _rows("heldout_problems.jsonl.gz")]


def _prompts(rows):
    return {row["messages"][0]["content"] for row in rows}


def _answers(rows):
    return {row["messages"][1]["content"] for row in rows}


def test_every_row_is_one_question_and_one_answer(train, heldout):
    assert len(train) >= 2000
    assert len(heldout) == 200
    for row in train + heldout:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert row["messages"][1]["content"].startswith("```verilog\nmodule TopModule (")


def test_training_and_heldout_share_no_prompt_and_no_module(train, heldout):
    assert not _prompts(train) & _prompts(heldout)
    assert not _answers(train) & _answers(heldout)
    assert len(_answers(train)) == len(train)
    assert len(_answers(heldout)) == len(heldout)


def test_problems_are_the_heldout_rows_with_their_benches(heldout, problems):
    assert [p.id for p in problems] == [row["id"] for row in heldout]
    for row, problem in zip(heldout, problems, strict=True):
        assert row["messages"][0]["content"] == problem.prompt
        assert row["messages"][1]["content"] == f"```verilog\n{problem.reference}```"
    assert {p.family for p in problems} == set(FAMILIES)


def test_the_generator_still_makes_the_committed_rows(train, problems):
    made = make_problems(0, 110, heldout=False)
    assert [chat_row(p.id, p.prompt, answer(d)) for d, p in made] == train[:110]
    assert [p for _, p in make_problems(0, 110, heldout=True)] == problems[:110]


@pytest.mark.skipif(shutil.which("iverilog") is None, reason="Icarus Verilog is not installed")
def test_heldout_references_pass_the_committed_benches(problems):
    assert all(all_pass((p.reference, p.reference, p.testbench) for p in problems[: 2 * len(FAMILIES)]))


def test_the_data_stay_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 1_000_000
