"""Checks of `python -m gemma4_tpu.report`: one subject, and its folder is there. No JAX."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemma4_tpu.config.keys import did_you_mean
from gemma4_tpu.config.problems import Problem
from gemma4_tpu.config.schema import ReportRoot
from gemma4_tpu.hardware import LOCAL, SLICES

SUBJECTS = ("sweep", "wandb", "check")
"""Keys that each are a folder."""
LISTED = ("cost", "plausibility")
"""Keys that each are several folders or files. Of all these exactly one is given."""
_ONLY_COST = ("serving_hours", "serving_slices", "prices", "spot_prices")


@dataclass(frozen=True)
class ReportChecked:
    """What the checks found out on the way."""

    subject: str
    """One of `SUBJECTS` or `LISTED`."""


def normalise_report(root: ReportRoot) -> ReportRoot:
    """One spelling: `~` expanded, no slash at the end."""
    changed: dict[str, Any] = {name: _home(getattr(root, name)) for name in SUBJECTS}
    changed |= {name: [_home(path) for path in getattr(root, name)] for name in LISTED}
    return replace(root, **changed, out=_home(root.out) if root.out else None)


def _home(path: str) -> str:
    if not path:
        return path
    return (str(Path(path).expanduser()) if path.startswith("~") else path).rstrip("/") or "/"


def examine_report(root: ReportRoot) -> tuple[ReportChecked | None, list[Problem]]:
    """Everything that can be checked without reading the folder."""
    given = [name for name in (*SUBJECTS, *LISTED) if getattr(root, name)]
    if len(given) != 1:
        told = " ".join(f"{name}={getattr(root, name)}" for name in given) or "nothing"
        choices = ", ".join([*(f"{name}=<folder>" for name in SUBJECTS), *(f"{name}=[<folder>,…]" for name in LISTED)])
        return None, [Problem(f"report: give exactly one of {choices}; {told} was given")]
    subject = given[0]
    messages = [*_places(root, subject), *_costs(root, subject)]
    if root.metric is not None and subject != "sweep":
        messages.append(f"metric={root.metric}: only with sweep=<folder>")
    if messages:
        return None, [Problem(message) for message in messages]
    return ReportChecked(subject), []


def _places(root: ReportRoot, subject: str) -> Iterator[str]:
    """Folders (for lists: or files) that aren't there, and a file that can't be written."""
    places = getattr(root, subject)
    for place in places if subject in LISTED else [places]:
        if not (Path(place).exists() if subject in LISTED else Path(place).is_dir()):
            yield f"{subject}={place}: no such folder" + " (a local copy is needed)" * ("://" in place)
    if root.out is not None:
        if subject not in LISTED:
            yield f"out={root.out}: only with {' or '.join(LISTED)}"
        elif Path(root.out).is_dir() or not Path(root.out).absolute().parent.is_dir():
            yield f"out={root.out}: a file in a folder that is there is needed"


def _costs(root: ReportRoot, subject: str) -> Iterator[str]:
    """Prices and hours that make no sense, or that nothing asks for."""
    if subject != "cost":
        changed = [name for name in _ONLY_COST if getattr(root, name) != getattr(ReportRoot(), name)]
        yield from (f"{name}={getattr(root, name)}: only with cost=[<folder>,…]" for name in changed)
        return
    known = [*SLICES, LOCAL]
    for name in ("prices", "spot_prices"):
        for slice_, usd in getattr(root, name).items():
            if slice_ not in known:
                hint = did_you_mean(slice_, known)
                yield f"{name}.{slice_}={usd}: no such slice{hint} (slices: {', '.join(known)})"
            elif not usd >= 0:
                yield f"{name}.{slice_}={usd}: USD per hour, 0 or more"
    for slice_ in root.serving_slices:
        if slice_ not in known:
            yield f"serving_slices: {slice_}: no such slice{did_you_mean(slice_, known)} (slices: {', '.join(known)})"
    yield from (f"serving_hours: {number}: hours, 0 or more" for number in root.serving_hours if not number >= 0)
