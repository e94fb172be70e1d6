"""Which checkpoint a run goes on from: the newest that verifies. Damaged ones are set aside, never used."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

from gemma4_tpu.errors import UserError
from gemma4_tpu.storage import filesystem, join
from gemma4_tpu.storage import read_json as read_object
from gemma4_tpu.training import checksums
from gemma4_tpu.training.saved import saved_updates

log = logging.getLogger(__name__)

DAMAGED = ".damaged"
"""Ending of the folder that a damaged checkpoint is renamed to."""


def newest_verified(checkpoints: str) -> int | None:
    """The update to resume from; None: there is no checkpoint yet.

    What is newer and does not verify is cleared away: a save that did not come to its end is removed, a damaged
    checkpoint is renamed to `<update>.damaged`.

    Raises:
      UserError: there are checkpoints, but none verifies; nothing is touched then.
    """
    problems: dict[int, str] = {}
    there = saved_updates(checkpoints)
    unfinished = [u for u in there[-1:] if not checksums.is_finished(join(checkpoints, str(u)))]
    found = None
    for update in reversed([u for u in there if u not in unfinished]):
        problem = checksums.problem(join(checkpoints, str(update)))
        if problem is None:
            found = update
            break
        problems[update] = problem
    if problems and found is None:
        listed = "".join(f"\n  update {update}: {problem}" for update, problem in problems.items())
        raise UserError(
            f"{checkpoints}: no checkpoint verifies:{listed}\nbring back a good copy of one of them, or give another"
            " run_dir to start afresh"
        )
    for update in unfinished:
        log.warning("the save at update %d did not come to its end: removed", update)
        _remove(join(checkpoints, str(update)))
    for update, problem in problems.items():
        log.warning("the checkpoint at update %d is damaged (%s): set aside as %d%s", update, problem, update, DAMAGED)
        _set_aside(join(checkpoints, str(update)))
    if found is not None and (problems or unfinished):
        log.warning("falling back to the checkpoint at update %d, which verifies", found)
    return found


def position(checkpoints: str, update: int) -> dict[str, Any]:
    """What was saved beside the training state at `update`."""
    return read_object(join(checkpoints, f"{update}/position/metadata"))


def refuse_differences(recorded: dict[str, Any], now: dict[str, Any], allow: Collection[str], run: str) -> None:
    """Compares fingerprints of data, tokenizer and base with those that the checkpoint was made with.

    Raises:
      UserError: some differ that `allow` (`checkpoint.resume_allow`) does not name; shows them.
    """
    changed = [key for key in {**recorded, **now} if recorded.get(key) != now.get(key)]
    for key in changed:
        log.warning("resuming with another %s (the run has %s)", _shown(key, now), recorded.get(key))
    if refused := [key for key in changed if key not in allow]:
        lines = "".join(f"\n  {_shown(key, now)} (the run has {recorded.get(key)})" for key in refused)
        raise UserError(
            f"run_dir={run} holds a run with other data or another base model:{lines}\nbring back what the run began"
            " with, give another run_dir to start afresh, or accept the differences:"
            f" checkpoint.resume_allow=[{','.join(refused)}]"
        )


def _shown(key: str, fingerprints: dict[str, Any]) -> str:
    return f"{key}: {fingerprints.get(key)}"


def _remove(folder: str) -> None:
    fs, path = filesystem(folder)
    fs.rm(path, recursive=True)


def _set_aside(folder: str) -> None:
    fs, path = filesystem(folder)
    if fs.exists(path + DAMAGED):
        fs.rm(path + DAMAGED, recursive=True)
    fs.mv(path, path + DAMAGED, recursive=True)
