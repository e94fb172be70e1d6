"""Measures the policy on prompts that are set aside from the training prompts and never trained on.

This is never the held-out set, which is used once, at the end: a set that decides when to stop, or which run is better,
has been tuned on. The same prompts are always answered with the same seeds, and the initial rewards are subtracted
prompt by prompt, which leaves only the difference between the policies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma4_tpu.config.rollouts import RolloutsConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.evals.passk import interval
from gemma4_tpu.rollouts.collecting import Collector
from gemma4_tpu.rollouts.policy_tasks import Task
from gemma4_tpu.tracking.metrics import MetricsFile, read_metrics
from gemma4_tpu.tracking.records import VALIDATION_FILE


def set_aside(tasks: Sequence[Task], wanted: int) -> tuple[list[Task], list[Task]]:
    """(trained on, validated on): selects `wanted` prompts by a hash of their tokens; identical ones stay on one side.

    Raises:
      UserError: nothing would be left to train on.
    """
    keys = [hashlib.sha256(task.ids.tobytes()).hexdigest() for task in tasks]
    chosen = sorted({*keys})[:wanted]
    rest = [task for task, key in zip(tasks, keys, strict=True) if key not in {*chosen}]
    if wanted and not rest:
        raise UserError(
            f"rollouts.validation_prompts={wanted}: there are {len({*keys})} different prompts, which leaves none to"
            " train on; give fewer"
        )
    of_key = dict(zip(reversed(keys), reversed(tasks), strict=True))
    return rest, [of_key[key] for key in chosen]


class Validation:
    """Answers the same prompts now and then; writes rows of `validation.jsonl`.

    Each row has `update`, the mean `reward`, its `difference` to the first row's with the 95% interval over prompts
    (`low`, `high`; absent in the first row), and the `rewards` of the prompts, in order.
    """

    def __init__(self, tasks: Sequence[Task], config: RolloutsConfig, updates: int, run: Path, resume_from: int | None):
        """Prepares validation of a run of `updates` updates, resumed from `resume_from`; None: a new run."""
        self._tasks, self._config, self._updates = list(tasks), config, updates
        self._file = MetricsFile(run / VALIDATION_FILE, after_update=resume_from) if tasks else None
        self._known: list[dict[str, Any]] = read_metrics(run / VALIDATION_FILE) if tasks else []

    def is_due(self, update: int) -> bool:
        """Before the first update, at intervals, and after the last one; never twice."""
        at = update % self._config.validation_every == 0 or update == self._updates
        return self._file is not None and at and update not in [row["update"] for row in self._known]

    def __call__(
        self, collector: Collector, trained: Any, base: Any, update: int,
        report: Callable[[dict[str, Any], int], None],
    ) -> None:  # fmt: skip
        """The policy's rewards after `update`."""
        groups = collector.validated(update, trained, base, self._tasks)
        rewards = [float(group.rewards.mean()) for group in groups]
        row: dict[str, Any] = {"reward": float(np.mean(rewards))}
        if self._known:
            row |= _difference(np.array(rewards), np.array(self._known[0]["rewards"]))
        report({f"validation_{name}": value for name, value in row.items()}, update)
        row["rewards"] = rewards
        assert self._file is not None
        self._file.log(row, update)
        self._known.append({"update": update, **row})

    def close(self) -> None:
        """Closes the rows."""
        if self._file is not None:
            self._file.close()


def _difference(now: np.ndarray, start: np.ndarray) -> dict[str, float]:
    gaps, every = now - start, np.concatenate([now, start])
    spread = float(every.max() - every.min()) or 1.0
    low, high = interval(gaps, (-spread, spread))
    return {"difference": float(gaps.mean()), "low": low, "high": high}
