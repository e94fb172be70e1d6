"""lm-evaluation-harness on a server: what it is told, what is read back, two models compared; the real one, too."""

import json
import os
import shutil

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
    if find_command() is None:
        monkeypatch.setenv("PATH", f"{locked('lm_eval')}{os.pathsep}{os.environ['PATH']}")
    blind = dict.fromkeys(COLOURS, "green")
    for name, likes in (("tuned", COLOURS), ("base", blind)):
        with ScoringServer(likes) as server:
            words = [
                "eval=lm_eval", "eval.tasks=[toy_colours]", f"eval.lm_eval.include={tasks}",
                "model.tokenizer=embedded:tiny", f"eval.endpoint={server.url}", f"run_dir={tmp_path / name}",
            ]  # fmt: skip
            assert main(words) == 0, capsys.readouterr()
            assert len(server.bodies) == 4 * len(COLOURS)
            if name == "base":
                assert main(words) == 0
                assert len(server.bodies) == 4 * len(COLOURS)  # a second start finds all answers in the cache
    found = HarnessOutcome.read(tmp_path / "tuned").tasks["toy_colours"]
    assert (found.version, found.documents, found.metrics["acc,none"].value) == ("1.0", 6, 1.0)
    assert "<|turn>user" in next((tmp_path / "tuned/lm_eval").rglob("samples_*")).read_text()
    assert "| toy\\_colours | 1.0 |" in (tmp_path / "tuned/report.md").read_text()
    assert "toy_colours  acc,none ↑  1.0000 ± 0.0000" in capsys.readouterr().out
    assert main([f"compare=[{tmp_path / 'base'},{tmp_path / 'tuned'}]"]) == 0
    said = capsys.readouterr().out
    assert "toy_colours, acc,none: A 0.3333, B 1.0000: -0.6667" in said and "paired by document: worse" in said
    with ScoringServer(blind) as server:
        words = [*words[:-2], f"eval.endpoint={server.url}", f"run_dir={tmp_path / 'absent'}"]
        assert main([*words, "eval.tasks=[no_such_task]"]) == 2
    assert "no_such_task" in capsys.readouterr().err


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
