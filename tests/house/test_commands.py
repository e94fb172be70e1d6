"""Every command that README, docs/, experiments/, benchmarks/ and `--help` show: its words compose and pass the checks.

Those of docs/first_tpu_run.md run in order in a cloud that is played (tests/launch/test_first_tpu_run.py), and the
committed experiments are trained by other tests; here nothing runs that takes more than a moment.
"""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from gemma4_tpu import assets
from gemma4_tpu.architectures import ARCHITECTURES, to_hf_config
from gemma4_tpu.commands import ENTRIES
from gemma4_tpu.config.conf import config_dir, register
from gemma4_tpu.config.entry import EntryPoint
from gemma4_tpu.config.load import compose_all, load
from gemma4_tpu.launch import tpu_vm
from gemma4_tpu.launch.gke import GKE
from gemma4_tpu.launch.tpu_vm import TPU_VM
from gemma4_tpu.report import spelt_out
from gemma4_tpu.tracking.result import Result
from tests.house.commands import shown_commands
from tests.house.scripts import ROOT
from tests.ports import free_port
from tests.tpu_compiler import skip_without_tpu_compiler

COMMANDS = shown_commands()
LEFT_TO_THE_READER = {
    "tpu_vm": ["model.path=gs://bucket/model", "bucket=gs://bucket"],
    "evaluate": ["run=outputs/train/run"],
}
"""What a final `…` stands for, where something is needed."""


@pytest.fixture(scope="module", autouse=True)
def reader(tmp_path_factory):
    """Works where everything is that the commands name: runs, a sweep, a merged 31B, rows, a clone, records."""
    here = tmp_path_factory.mktemp("reader")
    smoke = ROOT / "experiments/smoke"
    for run in ("outputs/train/run", "multirun/smoke/sweep/lora.rank-8"):
        (here / run / "checkpoints").mkdir(parents=True)
        shutil.copy(smoke / "config.yaml", here / run)
    on_a_slice = here / "outputs/train/on_a_slice"
    on_a_slice.mkdir()
    (on_a_slice / "config.yaml").write_text("hardware: {name: v5p-8}")
    Result(status="finished", measured_over_predicted_low=1.1, measured_over_predicted_high=1.3).write(
        on_a_slice / "result.json"
    )
    merged = here / "outputs/train/run/merged"
    merged.mkdir()
    (merged / "config.json").write_text(json.dumps(to_hf_config(ARCHITECTURES["gemma4_31b"])))
    (merged / "model.safetensors").touch()
    for file in ("tokenizer.json", "chat_template.jinja"):
        shutil.copy(f"{assets.resolve('embedded:tiny')}/{file}", merged)
    base = shutil.copytree(merged, here / "base")
    shutil.copytree(merged, merged.with_name("fp8"))
    (here / "drafter").mkdir()
    drafter = {"model_type": "gemma4_assistant", "backbone_hidden_size": ARCHITECTURES["gemma4_31b"].embed_dim}
    (here / "drafter/config.json").write_text(json.dumps(drafter))
    for run in ("run", "other"):
        adapter = here / "outputs/train" / run / "adapter"
        adapter.mkdir(parents=True)
        (adapter.parent / "checkpoints").mkdir(exist_ok=True)
        (adapter.parent / "config.yaml").touch()
        config = {"peft_type": "LORA", "r": 8, "base_model_name_or_path": str(base)}
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        (adapter / "adapter_model.safetensors").touch()
    for folder in ("evaluation", "benchmark", "outputs/benchmarks/run", "outputs/plan/plan", "outputs/servings/server",
                   "outputs/lm_eval/base", "outputs/lm_eval/tuned"):  # fmt: skip
        (here / folder).mkdir(parents=True)
        (here / folder / "result.json").write_text("{}")
        (here / folder / "config.yaml").write_text("serving: {slice: v6e-8, host: 127.0.0.1, port: 8000}")
    for file in ("evaluation/samples.jsonl", "samples.jsonl", "rows.jsonl", "rows.csv",
                 "test.jsonl", "test.csv", "test.parquet",
                 "gsm8k.jsonl"):  # fmt: skip
        (here / file).touch()
    (here / "bin").mkdir()
    (here / "bin/lm_eval").touch(mode=0o755)
    converted = here / "outputs/verilog_eval_smoke"
    converted.mkdir()
    for file in ("train.jsonl", "heldout.jsonl"):
        (converted / file).touch()
    (here / "clone/dataset_spec-to-rtl").mkdir(parents=True)
    (here / "experiments").symlink_to(ROOT / "experiments")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setenv("HF_TOKEN", "none")
        patch.setenv("PATH", f"{os.environ['PATH']}:{here / 'bin'}")
        patch.setenv("CLOUDSDK_CORE_PROJECT", "my-project")
        patch.setenv("CLOUDSDK_COMPUTE_ZONE", "us-east5-a")
        yield here


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.page}: {command.text[:90]}")
def test_a_command_that_is_shown_is_sound(command):
    unknown = [word for word in command.words if re.search(r"<[^<>]*>", word)]
    assert not unknown, f"{unknown}: say in commands.PLACEHOLDERS what that stands for"
    words = command.words
    if command.inline and "gemma4_tpu.serve" in words[:3] and len(words) > 3 and "run=" not in command.text:
        words.append("run=outputs/train/run")
    check(words, goes_on=command.goes_on)


