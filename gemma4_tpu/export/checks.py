"""Checks of `python -m gemma4_tpu.merge` before anything is read: choices, run folders, targets, token. Imports
no JAX.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from gemma4_tpu.config.limits import limit_problems
from gemma4_tpu.config.paths import folder_of, name_problem, no_folder, remote_problem
from gemma4_tpu.config.refusals import Refusal
from gemma4_tpu.config.tasks import ExportConfig, MergeRoot
from gemma4_tpu.tracking.records import SWEEP, read_record
from gemma4_tpu.tracking.run import is_run

TOKEN = "HF_TOKEN"
QUANTISED = ("int8", "fp8", "int8_weight_only", "fp8_weight_only")
"""Formats made from the merged checkpoint."""


@dataclass(frozen=True)
class MergeChecked:
    """What the checks found out along the way."""

    runs: tuple[Path | str, ...]
    """The run folders to export, sorted; a str is one on gs://."""
    skipped: tuple[str, ...] = ()
    """A sweep's unfinished jobs, each with its status."""


def normalise_merge(root: MergeRoot) -> MergeRoot:
    """Canonical spelling: `~` expanded, no slash at the end, `verify: yes` as `true`."""
    export = replace(
        root.export,
        checkpoint=root.export.checkpoint.strip().lower(),
        base=folder_of(root.export.base),
        target=folder_of(root.export.target),
        verify=root.export.verify.strip().lower(),
    )
    return replace(root, run=folder_of(root.run) or "", run_dir=folder_of(root.run_dir), export=export)


def examine_merge(root: MergeRoot) -> tuple[MergeChecked | None, list[Refusal]]:
    """Checks everything that needs no tensor; `MergeChecked` is None if there are problems."""
    messages = limit_problems(root)
    runs, run_messages = _runs(root.run)
    messages += run_messages + _export(root.export, several=len(runs) > 1)
    messages += name_problem(root.name)
    if root.run_dir is not None and "://" in root.run_dir:
        messages.append(f"run_dir={root.run_dir}: the record of an export is local; only export.target can be on gs://")
    if messages:
        return None, [Refusal(m) for m in messages]
    return MergeChecked(tuple(runs), tuple(_unfinished(Path(root.run)).values())), []


def _runs(run: str) -> tuple[list[Path] | list[str], list[str]]:
    if not run:
        return [], ["run is not set; set run=<run folder>, such as run=outputs/train/<date>_<time>"]
    if "://" in run:
        return [run], remote_problem(f"run={run}", run)
    folder = Path(run)
    if not folder.is_dir():
        return [], [f"run={run}: {no_folder(folder)}; give a run folder"]
    if is_run(folder):
        return [folder], []
    inside = sorted((place for place in folder.iterdir() if place.is_dir() and is_run(place)), key=_natural)
    if not inside:
        return [], [f"run={run}: not the folder of a training run (config.yaml and checkpoints/), nor a parent of any"]
    unfinished = _unfinished(folder)
    finished = [place for place in inside if place.name not in unfinished]
    if not finished:
        return [], [f"run={run}: no job of this sweep has finished; give the folder of one to export its checkpoint"]
    return finished, []


def _unfinished(folder: Path) -> dict[str, str]:
    """Job → `job: status` of a sweep's unfinished jobs; empty if `folder` is not a sweep's."""
    record = folder / "sweep.json"
    if not record.is_file():
        return {}
    jobs = read_record(record, SWEEP).values["jobs"]
    told = {job["name"]: job.get("status", "waiting") for job in jobs}
    return {name: f"{name}: {status}" for name, status in told.items() if status != "finished"}


def _natural(place: Path) -> list[tuple[int, str]]:
    """Sorts numbers in job names numerically: rank-8 before rank-16."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", place.name)]


def _export(export: ExportConfig, *, several: bool) -> list[str]:
    messages = []
    if export.checkpoint not in ("best", "latest") and not export.checkpoint.isdecimal():
        messages.append(f"export.checkpoint={export.checkpoint}: give best, latest or the number of an update")
    if export.prompts is not None and export.format not in QUANTISED:
        messages.append(f"export.prompts={export.prompts}: only for quantised models; add export=int8 or fp8")
    if (hub := export.push_to_hub) is not None:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", hub):
            messages.append(f"export.push_to_hub={hub}: give owner/name")
        if not os.environ.get(TOKEN):
            messages.append(f"export.push_to_hub={hub}: needs a token with write access, in {TOKEN}")
        if several:
            messages.append(f"export.push_to_hub={hub}: one repository for several runs; give one run at a time")
        if export.target is not None and "://" in export.target:
            messages.append(f"export.push_to_hub={hub}: uploads from a local folder; give a local export.target")
        if export.format == "both":
            messages.append(f"export.push_to_hub={hub}: one repository holds one format; give one, not export=both")
    return messages
