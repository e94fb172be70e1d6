"""The step time that a plan predicts for this run, for comparison with the measured one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gemma4_tpu.errors import UserError
from gemma4_tpu.hardware import slice_of
from gemma4_tpu.step.objective_kinds import KINDS, SFT
from gemma4_tpu.tracking.files import read_json
from gemma4_tpu.tracking.records import check_shape
from gemma4_tpu.tracking.typed import POSITIVE, fields, maybe
from gemma4_tpu.training.recipe import Recipe

log = logging.getLogger(__name__)

PLAN, PLANS = "plan.json", Path("outputs/plan")
_DESCRIBED = (
    "slice", "model", "trained", "objective", "teacher", "mesh", "remat", "sequence_length", "rows_per_update",
    "microbatches",
)  # fmt: skip
"""Values in which a plan and a run must agree."""

_TIMED = fields({"sequence_length": POSITIVE}, {"step_seconds": maybe(POSITIVE)})


class Prediction(NamedTuple):
    """A planned step time."""

    step_seconds: float
    """For one update of rows of `length` tokens."""
    length: int
    plan: str
    """The file that it comes from."""

    def ratio(self, seconds: float, length: int) -> float:
        """Measured over predicted time of an update whose rows have `length` tokens, scaled in proportion if
        shorter.
        """
        return seconds / (self.step_seconds * length / self.length)


def predict(recipe: Recipe, plan: str | None, run_folder: Path, plans: Path = PLANS) -> Prediction | None:
    """The step time predicted for this run; None without a slice or a plan.

    Args:
      recipe: of the run, with the chosen remat policy.
      plan: `trainer.plan`, which must match the run; None: use the run folder's own plan, else the newest that matches.
      run_folder: of the run.
      plans: folder of plans' folders.

    Raises:
      UserError: `plan` has another configuration, or no step time.
    """
    if slice_of(recipe.hardware) is None:
        return None
    if KINDS[recipe.objective.kind].on_policy:  # most of its time is roll-outs, which no schedule covers
        return None
    own = recipe.described()
    if plan is not None:
        return _given(Path(plan), own)
    for path in _candidates(run_folder, plans):
        found = _read(path)
        if found is not None and not _differences(found, own) and found.get("step_seconds"):
            return Prediction(found["step_seconds"], found["sequence_length"], str(path))
    return None


def _given(place: Path, own: dict[str, Any]) -> Prediction:
    path = place / PLAN if place.is_dir() else place
    plan = _read(path)
    if plan is None:
        raise UserError(f"trainer.plan={place}: not a readable plan ({path}); plan again")
    if differences := _differences(plan, own):
        lines = "".join(f"\n  {key}: planned {plan.get(key)}, this run has {own[key]}" for key in differences)
        raise UserError(f"trainer.plan={place}: a plan of another configuration:{lines}\nplan this one, or set null")
    if not plan.get("step_seconds"):
        raise UserError(f"trainer.plan={place}: it has no step_seconds; make it with plan.schedule=true")
    return Prediction(plan["step_seconds"], plan["sequence_length"], str(path))


def _candidates(run_folder: Path, plans: Path) -> Iterator[Path]:
    """The run folder's own plan, then others, newest first."""
    yield from (path for path in [run_folder / PLAN] if path.is_file())
    yield from sorted(plans.glob(f"*/{PLAN}"), key=lambda path: path.stat().st_mtime, reverse=True)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        plan = read_json(path)
        check_shape(plan, _TIMED, path)
    except (OSError, ValueError, RecursionError) as error:
        log.debug("%s: %s", path, error)
        return None
    return dict(plan)


def _differences(plan: dict[str, Any], own: dict[str, Any]) -> list[str]:
    plan = {"objective": SFT} | plan  # earlier versions knew only this objective
    return [key for key in _DESCRIBED if plan.get(key) != own[key]]
