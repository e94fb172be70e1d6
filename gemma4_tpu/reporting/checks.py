"""Checks of `python -m gemma4_tpu.report`: exactly one subject, whose folder exists. Imports no JAX."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemma4_tpu.config.keys import did_you_mean
from gemma4_tpu.config.paths import folder_of, no_folder
from gemma4_tpu.config.refusals import Refusal
from gemma4_tpu.config.tasks import ReportRoot
from gemma4_tpu.hardware import LOCAL, SLICES

SUBJECTS = ("sweep", "wandb", "check")
"""Keys that take a folder each."""
LISTED = ("run", "cost", "plausibility")
"""Keys that take a list of folders (the last two also files). Exactly one of all these keys is given."""
_FILES_TOO = ("cost", "plausibility")
_WITH_COSTS = ("run", "cost")
_ONLY_COSTS = ("serving_hours", "serving_slices", "prices", "spot_prices")


@dataclass(frozen=True)
class ReportChecked:
    """What the checks found out along the way."""

    subject: str
    """One of `SUBJECTS` or `LISTED`, or `price_list`."""


def normalise_report(root: ReportRoot) -> ReportRoot:
    """Canonical spelling of paths: `~` expanded, no slash at the end."""
    changed: dict[str, Any] = {name: folder_of(getattr(root, name)) for name in SUBJECTS}
    changed |= {name: [folder_of(path) for path in getattr(root, name)] for name in (*LISTED, "records")}
    return replace(root, **changed, out=folder_of(root.out) or None)


def examine_report(root: ReportRoot) -> tuple[ReportChecked | None, list[Refusal]]:
    """Checks everything that can be checked without reading the folder."""
    given = [name for name in (*SUBJECTS, *LISTED) if getattr(root, name)] + ["price_list"] * root.price_list
    if len(given) != 1:
        told = " ".join(f"{name}={getattr(root, name)}" for name in given) or "nothing"
        choices = ", ".join(
            [f"{name}=<folder>" for name in SUBJECTS]
            + [f"{name}=[<folder>,…]" for name in LISTED]
            + ["price_list=true"]
        )
        return None, [Refusal(f"report: give exactly one of {choices}; {told} was given")]
    subject = given[0]
    messages = [*_places(root, subject), *_costs(root, subject)]
    if root.metric is not None and subject != "sweep":
        messages.append(f"metric={root.metric}: only with sweep=<folder>")
    if root.records and subject != "run":
        messages.append(f"records={root.records}: only with run=<folder>")
    if messages:
        return None, [Refusal(message) for message in messages]
    return ReportChecked(subject), []


def _places(root: ReportRoot, subject: str) -> Iterator[str]:
    """Folders (or files, in lists) that don't exist, and a file that can't be written."""
    given = getattr(root, subject)
    places = given if subject in LISTED else [given] if subject in SUBJECTS else []
    wanted = [(subject, place) for place in places]
    for key, place in [*wanted, *(("records", place) for place in root.records)]:
        if key == "run" and "://" in place:
            continue  # its small files are copied here
        if not (Path(place).exists() if key in _FILES_TOO else Path(place).is_dir()):
            missing = "no such folder (a local copy is needed)" if "://" in place else no_folder(Path(place))
            yield f"{key}={place}: {missing}"
    yield from (
        f"{subject}: {place} is given twice"
        for place in sorted({p for _, p in wanted if wanted.count((subject, p)) > 1})
    )
    if root.out is not None:
        if subject == "run" and not root.out.endswith(".md"):
            yield f"out={root.out}: give a name that ends in .md; the HTML page gets the same name with .html"
        if subject not in LISTED:
            yield f"out={root.out}: only with {' or '.join(LISTED)}"
        elif Path(root.out).is_dir() or not Path(root.out).absolute().parent.is_dir():
            yield f"out={root.out}: give a file in a folder that exists"


def _costs(root: ReportRoot, subject: str) -> Iterator[str]:
    """Prices and hours that make no sense, or that nothing uses."""
    if subject not in _WITH_COSTS:
        changed = [name for name in _ONLY_COSTS if getattr(root, name) != getattr(ReportRoot(), name)]
        yield from (f"{name}={getattr(root, name)}: only with {' or '.join(_WITH_COSTS)}" for name in changed)
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
