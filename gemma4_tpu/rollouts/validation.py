"""Measures the policy on prompts that are set aside from the training prompts and never trained on.

This is never the held-out set, which is used once, at the end: a set that decides when to stop, or which run is better,
has been tuned on. The same prompts are always answered with the same seeds, and the initial rewards are subtracted
prompt by prompt, which leaves only the difference between the policies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gemma4_tpu.evals.passk import interval
from gemma4_tpu.rollouts.collecting import Collector
from gemma4_tpu.rollouts.on_policy_run import OnPolicyRun
from gemma4_tpu.rollouts.policy_tasks import Task
from gemma4_tpu.tracking.metrics import MetricsFile, read_metrics
from gemma4_tpu.tracking.records import VALIDATION_FILE


class Validation:
    """Answers the same prompts now and then; writes rows of `validation.jsonl`.

    Each row has `update`, the mean `reward`, its `difference` to the first row's with the 95% interval over prompts
    (`low`, `high`; absent in the first row), and the `rewards` of the prompts, in order.
    """

    def __init__(self, tasks: Sequence[Task], updates: int, run: OnPolicyRun):
        """Of a run of so many `updates`."""
        self._tasks, self._config, self._updates = list(tasks), run.config, updates
        path, self._known = run.folder / VALIDATION_FILE, list[dict[str, Any]]()
        self._file = MetricsFile(path, after_update=run.resume_from, write=run.hosts.first) if tasks else None
        if tasks:
            self._known = run.hosts.from_first(lambda: read_metrics(path))

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
