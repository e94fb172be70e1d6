"""Updates made by the policy itself: ask it, judge its answers, select what to learn from, certify it, pack it."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import numpy as np

from gemma4_tpu.config.rollouts import RolloutsConfig
from gemma4_tpu.config.schema import TrainerConfig
from gemma4_tpu.data.pipeline import STATE_VERSION, Update, check_position
from gemma4_tpu.errors import UserError
from gemma4_tpu.rollouts.batch import BatchShape, Placed, assembled, in_batches, that_fit
from gemma4_tpu.rollouts.certificate import Agreement, Certificate, ExpectedLoss, described
from gemma4_tpu.rollouts.collecting import Collected, Collector
from gemma4_tpu.rollouts.digest import digest
from gemma4_tpu.rollouts.policy_tasks import Task
from gemma4_tpu.rollouts.scoring import Scorer
from gemma4_tpu.rollouts.selection import Selection
from gemma4_tpu.rollouts.validation import Validation
from gemma4_tpu.step.grpo import ADVANTAGES, COPIES, OLD_LOGPROBS

log = logging.getLogger(__name__)

Show = Callable[[str, Sequence[str], Sequence[Sequence[Any]], int], None]
"""Receives a table, as trackers do: name, columns, rows, update."""
COLUMNS = ("prompt", "answer", "tokens", "stopped", "reward", "verdict")
"""Columns of the table of answers for trackers."""
SHOWN = 16
"""Number of answers in it."""


@dataclass(frozen=True)
class Making:
    """What turns roll-outs into updates, once weights are loaded."""

    collector: Collector
    scorer: Scorer
    certificate: Certificate
    validation: Validation
    base: Any
    """The frozen weights."""
    report: Callable[[dict[str, Any], int], None]
    """Receives metrics of an update."""
    show: Show
    held: ExitStack
    """Closed at the end: the reward's process, open files."""


@dataclass(frozen=True)
class _WaitingRollouts:
    """Roll-outs that wait for their update."""

    update: int
    lag: int
    """Updates that are made between drawing and training."""
    collected: Collected
    asked: list[int]
    """Indices of its prompts, in order."""
    compared: Agreement | None
    seconds: float


