"""Checks of `python -m gemma4_tpu.check` before a checkpoint is looked into. No JAX."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gemma4_tpu.architectures import ARCHITECTURES
from gemma4_tpu.config.files import RANDOM, at_home, local_folder
from gemma4_tpu.config.keys import did_you_mean
from gemma4_tpu.config.problems import Problem
from gemma4_tpu.config.tasks import ANY_SIZE, CheckRoot


@dataclass(frozen=True)
class CheckChecked:
    """Nothing is found out on the way."""


def normalise_check(root: CheckRoot) -> CheckRoot:
    """`~` written out."""
    return replace(
        root, model=replace(root.model, path=at_home(root.model.path), tokenizer=at_home(root.model.tokenizer))
    )


def examine_check(root: CheckRoot) -> tuple[CheckChecked | None, list[Problem]]:
    """Whether there is a folder to look into."""
    name, path = root.model.name, root.model.path
    messages = []
    if name != ANY_SIZE and name not in ARCHITECTURES:
        hint = did_you_mean(name, ARCHITECTURES, lambda near: f"model={near}")
        messages.append(f"model.name={name}: no such architecture{hint} (there are: {', '.join(ARCHITECTURES)})")
    if not path:
        messages.append("model.path: which checkpoint? give model.path=<folder with the Hugging Face checkpoint>")
    elif not path.startswith(RANDOM):
        messages += local_folder(f"model.path={path}", path)[1]
    return (None if messages else CheckChecked()), [Problem(message) for message in messages]
