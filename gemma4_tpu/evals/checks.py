"""Checks of `python -m gemma4_tpu.evaluate` before anything is loaded: subject, files, problems. Imports no JAX."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from gemma4_tpu.checkpoint_folder import RANDOM, checkpoint_architecture, tokenizer_problem
from gemma4_tpu.config.limits import limit_problems
from gemma4_tpu.config.paths import address_problems, folder_of, local_place, name_problem, no_folder
from gemma4_tpu.config.refusals import Refusal
from gemma4_tpu.config.schema import DataSource
from gemma4_tpu.config.tasks import EvalConfig, EvaluateRoot
from gemma4_tpu.data.checks import cache_messages, source_problem
from gemma4_tpu.data.forms import AUTO, CONVERSATIONS, FORMS
from gemma4_tpu.evals.accuracy.matching import ANSWERS, CHOOSE, LETTER, READINGS
from gemma4_tpu.evals.benchmarks import SOURCES
from gemma4_tpu.tracking.run import is_run
from gemma4_tpu.training.meshes import whole_rows_problems

ACCURACY, LM_EVAL = "accuracy", "lm_eval"
SIMULATED = tuple(SOURCES)
JUDGE_CHOICES = {"eval.benchmark": SIMULATED}
"""Choices of the keys of the judge, which simulates."""
CHOICES: dict[str, tuple[str, ...]] = {
    "eval.benchmark": (*SIMULATED, ACCURACY, LM_EVAL),
    "eval.answers.format": (AUTO, *(name for name, form in FORMS.items() if form.rows == CONVERSATIONS)),
    "eval.answers.compare": tuple(READINGS),
    "eval.answers.answer": ANSWERS,
    "eval.answers.choose": CHOOSE,
}
SAMPLES_FILE = "samples.jsonl"


@dataclass(frozen=True)
class EvaluateChecked:
    """What the checks found out along the way."""

    form: str
    """`selfcheck`, `compare`, `resimulate`, `harness`, `samples`, `endpoint`, `run` or `checkpoint`."""


def normalise_evaluate(root: EvaluateRoot) -> EvaluateRoot:
    """Canonical spelling of paths: `~` expanded, no slash at the end."""
    evaluation = replace(
        root.eval,
        checkpoint=root.eval.checkpoint.strip().lower(),
        problems_path=folder_of(root.eval.problems_path),
        image_cache=folder_of(root.eval.image_cache),
        samples=folder_of(root.eval.samples),
        lm_eval=replace(root.eval.lm_eval, include=folder_of(root.eval.lm_eval.include)),
        endpoint=root.eval.endpoint.rstrip("/") if root.eval.endpoint else None,
    )
    model = replace(root.model, path=folder_of(root.model.path), tokenizer=folder_of(root.model.tokenizer))
    return replace(
        root, eval=evaluation, model=model, run=folder_of(root.run) or "", run_dir=folder_of(root.run_dir),
        compare=[folder_of(folder) or "" for folder in root.compare],
    )  # fmt: skip


def examine_evaluate(root: EvaluateRoot) -> tuple[EvaluateChecked | None, list[Refusal]]:
    """Checks everything that needs neither a model nor a simulator; None if there are problems."""
    form, messages = _form(root)
    messages += limit_problems(root, CHOICES) + whole_rows_problems(root.mesh.cp, "an evaluation decodes answers")
    match form:
        case "compare":
            messages += _compared(root.compare)
        case "resimulate":
            messages += _resimulated(root.run_dir)
        case "samples":
            messages += _samples(root.eval.samples)
        case "endpoint":
            messages += _endpoint(root)
        case "run":
            messages += _run(root)
        case "checkpoint":
            messages += _checkpoint(root)
        case "harness":
            messages += _endpoint(root) + _harness(root) + _names(root)
    if form in ("samples", "endpoint", "run", "checkpoint"):
        messages += (_accuracy(root) if root.eval.benchmark == ACCURACY else []) + _names(root)
        messages += _image_cache(root.eval, form)
        messages += problems_path_messages(root.eval)
    if messages or form is None:
        return None, [Refusal(m) for m in messages]
    return EvaluateChecked(form), []


def _form(root: EvaluateRoot) -> tuple[str | None, list[str]]:
    """The form that the command line requests, and its problems."""
    if root.selfcheck:
        simulated = root.eval.benchmark in SIMULATED
        return "selfcheck", [] if simulated else [f"selfcheck=true: eval={root.eval.benchmark} simulates nothing"]
    if root.compare:
        return "compare", []
    if root.eval.resimulate:
        return "resimulate", []
    subjects = {
        "run": bool(root.run), "checkpoint": bool(root.model.path), "endpoint": bool(root.eval.endpoint),
        "samples": bool(root.eval.samples),
    }  # fmt: skip
    given = [name for name, is_given in subjects.items() if is_given]
    keys = {"run": "run", "checkpoint": "model.path", "endpoint": "eval.endpoint", "samples": "eval.samples"}
    if not given:
        return None, [
            "run is not set; set run=<run folder>, model.path=<checkpoint folder>, eval.endpoint=<URL> or"
            " eval.samples=<FILE.jsonl>"
        ]
    if len(given) > 1:
        return None, [f"{' and '.join(keys[name] for name in given)} are set; an evaluation has one subject: set one"]
    if root.eval.benchmark == LM_EVAL:
        asked = given[0] == "endpoint"
        return "harness", [] if asked else [
            f"{keys[given[0]]}: lm_eval needs a server; start one (python -m gemma4_tpu.serve) and give"
            " eval.endpoint=<its URL>"
        ]  # fmt: skip
    return given[0], []


def _compared(folders: list[str]) -> list[str]:
    if len(folders) != 2:
        return [f"compare=[{','.join(folders)}]: give two folders of evaluations, compare=[A,B]"]
    return [
        f"compare: {folder}: not an evaluation (no result.json)"
        for folder in folders
        if not (Path(folder) / "result.json").is_file()
    ]


def find_command() -> str | None:
    """The `lm_eval` of this environment, else the first on the PATH."""
    return shutil.which(LM_EVAL, path=str(Path(sys.executable).parent)) or shutil.which(LM_EVAL)


def _resimulated(run_dir: str | None) -> list[str]:
    if run_dir is None:
        return ["eval.resimulate=true: set run_dir=<the evaluation's folder>"]
    if not (Path(run_dir) / "config.yaml").is_file() or not (Path(run_dir) / SAMPLES_FILE).is_file():
        return [f"run_dir={run_dir}: not an evaluation with stored samples (config.yaml and {SAMPLES_FILE})"]
    return []


def _endpoint(root: EvaluateRoot) -> list[str]:
    url = root.eval.endpoint or ""
    if wrong := address_problems("eval.endpoint", url, "http://localhost:8000/v1"):
        return wrong
    if "@" in urlsplit(url).netloc:
        return ["eval.endpoint: no user names or keys in the address; a key goes into OPENAI_API_KEY"]
    return []


def _samples(path: str | None) -> list[str]:
    return [] if path is None or Path(path).is_file() else [f"eval.samples={path}: no such file"]


def _run(root: EvaluateRoot) -> list[str]:
    messages = []
    if "://" in root.run:
        messages.append(f"run={root.run}: the run folder must be local; copy it here first")
    elif not is_run(Path(root.run)):
        place = Path(root.run)
        there = (
            "not the folder of a training run (config.yaml and checkpoints/)" if place.is_dir() else no_folder(place)
        )
        messages.append(f"run={root.run}: {there}")
    if root.eval.checkpoint not in ("best", "latest") and not root.eval.checkpoint.isdecimal():
        messages.append(f"eval.checkpoint={root.eval.checkpoint}: give best, latest or the number of an update")
    return messages


def _checkpoint(root: EvaluateRoot) -> list[str]:
    _, messages = checkpoint_architecture(root.model)
    if not messages and not (root.model.path or "").startswith(RANDOM):
        messages += tokenizer_problem(root.model)
    return messages


def problems_path_messages(evaluation: EvalConfig) -> list[str]:
    """Problems with the location of the benchmark."""
    path = evaluation.problems_path
    if evaluation.benchmark == ACCURACY:
        found = source_problem("eval.problems_path", DataSource(path=path or ""))
        return [message.replace("eval.problems_path.path", "eval.problems_path") for message in found]
    if not path:
        return [
            f"eval.problems_path: eval.benchmark={evaluation.benchmark} needs a local clone of the benchmark; give"
            " eval.problems_path=<folder>"
        ]
    place, messages = local_place(f"eval.problems_path={path}", path)
    if not messages and (place is None or not place.exists()):
        messages = [f"eval.problems_path={path}: no such file or folder on this machine"]
    return messages


def _accuracy(root: EvaluateRoot) -> list[str]:
    """Problems with the comparison of answers."""
    evaluation, answers = root.eval, root.eval.answers
    messages = []
    if answers.choices is None:
        messages += [
            f"eval.answers.{key}={value}: only with eval.answers.choices=<column>"
            for key, value, default in (("answer", answers.answer, None), ("choose", answers.choose, LETTER))
            if value != default
        ]
    elif answers.choose != LETTER:
        if evaluation.n > 1:
            messages.append(f"eval.n={evaluation.n}: likelihoods do not vary between samples; give eval.n=1")
        if evaluation.endpoint and not root.model.tokenizer:
            messages.append(
                f"eval.answers.choose={answers.choose}: a server scores token ids; give model.tokenizer=<folder of the"
                " model's tokenizer>"
            )
    if evaluation.second_opinion:
        messages.append(f"eval.second_opinion=true: only for simulated designs, not with {ACCURACY}")
    return messages


def _image_cache(evaluation: EvalConfig, form: str) -> list[str]:
    """Problems with the folder for features of pictures."""
    if evaluation.image_cache is None:
        return []
    said = f"eval.image_cache={evaluation.image_cache}"
    if evaluation.benchmark != ACCURACY or form not in ("run", "checkpoint"):
        return [f"{said}: only with eval={ACCURACY} and a model in this process (run= or model.path=)"]
    return cache_messages(said, evaluation.image_cache)


def _harness(root: EvaluateRoot) -> list[str]:
    """Problems with lm_eval, as far as this machine shows."""
    messages, harness = [], root.eval.lm_eval
    if not harness.tasks:
        messages.append("eval.tasks=[]: give tasks of lm_eval, such as eval.tasks=[arc_challenge,mmlu]")
    if harness.include is not None and not Path(harness.include).is_dir():
        messages.append(f"eval.lm_eval.include={harness.include}: no such folder")
    if not root.model.tokenizer:
        messages.append("model.tokenizer is not set: lm_eval renders questions itself; give the tokenizer's folder")
    elif "://" in root.model.tokenizer:
        messages.append(f"model.tokenizer={root.model.tokenizer}: lm_eval reads local folders only; copy it here first")
    else:
        messages += tokenizer_problem(root.model)
    if find_command() is None:
        messages.append(
            "eval=lm_eval: no command lm_eval here; pip install 'gemma4-tpu[lm-eval]', or put that of another"
            " environment on the PATH"
        )
    return messages


def _names(root: EvaluateRoot) -> list[str]:
    messages = name_problem(root.name)
    if root.run_dir is not None and "://" in root.run_dir:
        messages.append(f"run_dir={root.run_dir}: the record of an evaluation is local; give a local folder")
    return messages
