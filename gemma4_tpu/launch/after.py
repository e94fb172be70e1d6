"""Stages after training on its slice (`merge …`, `evaluate …`, `serve …`), checked by their own configuration code."""

from __future__ import annotations

import shlex
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path

from gemma4_tpu.architectures import ARCHITECTURES, to_hf_config
from gemma4_tpu.config.load import load
from gemma4_tpu.errors import UserError
from gemma4_tpu.evaluate import EVALUATE
from gemma4_tpu.merge import MERGE
from gemma4_tpu.serve import SERVE
from gemma4_tpu.tracking.files import write_json

PROBLEMS = "problems"
"""Folder on the slice for the contents of `eval.problems_path=gs://…`."""
SERVED = "served"
"""Folder on the slice for the merged model that it serves."""
_KEY = "eval.problems_path="
_STAND_IN = f"{_KEY}embedded:verilog_smoke/heldout_problems.jsonl.gz"


@dataclass(frozen=True)
class FollowUp:
    """An entry point that runs on the first host after training."""

    name: str
    words: list[str]
    """Its command line."""
    problems: str | None = None
    """gs:// folder to copy to `PROBLEMS` first."""
    served: str | None = None
    """gs:// folder to copy to `SERVED` first."""


def after_problems(after: list[str], model: str, *, hosts: int, slice_name: str) -> list[str]:
    """Problems with `launch.after`; each stage is checked by its entry point's own configuration code."""
    messages: list[str] = []
    for index, text in enumerate(after):
        try:
            stage = stages(after[: index + 1], "gs://bucket/run", model)[-1]
            if stage.name != "merge" and hosts > 1:
                raise UserError(f"runs on one host, and this slice has {hosts}; only merge here, and run it elsewhere")
            words = [_STAND_IN if stage.problems and word.startswith(_KEY) else word for word in stage.words]
            if local := [word for word in words if word.startswith(_KEY) and ":" not in word]:
                raise UserError(f"{local[0]}: on this machine, not on the slice; copy it to a bucket and give gs://…")
            if stage.name == "merge":
                load(words, MERGE)
            elif stage.name == "serve":
                _check_server(words, model, slice_name)
            else:
                load(words, EVALUATE)
        except (UserError, ValueError) as refusal:  # ValueError: an unbalanced quote
            messages.append(f"launch.after: '{text}': {refusal}")
    return messages


def _check_server(words: list[str], model: str, slice_name: str) -> None:
    """Loads what the slice will load, with a placeholder folder for the merged model and a port that is free here.

    Raises:
      UserError: serve would refuse it there, or is configured for another slice.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        config = {"model_type": "gemma4", "text_config": to_hf_config(ARCHITECTURES[model])}
        write_json(Path(folder) / "config.json", config)
        for name in ("model.safetensors", "tokenizer.json"):
            (Path(folder) / name).touch()
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        serving = load([*words[:-1], f"run={folder}", f"serving.port={port}"], SERVE).root.serving
    if serving.slice != slice_name:
        raise UserError(
            f"is for a {serving.slice}, but the launch for a {slice_name}; launch again with hardware=<that slice>, the"
            " same run_dir and this stage: a finished run continues with its stages"
        )
    if serving.runner != "docker":
        raise UserError(f"serving.runner={serving.runner}: the slice has Docker but no vLLM; leave it out")


def stages(after: list[str], run_dir: str, model: str, *, base: str | None = None) -> list[FollowUp]:
    """The stages of `launch.after` for a run.

    Args:
      after: `launch.after`.
      run_dir: gs:// run folder of the training run.
      model: `model.name`.
      base: location of the base checkpoint on the slice, if not that in the run's configuration.

    Raises:
      UserError: an unknown stage, or one that needs a merged model without a merge before it.
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
                target = {"merged": f"{run_dir}/merged", "peft": f"{run_dir}/adapter"}.get(form, run_dir)
                words.append(f"export.target={target}")
            merged = {"merged": target, "peft": None}.get(form, f"{target}/merged")
            words += [f"run={run_dir}", *([f"export.base={base}"] if base else [])]
            found.append(FollowUp(name, words))
        elif name == "serve":
            if merged is None:
                raise UserError("serves the merged model; put a merge before it")
            found.append(FollowUp(name, [*words, f"run={SERVED}"], served=merged))
        elif name == "evaluate":
            if merged is None:
                raise UserError("evaluates the merged model; put a merge before it")
            problems = next((w.removeprefix(_KEY) for w in words if w.startswith(f"{_KEY}gs://")), None)
            words = [f"{_KEY}{PROBLEMS}" if w == f"{_KEY}{problems}" else w for w in words]
            found.append(FollowUp(name, [*words, f"model={model}", f"model.path={merged}"], problems))
        else:
            raise UserError("give merge, evaluate or serve, followed by their settings")
    return found
