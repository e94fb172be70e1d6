"""Checks of `python -m gemma4_tpu.evaluate` before anything is loaded: one subject, its files, the problems. No JAX."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from gemma4_tpu.checkpoint_folder import RANDOM, checkpoint_architecture, tokenizer_problem
from gemma4_tpu.config.limits import limit_problems
from gemma4_tpu.config.paths import folder_of, local_place, name_problem
from gemma4_tpu.config.refusals import Refusal
from gemma4_tpu.config.tasks import EvalConfig, EvaluateRoot
from gemma4_tpu.evals.benchmarks import SOURCES
from gemma4_tpu.tracking.run import is_run
from gemma4_tpu.training.meshes import whole_rows_problems

CHOICES = {"eval.benchmark": tuple(SOURCES)}
SAMPLES_FILE = "samples.jsonl"


@dataclass(frozen=True)
class EvaluateChecked:
    """What the checks found out on the way."""

    form: str
    """`selfcheck`, `compare`, `resimulate`, `samples`, `endpoint`, `run` or `checkpoint`."""


def normalise_evaluate(root: EvaluateRoot) -> EvaluateRoot:
    """One spelling: `~` expanded, no slash at the end."""
    evaluation = replace(
        root.eval,
        checkpoint=root.eval.checkpoint.strip().lower(),
        problems_path=folder_of(root.eval.problems_path),
        samples=folder_of(root.eval.samples),
        endpoint=root.eval.endpoint.rstrip("/") if root.eval.endpoint else None,
    )
    model = replace(root.model, path=folder_of(root.model.path), tokenizer=folder_of(root.model.tokenizer))
    return replace(
        root, eval=evaluation, model=model, run=folder_of(root.run) or "", run_dir=folder_of(root.run_dir),
        compare=[folder_of(folder) or "" for folder in root.compare],
    )  # fmt: skip


def examine_evaluate(root: EvaluateRoot) -> tuple[EvaluateChecked | None, list[Refusal]]:
    """Everything that can be checked without a model or a simulator; None when there are problems."""
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
            messages += _endpoint(root.eval.endpoint)
        case "run":
            messages += _run(root)
        case "checkpoint":
            messages += _checkpoint(root)
    if form in ("samples", "endpoint", "run", "checkpoint"):
        messages += problems_path_messages(root.eval) + _names(root)
    if messages or form is None:
        return None, [Refusal(m) for m in messages]
    return EvaluateChecked(form), []


def _form(root: EvaluateRoot) -> tuple[str | None, list[str]]:
    """What the command line asks for, and what is wrong with that."""
    if root.selfcheck:
        return "selfcheck", []
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
            "run: what is to be evaluated? give run=<run folder>, model.path=<checkpoint folder>, eval.endpoint=<URL>"
            " or eval.samples=<FILE.jsonl>"
        ]
    if len(given) > 1:
        return None, [f"{' and '.join(keys[name] for name in given)} are given; an evaluation has one subject"]
    return given[0], []


def _compared(folders: list[str]) -> list[str]:
    if len(folders) != 2:
        return [f"compare=[{','.join(folders)}]: give two folders of evaluations, compare=[A,B]"]
    return [
        f"compare: {folder}: no evaluation (it has no result.json)"
        for folder in folders
        if not (Path(folder) / "result.json").is_file()
    ]


def _resimulated(run_dir: str | None) -> list[str]:
    if run_dir is None:
        return ["eval.resimulate=true: which evaluation? give run_dir=<its folder>"]
    if not (Path(run_dir) / "config.yaml").is_file() or not (Path(run_dir) / SAMPLES_FILE).is_file():
        return [f"run_dir={run_dir}: no evaluation with stored samples (config.yaml and {SAMPLES_FILE})"]
    return []


def _samples(path: str | None) -> list[str]:
    return [] if path is None or Path(path).is_file() else [f"eval.samples={path}: no such file"]


def _endpoint(url: str | None) -> list[str]:
    parts = urlsplit(url or "")
    if parts.scheme in ("http", "https") and parts.hostname:
        if parts.username or parts.password:
            return ["eval.endpoint: no user names or keys in the address; a key goes into OPENAI_API_KEY"]
        return []
    return [f"eval.endpoint={url}: give the base URL of the server, such as http://localhost:8000/v1"]


def _run(root: EvaluateRoot) -> list[str]:
    messages = []
    if "://" in root.run:
        messages.append(f"run={root.run}: a run folder is local; copy it here first")
    elif not is_run(Path(root.run)):
        there = "not the run folder of a training (config.yaml and checkpoints/)" if Path(root.run).is_dir() else (
            "no such folder"
        )  # fmt: skip
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
    """What is wrong with the place of the problems."""
    path = evaluation.problems_path
    if not path:
        return [
            f"eval.problems_path: eval.benchmark={evaluation.benchmark} needs a local clone of the benchmark; give"
            " eval.problems_path=<folder>"
        ]
    place, messages = local_place(f"eval.problems_path={path}", path)
    if not messages and (place is None or not place.exists()):
        messages = [f"eval.problems_path={path}: no such file or folder on this machine"]
    return messages


def _names(root: EvaluateRoot) -> list[str]:
    messages = name_problem(root.name)
    if root.run_dir is not None and "://" in root.run_dir:
        messages.append(f"run_dir={root.run_dir}: the record of an evaluation is local")
    return messages
