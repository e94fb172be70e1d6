"""What follows a training on its slice: `merge …` and `evaluate …`, checked by their own configuration code."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from gemma4_tpu.config.load import load
from gemma4_tpu.errors import UserError
from gemma4_tpu.evaluate import EVALUATE
from gemma4_tpu.merge import MERGE

PROBLEMS = "problems"
"""Folder in which the slice finds what `eval.problems_path=gs://…` names."""
_KEY = "eval.problems_path="
_STAND_IN = f"{_KEY}embedded:verilog_smoke/heldout_problems.jsonl.gz"


@dataclass(frozen=True)
class FollowUp:
    """One entry point that runs on the first host after the training."""

    name: str
    words: list[str]
    """Its command line."""
    problems: str | None = None
    """gs:// folder to copy to `PROBLEMS` first."""


def after_problems(after: list[str], model: str, *, hosts: int) -> list[str]:
    """What is wrong with `launch.after`; each stage is checked by its entry point's own configuration code."""
    messages: list[str] = []
    for index, text in enumerate(after):
        try:
            stage = stages(after[: index + 1], "gs://bucket/run", model)[-1]
            if stage.name == "evaluate" and hosts > 1:
                raise UserError(f"runs on one host, and this slice has {hosts}; merge only, and evaluate elsewhere")
            words = [_STAND_IN if stage.problems and word.startswith(_KEY) else word for word in stage.words]
            if local := [word for word in words if word.startswith(_KEY) and ":" not in word]:
                raise UserError(
                    f"{local[0]}: is on this machine, not on the slice; copy it to a bucket and give gs://…"
                )
            if stage.name == "merge":
                load(words, MERGE)
            else:
                load(words, EVALUATE)
        except (UserError, ValueError) as refusal:  # ValueError: an unbalanced quote
            messages.append(f"launch.after: '{text}': {refusal}")
    return messages


def stages(after: list[str], run_dir: str, model: str, *, base: str | None = None) -> list[FollowUp]:
    """The stages of `launch.after` for a run.

    Args:
      after: `launch.after`.
      run_dir: gs:// run folder of the training.
      model: `model.name`.
      base: where the base checkpoint is on the slice, if not where the run's configuration says.

    Raises:
      UserError: neither merge nor evaluate, or an evaluate without a merged model before it.
      ValueError: an unbalanced quote.
    """
    found: list[FollowUp] = []
    merged: str | None = None
    for text in after:
        name, *words = shlex.split(text) or [""]
        if name == "merge":
            form = next((w.partition("=")[2] for w in words if w.startswith(("export=", "export.format="))), "merged")
            target = next((w.partition("=")[2] for w in words if w.startswith(("target=", "export.target="))), None)
            if target is None:
                target = run_dir if form == "both" else f"{run_dir}/{'adapter' if form == 'peft' else 'merged'}"
                words.append(f"export.target={target}")
            merged = {"both": f"{target}/merged", "peft": None}.get(form, target)
            words += [f"run={run_dir}", *([f"export.base={base}"] if base else [])]
            found.append(FollowUp(name, words))
        elif name == "evaluate":
            if merged is None:
                raise UserError("looks at the merged model; put a merge before it")
            problems = next((w.removeprefix(_KEY) for w in words if w.startswith(f"{_KEY}gs://")), None)
            words = [f"{_KEY}{PROBLEMS}" if w == f"{_KEY}{problems}" else w for w in words]
            found.append(FollowUp(name, [*words, f"model={model}", f"model.path={merged}"], problems))
        else:
            raise UserError("give merge or evaluate, followed by their settings")
    return found
