"""No code that travels with a checkpoint ever runs."""

import ast
import contextlib
import json
import shutil
from pathlib import Path

import pytest

from gemma4_tpu.assets import ROOT
from gemma4_tpu.data.tokenizer import load_tokenizer
from gemma4_tpu.errors import UserError

REPOSITORY = Path(__file__).parents[2]


def loads():
    """Every call of an `Auto…` class that reads a folder: (file, call)."""
    for folder in ("gemma4_tpu", "launch", "benchmarks", "experiments"):
        for file in sorted((REPOSITORY / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".from_pretrained"):
                    yield file, node


def test_every_load_forbids_it():
    found = [(file, call) for file, call in loads() if "Auto" in ast.unparse(call.func)]
    assert len(found) >= 5
    for file, call in found:
        said = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert said.get("trust_remote_code") == "False", f"{file.name}:{call.lineno}"


def test_a_tokenizer_that_names_code_of_its_own_runs_none(tmp_path, monkeypatch):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        shutil.copy(ROOT / "tiny" / name, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ran = tmp_path / "ran"
    (tmp_path / "mine.py").write_text(f"open({str(ran)!r}, 'w')\nclass Mine: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # somebody who says yes to every question
    with contextlib.suppress(UserError):  # refusing it is as good
        load_tokenizer(str(tmp_path))
    assert not ran.exists()


@pytest.mark.parametrize("call", [pytest.param(call, id=f"{file.name}:{call.lineno}") for file, call in loads()])
def test_nothing_is_unpickled(call):
    said = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    assert said.get("use_safetensors", "True") == "True"
