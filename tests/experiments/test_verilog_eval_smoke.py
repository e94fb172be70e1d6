"""The converter of verilog-eval problems: on a folder made here, and on the benchmark where a clone lies beside."""

import json
import runpy
from pathlib import Path

import pytest

from gemma4_tpu.errors import UserError

REPOSITORY = Path(__file__).parents[2]
BENCHMARK = REPOSITORY.parent / "shared/data/verilog-eval/dataset_spec-to-rtl"
SCRIPT = runpy.run_path(str(REPOSITORY / "experiments/verilog_eval_smoke/convert.py"), run_name="convert")
REFERENCE = "module RefModule (output y);\n  // not RefModules\n  assign y = 0;\nendmodule\n"
convert, is_heldout = SCRIPT["convert"], SCRIPT["is_heldout"]


def _problem(folder, name, code=REFERENCE):
    (folder / f"{name}_prompt.txt").write_text("\nMake TopModule.\n\n")
    (folder / f"{name}_ref.sv").write_text(code)
    (folder / f"{name}_test.sv").write_text("module tb(); endmodule\n")


def _rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_prompt_and_renamed_reference_become_a_chat_row(tmp_path):
    for number in range(20):
        _problem(tmp_path, f"Prob{number:03d}_x")
    counts = convert(tmp_path, tmp_path / "out")
    train, heldout = (_rows(tmp_path / "out" / f"{side}.jsonl") for side in ("train", "heldout"))
    assert counts == {"train": len(train), "heldout": len(heldout)}
    assert len(train) + len(heldout) == 20
    assert 0 < len(heldout) < len(train)
    assert all(is_heldout(row["id"]) for row in heldout)
    assert not any(is_heldout(row["id"]) for row in train)
    code = REFERENCE.replace("module RefModule", "module TopModule")
    assert train[0]["messages"] == [
        {"role": "user", "content": "Make TopModule."},
        {"role": "assistant", "content": f"```verilog\n{code.strip()}\n```"},
    ]


def test_the_split_depends_on_the_name_alone(tmp_path):
    _problem(tmp_path, "Prob001_a")
    _problem(tmp_path, "Prob002_b")
    convert(tmp_path, tmp_path / "two")
    _problem(tmp_path, "Prob000_c")
    convert(tmp_path, tmp_path / "three")
    two, three = ({row["id"] for row in _rows(tmp_path / out / "heldout.jsonl")} for out in ("two", "three"))
    assert two == three - {"Prob000_c"}


def test_refusals_name_the_file(tmp_path):
    with pytest.raises(UserError, match=r"no Prob.*_prompt\.txt; give the folder dataset_spec-to-rtl"):
        convert(tmp_path, tmp_path / "out")
    _problem(tmp_path, "Prob001_a", code="module Other (); endmodule")
    with pytest.raises(UserError, match=r"Prob001_a_ref\.sv: does not define RefModule"):
        convert(tmp_path, tmp_path / "out")
    (tmp_path / "Prob001_a_ref.sv").unlink()
    with pytest.raises(UserError, match=r"Prob001_a_ref\.sv: missing"):
        convert(tmp_path, tmp_path / "out")


@pytest.mark.skipif(not BENCHMARK.is_dir(), reason="../shared is absent: no verilog-eval")
def test_all_problems_of_the_benchmark_are_converted(tmp_path):
    counts = convert(BENCHMARK, tmp_path)
    assert counts == {"train": 128, "heldout": 28}
    for row in _rows(tmp_path / "train.jsonl") + _rows(tmp_path / "heldout.jsonl"):
        assert "RefModule" not in row["messages"][1]["content"]
        assert "TopModule" in row["messages"][1]["content"]
