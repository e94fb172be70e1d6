"""lm-evaluation-harness on a server: what it is told, what is read back, two models compared; the real one, too."""

import json
import os
import shutil
import sys

import pytest
import yaml

from gemma4_tpu.assets import ROOT
from gemma4_tpu.data.tokenizer import load_tokenizer
from gemma4_tpu.errors import UserError
from gemma4_tpu.evals.checks import find_command
from gemma4_tpu.evals.harness import HarnessMetric, HarnessOutcome, HarnessTask, compare_harness, write_documents
from gemma4_tpu.evals.scores import EvaluationOutcome, ProblemOutcome
from gemma4_tpu.evaluate import main
from tests.evals.server import Server
from tests.fetched import locked
from tests.training.test_security import PLANTED, SECRETS, leaks

COLOURS = {"sky": "blue", "grass": "green", "snow": "white", "coal": "black", "milk": "white", "leaf": "green"}
TASK = {
    "task": "toy_colours", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
    "doc_to_text": "Which colour is {{thing}}?", "doc_to_choice": ["black", "blue", "green", "white"],
    "doc_to_target": "{{['black', 'blue', 'green', 'white'].index(colour)}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}], "metadata": {"version": 1.0},
}  # fmt: skip


@pytest.fixture
def tasks(tmp_path):
    """A folder with the toy task and its rows."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"thing": a, "colour": b}) + "\n" for a, b in COLOURS.items()))
    told = {**TASK, "dataset_kwargs": {"data_files": {"test": str(rows)}}}
    (folder / "toy_colours.yaml").write_text(yaml.safe_dump(told))
    return folder


class ScoringServer(Server):
    """Scores the choice that `likes` names higher than all others."""

    def __init__(self, likes):
        self._tokenizer = load_tokenizer("embedded:tiny")

        def answer(body, _):
            (prompt,) = body["prompt"]
            return 200, {"choices": [{"index": 0, "text": "", "logprobs": self._logprobs(prompt, likes)}]}

        super().__init__(answer)

    def _logprobs(self, prompt, likes):
        text = self._tokenizer.decode(prompt)
        thing = text.split("Which colour is ")[1].split("?")[0]
        liked = -0.1 if text.rstrip().endswith(likes[thing]) else -5.0
        return {"token_logprobs": [None, *[liked] * len(prompt)], "top_logprobs": [{"a": -0.1}] * (len(prompt) + 1)}


@pytest.mark.slow
def test_the_real_one_scores_two_models_and_they_are_compared(tasks, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MY_SERVICE_PASSWORD", SECRETS["MY_SERVICE_PASSWORD"])
    if find_command() is None:
        monkeypatch.setenv("PATH", f"{locked('lm_eval')}{os.pathsep}{os.environ['PATH']}")
    blind = dict.fromkeys(COLOURS, "green")
    for name, likes in (("tuned", COLOURS), ("base", blind)):
        with ScoringServer(likes) as server:
            words = [
                "eval=lm_eval", "eval.tasks=[toy_colours]", f"eval.lm_eval.include={tasks}",
                "model.tokenizer=embedded:tiny", f"eval.endpoint={server.url}",
                f"eval.system={SECRETS['MY_SERVICE_PASSWORD']}", f"run_dir={tmp_path / name}",
            ]  # fmt: skip
            assert main(words) == 0, capsys.readouterr()
            assert len(server.bodies) == 4 * len(COLOURS)
            if name == "base":
                assert main(words) == 0
                assert len(server.bodies) == 4 * len(COLOURS)  # a second start finds all answers in the cache
    found = HarnessOutcome.read(tmp_path / "tuned").tasks["toy_colours"]
    assert (found.version, found.documents, found.metrics["acc,none"].value) == ("1.0", 6, 1.0)
    assert leaks(tmp_path) == []
    assert "<|turn>user" in next((tmp_path / "tuned/lm_eval").rglob("samples_*")).read_text()
    assert "| toy\\_colours | 1.0 |" in (tmp_path / "tuned/report.md").read_text()
    assert "toy_colours  acc,none ↑  1.0000 ± 0.0000" in capsys.readouterr().out
    assert main([f"compare=[{tmp_path / 'base'},{tmp_path / 'tuned'}]"]) == 0
    said = capsys.readouterr().out
    assert "toy_colours, acc,none: A 0.3333, B 1.0000: -0.6667" in said and "paired by document: worse" in said
    with ScoringServer(blind) as server:
        words = [*words[:-3], f"eval.endpoint={server.url}", f"run_dir={tmp_path / 'absent'}"]
        assert main([*words, "eval.tasks=[no_such_task]"]) == 2
    assert "no_such_task" in capsys.readouterr().err


PLAYED = """
import json, os, pathlib, sys, time, yaml
told = yaml.safe_load(open(sys.argv[sys.argv.index("--config") + 1]))
print(told, "and", os.environ["HF_TOKEN"], flush=True)
if {hangs}:
    time.sleep(600)
