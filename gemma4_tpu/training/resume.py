"""Selects the checkpoint to resume from: the newest that verifies. Damaged ones are set aside, never used."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection
from typing import Any

from gemma4_tpu.config.outputs import CheckpointConfig
from gemma4_tpu.config.refusals import resume_allow
from gemma4_tpu.config.schema import OptimizerConfig, TrainerConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.step.optimizer import make_schedule
from gemma4_tpu.storage import filesystem, join
from gemma4_tpu.storage import read_json as read_object
from gemma4_tpu.tracking.result import Result
from gemma4_tpu.tracking.run import RunFolder
from gemma4_tpu.training import checksums
from gemma4_tpu.training.endings import Patience
from gemma4_tpu.training.saved import saved_updates

log = logging.getLogger(__name__)

DAMAGED = ".damaged"
"""Suffix of the folder that a damaged checkpoint is renamed to."""
JUMP = 2.0
"""Factor by which the learning rate can rise without permission if a run resumes with another schedule."""
LEARNING_RATE = "learning_rate"
"""Name of such a rise in `checkpoint.resume_allow`."""


def newest_verified(checkpoints: str) -> int | None:
    """The update to resume from; None: there is no checkpoint yet.

    Newer checkpoints that do not verify are cleared away: an incomplete save is removed, a damaged checkpoint is
    renamed to `<update>.damaged`.

    Raises:
      UserError: there are checkpoints, but none verifies; nothing is changed then.
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
            f"{checkpoints}: no checkpoint verifies:{listed}\nrestore a good copy of one of them, or use another"
            " run_dir to start afresh"
        )
    for update in unfinished:
        log.warning("the save at update %d was interrupted: removed", update)
        _remove(join(checkpoints, str(update)))
    for update, problem in problems.items():
        log.warning("the checkpoint at update %d is damaged (%s): set aside as %d%s", update, problem, update, DAMAGED)
        _set_aside(join(checkpoints, str(update)))
    if found is not None and (problems or unfinished):
        log.warning("falling back to the checkpoint at update %d, which verifies", found)
    return found


def position(checkpoints: str, update: int) -> dict[str, Any]:
    """What was saved with the training state at `update`."""
    return read_object(join(checkpoints, f"{update}/position/metadata"))


def check(
    folder: RunFolder,
    done: int,
    fingerprints: dict[str, Any],
    updates: int,
    optimizer: OptimizerConfig,
    checkpoint: CheckpointConfig,
) -> None:
    """Compares this start with the checkpoint after update `done` that it resumes from.

    Raises:
      UserError: data, base or learning rate differ in a way that `checkpoint.resume_allow` does not name.
    """
    began = position(folder.checkpoints, done)
    refuse_differences(began["fingerprints"], fingerprints, checkpoint.resume_allow, folder.address)
    refuse_jump(began.get("schedule"), optimizer, done, updates, checkpoint.resume_allow)


def refuse_differences(recorded: dict[str, Any], now: dict[str, Any], allow: Collection[str], run: str) -> None:
    """Compares fingerprints of data, tokenizer and base with those in the checkpoint.

    Raises:
      UserError: some differ that `allow` (`checkpoint.resume_allow`) does not name; shows them.
    """
    changed = [key for key in {**recorded, **now} if recorded.get(key) != now.get(key)]
    for key in changed:
        log.warning("resuming with another %s (the run has %s)", _shown(key, now), recorded.get(key))
    if refused := [key for key in changed if key not in allow]:
        lines = "".join(f"\n  {_shown(key, now)} (the run has {recorded.get(key)})" for key in refused)
        raise UserError(
            f"run_dir={run} contains a run with other data or another base model:{lines}\nrestore what the run started"
            " with, use another run_dir to start afresh, or accept the differences:"
            f" {resume_allow(allow, refused)}"
        )


def refuse_jump(
    recorded: dict[str, Any] | None, optimizer: OptimizerConfig, done: int, updates: int, allow: Collection[str]
) -> None:
    """Checks the learning rate after a change of length or schedule; it must not jump upward without permission.

    Args:
      recorded: the checkpoint's `schedule`: `updates` of the run, `learning_rate` of the last update; None: a version
        that did not record it.
      optimizer: this start's.
      done: updates that are done.
      updates: of the run, by this start.
      allow: `checkpoint.resume_allow`.

    Raises:
      UserError: the next learning rate is more than `JUMP` times the last, and `allow` does not name `learning_rate`.
    """
    if recorded is None or done >= updates:
        return
    schedule, last = make_schedule(optimizer, updates), recorded["learning_rate"]
    after = float(schedule(done))
    # Another machine can round a cosine differently, by parts in 10⁷ of the peak.
    moved = not math.isclose(last, float(schedule(done - 1)), rel_tol=0, abs_tol=1e-6 * optimizer.learning_rate)
    if not moved and recorded["updates"] == updates:
        return
    told = (
        f"{updates} updates (before: {recorded['updates']}): the learning rate goes from {last:.3g} at update {done},"
        f" the last one done, to {after:.3g} at the next"
    )
    if moved and after > JUMP * last and LEARNING_RATE not in allow:
        raise UserError(
            f"{told}: more than {JUMP:g} times as much; accept it: {resume_allow(allow, [LEARNING_RATE])}, or start"
            " a new run, with a new schedule, from these adapters: lora.start=<this run>"
        )
    log.info(told)


def nothing_left(folder: RunFolder, done: int | None, updates: int, trainer: TrainerConfig) -> str | None:
    """Why nothing is left to do in a run after `done` updates, in words; None: something is.

    A run whose last update is done, by its length or `trainer.patience`, but without a result, still has to write it.

    Raises:
      UserError: the run ended after some updates and saved them, but its checkpoints are gone.
    """
    if done is None:
        _refuse_lost(folder)
        return None
    patience = Patience.of(trainer, position(folder.checkpoints, done))
    at_its_end = done == updates or (done < updates and patience.exhausted)
    if not _finished(folder, done) if at_its_end else done < updates:
        return None
    if done < updates:
        told = f"run_dir={folder.address}: ended after update {done} of {updates} by {patience.told()}"
        more = "a larger trainer.patience, or null"
    else:
        told = f"run_dir={folder.address}: {done} updates are done, and this command asks for {updates}"
        more = "more trainer.max_updates or trainer.epochs"
    return f"{told}: nothing left to do, nothing changed; to train further, set {more}"


def _refuse_lost(folder: RunFolder) -> None:
    if not folder.result_path.exists():
        return
    result = Result.read(folder.result_path)
    if result.updates and result.status != "failed":
        raise UserError(
            f"run_dir={folder.address}: {result.status} after update {result.updates}, but {folder.checkpoints} has no"
            " checkpoint to resume from; restore one, or use another run_dir to start afresh: here its metrics and"
            " result would be lost"
        )


def _finished(folder: RunFolder, done: int) -> bool:
    """Whether a run that ended after update `done` has its result."""
    if not folder.result_path.exists():
        return False
    result = Result.read(folder.result_path)
    return result.status == "finished" and result.updates == done


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