class OnPolicySource:
    """See `data.pipeline.Source`."""

    def __init__(
        self, tasks: Sequence[Task], config: RolloutsConfig, trainer: TrainerConfig, shape: BatchShape,
        selection: Selection, validated_on: Sequence[Task] = (), own: tuple[int, int] | None = None,
    ):  # fmt: skip
        """Prepares a source without weights.

        Args:
          tasks: the prompts.
          config: how many prompts and answers to use.
          trainer: length and seed of the run.
          shape: of an update's arrays.
          selection: what to learn from.
          validated_on: other prompts, for validation.
          own: (start, stop) of the rows of a microbatch that this process owns; None: all.

        Raises:
          UserError: there are fewer prompts than an update needs.
        """
        if len(tasks) < config.prompts:
            raise UserError(f"rollouts.prompts={config.prompts}: there are only {len(tasks)} prompts; lower it")
        self._tasks, self._config, self._trainer, self._shape = list(tasks), config, trainer, shape
        self._own = slice(*own) if own else slice(None)
        self.selection = selection
        """What to learn from."""
        self.validated_on = validated_on
        """Prompts that are never trained on."""
        self._asked = 0  # number of prompts so far
        self._update = 0
        self._adapter = ""  # digest of the values that the newest roll-outs are of
        self._waiting: deque[_WaitingRollouts] = deque()
        self._left: list[list[int]] = []  # prompts of the updates whose roll-outs waited when the run was saved
        self._lag = 0  # of the first of them
        self._made: Update | None = None
        self._old: np.ndarray | None = None
        self._expected: ExpectedLoss | None = None
        self._making: Making | None = None
        content = hashlib.sha256()
        for task in (*tasks, *validated_on):
            content.update(repr((task.name, task.ids.tolist(), task.reference)).encode())
        self.fingerprint: dict[str, Any] = {
            "prompts": content.hexdigest(), "sequence_length": shape.length, "rows_per_update": shape.capacity,
            "seed": trainer.seed, **({"off_policy": config.off_policy} if config.off_policy else {}),
        }  # fmt: skip

    def begin(self, making: Making) -> None:
        """Enables the source to make updates."""
        self._making = making

    @property
    def total_updates(self) -> int:
        """See `Source`."""
        trainer, lengths = self._trainer, []
        if trainer.epochs is not None:
            lengths.append(math.ceil(trainer.epochs * len(self._tasks) / self._config.prompts))
        if trainer.max_updates is not None:
            lengths.append(trainer.max_updates)
        return min(lengths)

    @property
    def total_epochs(self) -> float:
        """See `Source`; does not count prompts that replace others."""
        return self.total_updates * self._config.prompts / len(self._tasks)

    @property
    def lengths(self) -> list[int]:
        """See `Source`."""
        return [self._shape.length]

    def updates(self, trained: Callable[[], Any]) -> Iterator[Update]:
        """See `Source`; each update is made from the values at the time of the request."""
        while self._update < self.total_updates:
            values = trained()
            self.ready_to_save(values, self._update)
            yield self._next(values)

    def _draw(self, trained: Any) -> None:
        """Draws for the next update and those that follow it off-policy; after a resume, reads what was drawn."""
        assert self._making is not None
        making, own, started = self._making, digest(trained), time.perf_counter()
        left, lag = self._left, self._lag
        self._left, self._lag = [], 0
        count = len(left) or min(self._config.off_policy + 1, self.total_updates - self._update)
        updates = range(self._update + 1, self._update + 1 + count)
        asked: list[list[int]] = left or [[] for _ in updates]
        if not left:
            self._adapter = own
        tasks: list[Iterator[Task]] = [map(self._tasks.__getitem__, numbers) for numbers in left]
        tasks = tasks or [self._ask(noted) for noted in asked]
        collected = making.collector(updates, trained, making.base, tasks, self._adapter)
        is_due = not lag and any(making.certificate.is_due(update, own) for update in updates)
        seconds = (time.perf_counter() - started) / count
        for number, (update, found) in enumerate(zip(updates, collected, strict=True)):
            compared = self._compared(trained, found) if is_due and not number else None
            self._waiting.append(_WaitingRollouts(update, lag + number, found, asked[number], compared, seconds))

    def _next(self, trained: Any) -> Update:
        assert self._making is not None
        if not self._waiting:
            self._draw(trained)
        making, drawn = self._making, self._waiting.popleft()
        update, lag, collected, compared = drawn.update, drawn.lag, drawn.collected, drawn.compared
        live = [group for group in collected.groups if self.selection.is_live(group)]
        making.certificate.sampled(update, collected, len(live), self._adapter, compared, lag)
        if compared is not None:
            making.show("rollouts", COLUMNS, _shown(collected, making.collector), update)
        placed = [self.selection.placed(group) for group in live]
        answers = that_fit(placed, self._shape)
        if left_out := sum(map(len, placed)) - len(answers):
            log.warning(
                "update %d: omitted %d of %d answers, which do not fit in %d rows of %d tokens; increase"
                " trainer.global_batch_sequences", update, left_out, left_out + len(answers), self._shape.capacity,
                self._shape.length,
            )  # fmt: skip
        made = assembled(answers, self._shape, self._asked / len(self._tasks))
        self._made, self._update = made, update
        # What the update changes, not what was changed since its answers were drawn.
        self._old = making.scorer.logprobs(trained, making.base, made.arrays) if lag else made.arrays[OLD_LOGPROBS]
        # Off-policy, ratios are not 1, so the loss is not known in advance.
        self._expected = None if lag else self._expected_loss(trained, made.arrays, compared is not None)
        not_asked_for = {OLD_LOGPROBS, ADVANTAGES, COPIES} - {*self.selection.fields}
        arrays = {name: array[:, self._own] for name, array in made.arrays.items() if name not in not_asked_for}
        return replace(made, arrays=arrays, figures=_figures(collected, len(live), drawn.seconds))

    def _expected_loss(self, trained: Any, arrays: Mapping[str, np.ndarray], is_due: bool) -> ExpectedLoss | None:
        """The loss that the step must report, as far as it is known or due to be computed."""
        if self.selection.loss is not None:
            return self.selection.loss(arrays)
        if not is_due:
            return None
        assert self._making is not None
        copies = np.where(arrays["target_mask"], arrays[COPIES], 0.0).astype(np.float64)
        each = self._making.scorer.divergences(trained, self._making.base, arrays)
        return ExpectedLoss(float((copies * each).sum() / copies.sum()), 1.0)

    def _compared(self, trained: Any, collected: Collected) -> Agreement:
        """Compares sampler and trainer on all answers: a selection by reward or length would be biased in surprise."""
        assert self._making is not None
        scorer, base = self._making.scorer, self._making.base
        answers = [Placed(group.task, one) for group in collected.groups for one in group.drawn]
        parts = []
        for batch in in_batches(answers, self._shape):
            found = scorer.logprobs(trained, base, batch.arrays), *scorer.spread(trained, base, batch.arrays)
            parts.append((batch.arrays["target_mask"], batch.arrays[OLD_LOGPROBS], *found))
        return Agreement.of(*map(np.concatenate, zip(*parts, strict=True)))

    def landed(self, update: int, loss: float) -> None:
        """See `Source`."""
        if self._expected is not None and self._making is not None and math.isfinite(loss):
            self._making.certificate.trained(update, loss, self._expected)
        self._expected = None

    def ready_to_save(self, trained: Any, update: int) -> None:
        """See `Source`; measures how far the update moved the policy, and validates it, once each."""
        if self._making is None:
            return
        if self._made is not None and update == self._update:
            self._moved(trained, update)
        if self._making.validation.is_due(update):
            self._making.validation(self._making.collector, trained, self._making.base, update, self._making.report)

    def _moved(self, trained: Any, update: int) -> None:
        assert self._made is not None and self._making is not None
        arrays, mask = self._made.arrays, self._made.arrays["target_mask"]
        assert self._old is not None
        moved = (self._making.scorer.logprobs(trained, self._making.base, arrays) - self._old)[mask]
        self._made = self._old = None
        each = np.expm1(moved.astype(np.float64)) - moved  # never negative; its mean is KL(old ‖ new)
        kl = float(np.average(each, weights=arrays[COPIES][mask]))
        if math.isfinite(kl):  # otherwise the loop ends the run because of its loss
            self._making.report({"kl": kl}, update)
            self._making.certificate.moved(update, kl)

    def _ask(self, noted: list[int]) -> Iterator[Task]:
        """Yields prompts from the current position on, reordered in each pass; none twice in an update. Notes them."""
        while len(noted) < len(self._tasks):
            epoch, place = divmod(self._asked, len(self._tasks))
            order = np.random.default_rng((self._trainer.seed, epoch)).permutation(len(self._tasks))
            number = int(order[place])
            self._asked += 1
            if number not in noted:
                noted.append(number)
                yield self._tasks[number]

    def get_state(self) -> dict[str, Any]:
        """See `Source`."""
        waiting = [drawn.asked for drawn in self._waiting]
        return {
            "version": STATE_VERSION, "asked": self._asked, "update": self._update, "fingerprint": self.fingerprint,
            **({"adapter": self._adapter, "lag": self._waiting[0].lag, "waiting": waiting} if waiting else {}),
        }  # fmt: skip

    def set_state(self, state: dict[str, Any], allow: Collection[str] = ()) -> None:
        """See `Source`."""
        check_position(state, self.fingerprint, allow)
        self._asked, self._update = state["asked"], state["update"]
        self._adapter, self._lag = state.get("adapter", ""), state.get("lag", 0)
        self._left = state.get("waiting", [])

    def close(self) -> None:
        """See `Source`."""
        if self._making is not None:
            self._making.held.close()


def _shown(collected: Collected, collector: Collector) -> list[tuple[Any, ...]]:
    """The first answers, with the columns `COLUMNS`."""
    rows = []
    for group in collected.groups:
        for one, found in zip_longest(group.drawn, group.rewarded):
            verdict = (found.reward, found.kind) if found else (None, None)
            rows.append((group.task.prompt, collector.text(one), len(one.tokens), one.stopped, *verdict))
        if len(rows) >= SHOWN:
            break
    return rows[:SHOWN]


def _figures(collected: Collected, live: int, seconds: float) -> dict[str, float]:
    """For `metrics.jsonl`."""
    known = described(collected.groups)
    of_rewards: dict[str, float] = {name: known[name] for name in ("reward", "malformed") if name in known}
    if of_rewards:
        of_rewards["live_groups"] = live / len(collected.groups)
    return {
        **of_rewards,
        "entropy": known["entropy"],
        "answer_tokens": known["mean_tokens"],
        "truncated": known["truncated"] / known["answers"],
        "distinct": known["distinct"] / known["answers"],
        "rollout_seconds": seconds,
    }
