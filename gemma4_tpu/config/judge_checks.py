"""Checks of `python -m gemma4_tpu.judge` before anything is loaded: the problems. No JAX."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gemma4_tpu.config.evaluate_checks import problems_path_messages
from gemma4_tpu.config.files import folder_of
from gemma4_tpu.config.limits import limit_problems
from gemma4_tpu.config.problems import Problem
from gemma4_tpu.config.tasks import JudgeRoot


@dataclass(frozen=True)
class JudgeChecked:
    """Nothing was found out on the way."""


def normalise_judge(root: JudgeRoot) -> JudgeRoot:
    """One spelling: `~` expanded, no slash at the end."""
    return replace(root, eval=replace(root.eval, problems_path=folder_of(root.eval.problems_path)))


def examine_judge(root: JudgeRoot) -> tuple[JudgeChecked | None, list[Problem]]:
    """Everything that can be checked without a simulator; None when there are problems."""
    messages = [*limit_problems(root), *problems_path_messages(root.eval)]
    return (None, [Problem(m) for m in messages]) if messages else (JudgeChecked(), [])