if {fills}:
    kept = []
    while True:
        kept.append(b"x" * 2**24)
        time.sleep(0.02)
place = pathlib.Path(told["output_path"], "m")
place.mkdir(parents=True)
found = {{"results": {{"toy": {{"acc,none": 1.0}}}}, "config": told, "lm_eval_version": "0.4.13"}}
(place / "results_1.json").write_text(json.dumps(found))
row = {{"doc_id": 0, "filter": "none", "metrics": ["acc"], "acc": 1.0, "arguments": told["system_instruction"]}}
(place / "samples_toy_1.jsonl").write_text(json.dumps(row) + "\\n")
"""


@pytest.fixture
def played(tmp_path, monkeypatch):
    """Runs `evaluate` with a played lm_eval: it prints its configuration, and repeats it in its results."""
    program = tmp_path / "lm_eval"
    for where in ("checks", "harness_job"):
        monkeypatch.setattr(f"gemma4_tpu.evals.{where}.find_command", lambda: str(program))

    def run(endpoint, *words, hangs=False, fills=False):
        program.write_text(f"#!{sys.executable}\n{PLAYED.format(hangs=hangs, fills=fills)}")
        program.chmod(0o755)
        common = ["eval=lm_eval", "eval.tasks=[toy]", "model.tokenizer=embedded:tiny", f"run_dir={tmp_path / 'run'}"]
        return main([*common, f"eval.endpoint={endpoint}", *words])

    return run


def test_secrets_that_lm_eval_is_given_are_in_no_file_of_ours(played, tmp_path, capsys, monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    said = [SECRETS["WANDB_API_KEY"], f"Authorization: Bearer {PLANTED[-1]}"]
    with ScoringServer(COLOURS) as server:
        endpoint = f"{server.url.removesuffix('/v1')}/{SECRETS['MY_SERVICE_PASSWORD']}/v1"
        assert played(endpoint, f"eval.system='{' '.join(said)}'") == 0, capsys.readouterr()
    printed = capsys.readouterr()
    (tmp_path / "lm_eval").unlink()
    assert leaks(tmp_path, printed.out, printed.err) == []
    place = tmp_path / "run/lm_eval/m"
    assert json.loads((place / "samples_toy_1.jsonl").read_text())["arguments"] == "*** Authorization: Bearer ***"
    assert json.loads((place / "results_1.json").read_text())["config"]["model_args"]["base_url"].endswith(
        "/***/v1/completions"
    )
    assert "system_instruction" in (tmp_path / "run/lm_eval.log").read_text()
    assert HarnessOutcome.read(tmp_path / "run").tasks["toy"].metrics["acc,none"].value == 1.0


def test_one_that_hangs_or_fills_memory_is_ended(played, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRETS["HF_TOKEN"])
    monkeypatch.setattr("gemma4_tpu.evals.harness_job.SILENT_SECONDS", 1.5)
    words = ["eval.request_timeout_seconds=0.1", "eval.retries=4"]
    with ScoringServer(COLOURS) as server:
        assert played(server.url, *words, hangs=True) == 2
        told = capsys.readouterr().err
        assert "lm_eval has printed nothing for 2 s and was ended" in told and "embedded:tiny is to blame" in told
        free = type("Memory", (), {"available": 2**29})
        monkeypatch.setattr("gemma4_tpu.evals.harness_job.psutil.virtual_memory", lambda: free)
        monkeypatch.setattr("gemma4_tpu.evals.harness_job.SILENT_SECONDS", 300)
        assert played(server.url, fills=True) == 2
        assert (
            "lm_eval took more than 0.2 GiB, half of the memory that was free, and was ended" in capsys.readouterr().err
        )
    assert SECRETS["HF_TOKEN"] not in (tmp_path / "run/lm_eval.log").read_text()


def outcome(values, stderr=None, **settings):
    metric = HarnessMetric(value=sum(values) / len(values), stderr=stderr, higher_is_better=True)
    task = HarnessTask(version="1", documents=len(values), shots=0, metrics={"acc,none": metric})
    return HarnessOutcome(model="m", lm_eval="0.4", settings={"limit": None, **settings}, tasks={"t": task})


def leave(folder, values, *, documents=True, **more):
    folder.mkdir()
    outcome(values, **more).write(folder)
    if documents:
        write_documents(folder, {("t", "acc,none"): {f"{i} x": value for i, value in enumerate(values)}})
    return folder


def test_documents_are_paired_where_both_have_them_else_errors_are_added(tmp_path):
    a, b = leave(tmp_path / "a", [1.0] * 30 + [0.0] * 10), leave(tmp_path / "b", [1.0] * 20 + [0.0] * 20)
    (paired,) = compare_harness(a, b).differences
    assert (paired.value, paired.by, paired.verdict) == (0.25, "paired by document", "better")
    assert compare_harness(b, a).differences[0].verdict == "worse"
    (same,) = compare_harness(a, a).differences
    assert same.verdict == "no more than chance"
    c = leave(tmp_path / "c", [1.0] * 5 + [0.0] * 5, documents=False, stderr=0.16, limit=10)
    d = leave(tmp_path / "d", [1.0] * 6 + [0.0] * 4, documents=False, stderr=0.16)
    (added,) = compare_harness(c, d).differences
    assert added.by == "by standard errors" and added.high == pytest.approx(-0.1 + 1.96 * 0.16 * 2**0.5)
    assert list(compare_harness(c, d).claims("c", "d"))[-1] == "Not a like-for-like comparison (limit: 10 and None)."
    assert list(compare_harness(b, a).claims("b", "a"))[1].startswith("b is worse than a on 1 of 1 scores")


def test_two_kinds_of_evaluation_are_not_compared(tmp_path):
    (tmp_path / "x").mkdir()
    problem = ProblemOutcome(n=1, passed=1, official=None, classes={"pass": 1}, truncated=0)
    outcome = EvaluationOutcome(name="run", benchmark="verilog_smoke", settings={}, problems={"p": problem})
    outcome.write(tmp_path / "x/result.json")
    with pytest.raises(UserError, match="not the result of a finished eval=lm_eval"):
        compare_harness(leave(tmp_path / "a", [1.0]), tmp_path / "x")


def test_what_lm_eval_needs_is_asked_for_before_it_starts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    assert main(["eval=lm_eval", "eval.endpoint=http://127.0.0.1:9/v1", "eval.lm_eval.include=absent"]) == 2
    said = capsys.readouterr().err
    for told in ("eval.tasks=[]", "eval.lm_eval.include=absent", "model.tokenizer", "gemma4-tpu[lm-eval]"):
        assert told in said
    assert main(["eval=lm_eval", "eval.tasks=[arc]", "model.path=embedded:tiny"]) == 2
    assert "lm_eval needs a server" in capsys.readouterr().err


def test_the_folder_of_the_tiny_tokenizer_is_where_lm_eval_looks():
    from gemma4_tpu.config.tasks import EvalConfig
    from gemma4_tpu.evals.harness_job import arguments

    told = arguments(EvalConfig(endpoint="http://h/v1"), "embedded:tiny", ROOT, {"id": "m", "max_model_len": 4096})
    assert told["model_args"]["tokenizer"] == str(ROOT / "tiny")
    assert told["model_args"]["max_length"] == 4096 and told["model_args"]["base_url"] == "http://h/v1/completions"


def test_lm_eval_is_told_what_was_set():
    from gemma4_tpu.config.tasks import EvalConfig, HarnessConfig
    from gemma4_tpu.evals.harness_job import arguments

    harness = HarnessConfig(tasks=["arc"], shots=3, chat_template=False, include="mine")
    config = EvalConfig(endpoint="http://h/v1", max_problems=7, lm_eval=harness)
    told = arguments(config, "embedded:tiny", ROOT, {"id": "m"})
    assert (told["limit"], told["num_fewshot"], told["apply_chat_template"]) == (7, 3, False)
    assert (told["tasks"], told["include_path"]) == (["arc"], "mine")
