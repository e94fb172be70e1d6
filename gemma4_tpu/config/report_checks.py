"""Checks of `python -m gemma4_tpu.report`: one subject, and its folder is there. No JAX."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from gemma4_tpu.config.problems import Problem
from gemma4_tpu.config.schema import ReportRoot

SUBJECTS = ("sweep", "wandb", "check")
"""The keys of which exactly one is given; each is a folder."""


@dataclass(frozen=True)
class ReportChecked:
    """What the checks found out on the way."""

    subject: str
    """One of `SUBJECTS`."""


def normalise_report(root: ReportRoot) -> ReportRoot:
    """One spelling: `~` expanded, no slash at the end."""
    return replace(root, **{name: _home(getattr(root, name)) for name in SUBJECTS})


def _home(path: str) -> str:
    if not path:
        return path
    return (str(Path(path).expanduser()) if path.startswith("~") else path).rstrip("/") or "/"


def examine_report(root: ReportRoot) -> tuple[ReportChecked | None, list[Problem]]:
    """Everything that can be checked without reading the folder."""
    given = [name for name in SUBJECTS if getattr(root, name)]
    if len(given) != 1:
        told = " ".join(f"{name}={getattr(root, name)}" for name in given) or "nothing"
        choices = ", ".join(f"{name}=<folder>" for name in SUBJECTS)
        return None, [Problem(f"report: give exactly one of {choices}; {told} was given")]
    subject = given[0]
    folder = getattr(root, subject)
    messages = []
    if not Path(folder).is_dir():
        messages.append(f"{subject}={folder}: no such folder" + " (a local copy is needed)" * ("://" in folder))
    if root.metric is not None and subject != "sweep":
        messages.append(f"metric={root.metric}: only with sweep=<folder>")
    if messages:
        return None, [Problem(message) for message in messages]
    return ReportChecked(subject), []
