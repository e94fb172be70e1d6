"""Finds the records about a run: in its folder, under `outputs` if they name the run, and those given."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma4_tpu.errors import UserError
from gemma4_tpu.storage import is_remote
from gemma4_tpu.tracking.records import (
    EVALUATION,
    HARNESS,
    LOAD_TEST,
    MERGE,
    PLAN,
    SERVING,
    TRAINING,
    config_of,
    kind_of,
    result_of,
)  # fmt: skip
from gemma4_tpu.tracking.run import RunFolder

log = logging.getLogger(__name__)

KINDS = {
    PLAN: "plan", MERGE: "merge", EVALUATION: "evaluation", SERVING: "serving", LOAD_TEST: "benchmark",
    HARNESS: "lm_eval record",
}  # fmt: skip
"""Kinds of records about a run → what people call them."""
OUTPUTS = "outputs"
"""Folder below the working folder, for records that belong to no run folder."""


@dataclass(kw_only=True)
class Records:
    """A training run and the records about it; each kind in the order of its folders' names."""

    run: RunFolder
    name: str
    """The last two names of the folder, such as `train/2026-11-20_12-00-00`."""
    by_kind: dict[str, list[Path]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    """Kind → folders."""

    def add(self, kind: str, folder: Path) -> None:
        """Adds a folder, once."""
        if folder not in self.by_kind[kind]:
            self.by_kind[kind].append(folder)


def find(runs: Sequence[str], further: Sequence[str] = ()) -> list[Records]:
    """Finds the records about each run.

    Args:
      runs: their folders; for those on gs://, the small files are copied to this machine.
      further: folders of records, or parents of such folders. With a single run, a record that names no run is its.

    Raises:
      UserError: not the folder of a training run; a given folder without a record, or with one of an unknown run; a
        damaged file.
    """
    several = [_of_run(run) for run in runs]
    for place in further:
        for kind, folder in _given(Path(place).absolute()):
            named = [records for records in several if _is_about(folder, kind, records)]
            if not named and len(several) > 1:
                raise UserError(f"records: {folder}: names none of the runs; make a page about its run alone")
            (named or several)[0].add(kind, folder)
    return several


def _of_run(run: str) -> Records:
    folder = RunFolder.existing(run)
    if not (folder.metrics_path.exists() or folder.result_path.exists()) or folder.kind != TRAINING:
        raise UserError(f"run={run}: not the folder of a training run (config.yaml with metrics.jsonl or result.json)")
    found = Records(run=folder, name="/".join(folder.path.parts[-2:]))
    for path in _below(folder.path, 2):
        if (kind := kind_of(path)) in KINDS:
            found.add(kind, path)
    for path in _elsewhere(folder.path):
        if (kind := kind_of(path)) in KINDS and _is_about(path, kind, found):
            found.add(kind, path)
    return found


def _below(folder: Path, levels: int) -> Iterator[Path]:
    """Folders down to this many levels, by name; without those inside checkpoints and models."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name not in ("checkpoints", "plots", "merged", "adapter", "cells"):
            yield path
            if levels > 1 and kind_of(path) is None:
                yield from _below(path, levels - 1)


def _elsewhere(run: Path) -> Iterator[Path]:
    """Records under `outputs` whose configuration mentions the name of the run's folder."""
    # A cheap search for the folder's name first; the record's keys then decide whether it is about the run.
    for config in sorted(Path(OUTPUTS).absolute().glob("*/*/config.yaml")):
        folder = config.parent
        texts = (path for path in (config, folder / "result.json") if path.is_file())
        if folder != run and any(run.name in text.read_text(encoding="utf-8", errors="replace") for text in texts):
            yield folder


def _is_about(folder: Path, kind: str, found: Records) -> bool:
    """Whether a record names the run: a benchmark by `served`, a plan by `replay`, others by `run` or `model.path`; an
    evaluation of a server by the address and model name of one of the run's servers.
    """
    config = config_of(folder)
    model = config.get("model")
    named = [config.get(key) for key in ("run", "served", "replay")]
    if kind in (EVALUATION, HARNESS):
        named.append(model.get("path") if isinstance(model, dict) else None)
        settings = result_of(folder).values.get("settings") or {}
        if settings.get("endpoint") and any(_answers(server, settings) for server in found.by_kind[SERVING]):
            return True
    return any(_is_in(found.run, place) for place in named if isinstance(place, str) and place)


def _answers(server: Path, settings: dict[str, Any]) -> bool:
    known = result_of(server).values
    return bool(known) and all(known.get(key) == settings.get(key) for key in ("endpoint", "model"))


def _is_in(run: RunFolder, place: str) -> bool:
    if is_remote(place):
        return f"{place}/".startswith(f"{run.address.rstrip('/')}/")
    path = Path(place).expanduser().absolute()
    return path == run.path or run.path in path.parents


def _given(place: Path) -> list[tuple[str, Path]]:
    """(kind, folder) of the record at `place`, or of those in it."""
    found = [(kind, path) for path in (place, *_below(place, 1)) if (kind := kind_of(path)) in KINDS]
    if not found:
        raise UserError(
            f"records: {place}: no plan (plan.json), evaluation, benchmark, merge or server (result.json) in it"
        )
    return found[:1] if found[0][1] == place else found