def check(words: list[str], *, goes_on: bool = False) -> None:
    """Fails if a command names something that is not there, or would be refused."""
    match words:
        case ["python", "-m"] | ["gemma4-tpu"] | ["gemma4-tpu", "completion", "--install"]:
            pass  # no command alone; test_terminal.py; test_completion.py
        case ["python", "-m", "venv", *_]:
            pass
        case ["python", "-m", "experiments.gpu_baseline_h100x2.train", *_]:
            pass  # needs TRL, in an environment of its own
        case ["accelerate", "launch", "--config_file", file, "-m", module, *_]:
            assert (ROOT / file).is_file()
            assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
        case ["pip", "install", "-r", file]:
            assert (ROOT / file).is_file()
        case ["python", "-m", module, *arguments]:
            check_module(module, arguments, goes_on)
        case ["python", path, *arguments]:
            check_script(path, arguments)
        case ["gemma4-tpu", "launch", name, *arguments]:
            check_module(f"launch.{name}", arguments, goes_on)
        case ["gemma4-tpu", name, *arguments]:
            check_module(f"gemma4_tpu.{name}", arguments, goes_on)
        case ["make", *_]:
            alone = {key: value for key, value in os.environ.items() if key != "ARGS" and "MAKE" not in key}
            dry = subprocess.run([*words, "-n"], cwd=ROOT, env=alone, capture_output=True, text=True, check=False)
            assert dry.returncode == 0, dry.stderr
            for line in re.findall(r"^\S*python -m gemma4_tpu\..*", dry.stdout, re.M):
                check(["python", *shlex.split(line)[1:]])
        case ["pip", "install", *what]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            for package in what:
                assert set(re.findall(r"gemma4-tpu\[(.*)\]", package)) <= set(extras)
        case ["git", *_] | ["source", _] | ["pre-commit", *_] | ["tensorboard", "--logdir", _]:
            pass
        case [path]:
            assert os.access(ROOT / path, os.X_OK)
        case _:
            raise AssertionError(f"a program that this test doesn't know: {shlex.join(words)}")


def check_module(module: str, arguments: list[str], goes_on: bool) -> None:
    package, _, name = module.partition(".")
    entry = {"tpu_vm": TPU_VM, "gke": GKE}.get(name) if package == "launch" else ENTRIES.get(name)
    if entry is None:
        script = ROOT / module.replace(".", "/")
        check_script(str(script / "__main__.py" if script.is_dir() else script.with_suffix(".py")), arguments)
    elif arguments and arguments[0] in ("--help", "--version"):
        with pytest.raises(SystemExit) as ended:
            load(arguments, entry)
        assert ended.value.code == 0
    elif entry is TPU_VM and arguments and arguments[0] in tpu_vm.VERBS:
        assert len(arguments) == (1 if arguments[0] == "list" else 2)
    elif arguments or name in ("train", "plan"):  # the name of another command alone is no command
        check_entry(entry, [*arguments, *LEFT_TO_THE_READER.get(name, []) * goes_on])


def check_entry(entry: EntryPoint, words: list[str]) -> None:
    if entry.name == "plan":
        skip_without_tpu_compiler()
    words = spelt_out(words) if entry.name == "report" else words
    if "-m" not in words:
        if entry.name == "serve" and not any(word.startswith("serving.port=") for word in words):
            words = [*words, f"serving.port={free_port()}"]
        load(words, entry)
        return
    swept = [word for word in words if word != "-m"]
    assert compose_all(swept, entry, multirun=True)[2] == []
    first = [first_job(word) for word in swept]
    register(entry)
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        compose(entry.name, overrides=first, return_hydra_config=True)  # hydra.sweeper.… too
    load([word for word in first if not word.startswith("hydra")], entry)


def first_job(word: str) -> str:
    """A swept word with its first value."""
    override = OverridesParser.create().parse_override(word)
    if not override.is_sweep_override():
        return word
    if override.is_discrete_sweep():
        return f"{override.key_or_group}={next(iter(override.sweep_string_iterator()))}"
    return f"{override.key_or_group}={override.value().start}"


def check_script(path: str, arguments: list[str]) -> None:
    """A script that takes minutes or other machines: it is there, and knows its flags and subcommands."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    known = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert {word for word in arguments if word.startswith("--")} <= known
    subcommands = {
        node.args[0].value for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_parser"
    }  # fmt: skip
    assert not subcommands or arguments[0] in subcommands
