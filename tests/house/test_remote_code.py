"""No code that travels with a checkpoint ever runs."""

import ast
import contextlib
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from gemma4_tpu.assets import ROOT
from gemma4_tpu.data.tokenizer import load_tokenizer
from gemma4_tpu.errors import UserError

REPOSITORY = Path(__file__).parents[2]
FOLDERS = ("gemma4_tpu", "hydra_plugins", "launch", "benchmarks", "experiments", "examples", "docs")
EXECUTES = {"eval", "exec", "compile", "__import__"}
UNPICKLES = {"pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
LOADS = ("from_pretrained", "load_dataset", "load_dataset_builder", "pipeline")
NO_CODE = ("PeftModel",)
"""Whose `from_pretrained` reads weights and JSON, and takes no `trust_remote_code`."""


def sources():
    """All Python that is here, scripts, notebooks and what documents show: (where, parsed)."""
    for path in [p for folder in FOLDERS for p in sorted((REPOSITORY / folder).rglob("*"))] + [
        REPOSITORY / "README.md"
    ]:
        where, text = str(path.relative_to(REPOSITORY)), ""
        if path.suffix == ".py":
            text = path.read_text(encoding="utf-8")
        elif path.suffix == ".ipynb":
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
            text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        elif path.suffix == ".md":
            blocks = re.findall(r"^```(?:python|py)\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)
            text = "\n".join(blocks)
        if text:
            yield where, ast.parse(text, where)


def said_in(call):
    return {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}


def is_harmless(value):
    """False, or a sentence about the key."""
    return isinstance(value, ast.Constant) and (value.value is False or " " in str(value.value))


def violations(where, tree):
    """What could run somebody else's code, one line each."""
    for node in ast.walk(tree):
        at = f"{where}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"{at}: {name}" for name in names if name.split(".")[0] in UNPICKLES)
        if isinstance(node, ast.Dict):  # keywords that are handed on, as by TRL's model_init_kwargs
            named = [(key.value, value) for key, value in zip(node.keys, node.values, strict=True)
                     if isinstance(key, ast.Constant)]  # fmt: skip
            yield from (f"{at}: {name}: {ast.unparse(value)}" for name, value in named
                        if name == "trust_remote_code" and not is_harmless(value))  # fmt: skip
        if not isinstance(node, ast.Call):
            continue
        called, said = ast.unparse(node.func), said_in(node)
        owner, _, method = called.rpartition(".")
        loads = (method or called) in LOADS and owner not in NO_CODE
        if loads and said.get("trust_remote_code") != "False":
            yield f"{at}: {called} without trust_remote_code=False"
        if said.get("use_safetensors", "True") != "True":
            yield f"{at}: {called} with use_safetensors={said['use_safetensors']}"
        for keyword in ("trust_remote_code", "allow_pickle", "shell"):
            if said.get(keyword, "False") != "False":
                yield f"{at}: {called} with {keyword}={said[keyword]}"
        if called == "torch.load" and said.get("weights_only") != "True":
            yield f"{at}: torch.load without weights_only=True"
        if called in ("yaml.load", "yaml.unsafe_load", "yaml.full_load") or called in EXECUTES:
            yield f"{at}: {called}"


def test_nothing_that_is_here_runs_unpickles_or_trusts_what_it_is_given():
    trees = list(sources())
    assert len(trees) > 300
    assert [line for where, tree in trees for line in violations(where, tree)] == []


def test_no_configuration_trusts_remote_code():
    files = [p for folder in ("conf", "launch") for p in (REPOSITORY / folder).rglob("*.y*ml")]
    said = [str(yaml.safe_load(path.read_text(encoding="utf-8"))) for path in files]  # without comments
    assert len(said) > 50 and not [text for text in said if re.search(r"(?i)trust[_-]remote[_-]code", text)]


@pytest.mark.parametrize(
    "line",
    ["AutoModel.from_pretrained(x)", "datasets.load_dataset('a', trust_remote_code=True)", "torch.load(f)", "eval(x)",
     "np.load(f, allow_pickle=True)", "yaml.load(f)", "import pickle",
     "AutoConfig.from_pretrained(p, trust_remote_code=t)", "load_dataset('a')", "pipeline('text-generation', model=x)",
     "SFTConfig(model_init_kwargs={'trust_remote_code': True})", "AutoModel.from_pretrained(x, **given)"],
)  # fmt: skip
def test_the_lint_finds(line):
    assert len(list(violations("here", ast.parse(line)))) >= 1


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
