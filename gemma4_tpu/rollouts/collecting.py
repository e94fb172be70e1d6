"""Collects the roll-outs of updates: draws them, judges them while others are drawn, stores them, and asks further
prompts until enough groups have something to learn from.
"""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np

from gemma4_tpu.errors import UserError
from gemma4_tpu.evals.generate import visible
from gemma4_tpu.evals.store import Key
from gemma4_tpu.rollouts.digest import digest
from gemma4_tpu.rollouts.on_policy_run import OnPolicyRun
from gemma4_tpu.rollouts.policy_tasks import Task
from gemma4_tpu.rollouts.rewarding import Answer, Reward, Rewarded
from gemma4_tpu.rollouts.sampler import Drawn, Sampler, Wanted
from gemma4_tpu.rollouts.stored import StoredUpdate
from gemma4_tpu.tracking.records import ROLLOUTS

log = logging.getLogger(__name__)

LEAST_SHARE = 0.25
"""Lower bound on the assumed share of live groups: a wave asks at most 1 / this times the missing prompts."""
WITHOUT_ANY = 4
"""Multiple of `rollouts.resample` that is asked before an update without any live group is abandoned."""


@dataclass(frozen=True)
class Group:
    """A prompt with its answers."""

    task: Task
    drawn: list[Drawn]
    rewarded: list[Rewarded]
    """Empty without a reward."""

    @cached_property
    def rewards(self) -> np.ndarray:
        """float64 [G]."""
        return np.array([one.reward for one in self.rewarded])

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [G], in tokens."""
        return np.array([len(one.tokens) for one in self.drawn])


@dataclass(frozen=True)
class Collected:
    """The roll-outs of an update."""

    groups: list[Group]
    """All groups asked, in order."""
    adapters: frozenset[str]
    """Digests of the trained values that the sampler received, or that stored samples were drawn with."""


class Collector:
    """Asks the policy and has its answers judged."""

    def __init__(
        self, sampler: Sampler, reward: Reward | None, tokenizer: Any, is_live: Callable[[Group], bool],
        run: OnPolicyRun,
    ):  # fmt: skip
        """Connects sampler and reward.

        Args:
          sampler: draws answers.
          reward: judges them; None: they are not judged, or process 0 alone judges.
          tokenizer: decodes tokens.
          is_live: whether a group has something to learn from.
          run: what to draw, and for which run.
        """
        self._sampler, self._reward, self._tokenizer, self._is_live = sampler, reward, tokenizer, is_live
        self._run, self._config = run, run.config

    def __call__(
        self, updates: Sequence[int], trained: Any, base: Any, tasks: Sequence[Iterator[Task]], adapter: str
    ) -> list[Collected]:  # fmt: skip
        """The roll-outs of some updates, all from one policy; those of one are judged while the next ones are drawn.

        Args:
          updates: from 1.
          trained: the policy's trained values.
          base: the frozen weights.
          tasks: for each update, the prompts to ask, as many as needed within bounds.
          adapter: digest of the values that the roll-outs are of; if not those of `trained`, all must be stored.

        Raises:
          UserError: none of many groups of an update has anything to learn from, or stored ones are missing.
        """
        may_draw = adapter == digest(trained)
        with ExitStack() as opened:
            asking = []
            for update, asked in zip(updates, tasks, strict=True):
                stored = StoredUpdate(self._run, update, adapter, any_model=not may_draw)
                asking.append(_Asking(update, asked, opened.enter_context(stored), may_draw))
            thread = opened.enter_context(ThreadPoolExecutor(1, thread_name_prefix="reward"))
            for one in asking:
                self._ask(one, trained, base, thread)
            return [self._collected(one, trained, base, thread) for one in asking]

    def _ask(self, one: _Asking, trained: Any, base: Any, thread: ThreadPoolExecutor) -> None:
        """Draws the next wave of an update, if it needs one."""
        config, live, asked = self._config, sum(map(self._is_live, one.groups)), len(one.groups)
        budget = int(config.resample * config.prompts)
        left = (budget if live else WITHOUT_ANY * budget) - asked
        if live >= config.prompts or left <= 0:
            return
        share = max(live / asked, LEAST_SHARE) if asked else 1.0
        size = min(math.ceil((config.prompts - live) / share), config.prompts, left)
        if wave := list(islice(one.tasks, size)):  # otherwise every task has been asked
            one.wave = self._drawn(one.update, trained, base, wave, one.store, thread, may_draw=one.may_draw)
            one.drawn_with |= one.wave.drawn_with

    def _collected(self, one: _Asking, trained: Any, base: Any, thread: ThreadPoolExecutor) -> Collected:
        """Waits for the verdicts of an update, and draws other groups instead of those with nothing to learn from."""
        while (wave := one.wave) is not None:
            one.wave = None
            one.groups += self._judged(wave)
            self._ask(one, trained, base, thread)
        if not any(map(self._is_live, one.groups)):
            raise UserError(_nothing_to_learn(one.update, one.groups))
        return Collected(one.groups, frozenset(one.drawn_with))

    def validated(self, update: int, trained: Any, base: Any, tasks: Sequence[Task]) -> list[Group]:
        """The policy's answers after `update` to prompts that are never trained on, always with the same seeds."""
        groups: list[Group] = []
        with (
            StoredUpdate(self._run, update, digest(trained), "validation_") as store,
            ThreadPoolExecutor(1, thread_name_prefix="reward") as thread,
        ):
            for start in range(0, len(tasks), self._config.prompts):
                some = tasks[start : start + self._config.prompts]
                groups += self._judged(self._drawn("validation", trained, base, some, store, thread))
        return groups

    def _drawn(
        self, when: int | str, trained: Any, base: Any, tasks: Sequence[Task], store: StoredUpdate,
        thread: ThreadPoolExecutor, *, may_draw: bool = True,
    ) -> _Wave:  # fmt: skip
        """The answers to some prompts, being judged in `thread`; stored answers and verdicts are reused.

        `when`: an update, or another value from which seeds are derived.
        """
        wave = _Wave(tasks, _Judging(self._reward, store, thread))
        missing = []
        for place, task in enumerate(tasks):
            for number in range(self._config.samples):
                key = task.name, number
                wanted = Wanted(place, number, sample_seed(self._run.seed, when, *key))
                if (known := store.drawn(key, wanted)) is not None:
                    wave.drawn[key] = known
                    wave.drawn_with.add(store.adapter)
                else:
                    missing.append(wanted)
        if missing and not may_draw:
            raise UserError(
                f"update {when}: {len(missing)} of its answers, which an earlier policy gave, are missing in"
                f" {self._run.folder / ROLLOUTS}; bring the folder back, or resume from an earlier checkpoint"
            )
        wave.judging.add([(key, self._answer(tasks[one.wanted.prompt], one)) for key, one in wave.drawn.items()])
        if missing:
            for one in self._sampler(trained, base, [task.ids for task in tasks], missing):
                task = tasks[one.wanted.prompt]
                key = task.name, one.wanted.sample
                wave.drawn[key] = one
                store.add_drawn(key, one)
                wave.judging.add([(key, self._answer(task, one))])
                self._run.progress()
            wave.drawn_with.add(self._sampler.drawn_from)
        return wave

    def _judged(self, wave: _Wave) -> list[Group]:
        """The groups of a wave, once their verdicts have come."""
        told = self._run.hosts.from_first(lambda: [[*key, vars(one)] for key, one in wave.judging.finish().items()])
        rewarded = {(name, number): Rewarded(**one) for name, number, one in told}
        self._run.progress()
        keys = [[(task.name, number) for number in range(self._config.samples)] for task in wave.tasks]
        return [
            Group(task, [wave.drawn[key] for key in of_task], [rewarded[key] for key in of_task if key in rewarded])
            for task, of_task in zip(wave.tasks, keys, strict=True)
        ]

    def _answer(self, task: Task, drawn: Drawn) -> Answer:
        return Answer(task, self.text(drawn), drawn.stopped)

    def text(self, drawn: Drawn) -> str:
        """An answer as a user would see it."""
        ids = drawn.tokens[:-1] if drawn.stopped else drawn.tokens
        text = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return visible(text, self._tokenizer)


@dataclass
class _Wave:
    """Prompts that were asked at the same time."""

    tasks: Sequence[Task]
    judging: _Judging
    drawn: dict[Key, Drawn] = field(default_factory=dict)
    drawn_with: set[str] = field(default_factory=set)
    """Digests of the values that the answers are of."""


@dataclass
class _Asking:
    """An update whose roll-outs are being collected."""

    update: int
    tasks: Iterator[Task]
    store: StoredUpdate
    may_draw: bool
    groups: list[Group] = field(default_factory=list)
    wave: _Wave | None = None
    """Answers whose verdicts have not been waited for."""
    drawn_with: set[str] = field(default_factory=set)


class _Judging:
    """Judges answers in a thread alongside decoding: while one batch is judged, the next one accumulates."""

    def __init__(self, reward: Reward | None, store: StoredUpdate, thread: ThreadPoolExecutor):
        self._reward, self._store, self._thread = reward, store, thread
        self._rewarded: dict[Key, Rewarded] = {}
        self._known: dict[tuple[str, str, bool], Rewarded] = {}
        self._gathered: list[tuple[Key, Answer]] = []
        self._under_way: Future[None] | None = None

    def add(self, answers: Sequence[tuple[Key, Answer]]) -> None:
        """Adds answers to judge, if there is a reward."""
        if self._reward is None:
            return
        self._gathered += answers
        if self._under_way is None or (self._under_way.done() and self._under_way.exception() is None):
            self._begin()  # what went wrong waits for `finish`, where all processes meet; what is drawn by then is kept

    def finish(self) -> dict[Key, Rewarded]:
        """Waits until all are judged."""
        while self._under_way is not None:
            self._begin()
        return self._rewarded

    def _begin(self) -> None:
        if self._under_way is not None:
            self._under_way.result()  # raises errors of the judge
            self._under_way = None
        if self._gathered:
            self._under_way = self._thread.submit(self._judge, self._gathered)
            self._gathered = []

    def _judge(self, answers: Sequence[tuple[Key, Answer]]) -> None:
        """Judges those that are not stored; identical answers to a prompt once."""
        alike: dict[tuple[str, str, bool], list[tuple[Key, Answer]]] = {}
        for key, answer in answers:
            same = answer.task.name, answer.text, answer.stopped
            if (stored := self._store.rewarded(key)) is not None:
                self._rewarded[key] = stored
                self._known.setdefault(same, stored)
            else:
                alike.setdefault(same, []).append((key, answer))
        new = [same for same in alike if same not in self._known]
        if new and self._reward is not None:
            found = self._reward([alike[same][0][1] for same in new])
            self._known |= dict(zip(new, found, strict=True))
        for same, several in alike.items():
            for key, _ in several:
                self._rewarded[key] = self._known[same]
                self._store.add_rewarded(key, self._known[same])


def sample_seed(seed: int, when: int | str, problem: str, sample: int) -> int:
    """A sample's own seed, below 2**32, so that there is no generator state to save."""
    return zlib.crc32(f"{seed}/{when}/{problem}/{sample}".encode())


def _nothing_to_learn(update: int, groups: Sequence[Group]) -> str:
    rewards = np.concatenate([group.rewards for group in groups])
    kinds: dict[str, int] = {}
    for group in groups:
        for one in group.rewarded:
            kinds[one.kind] = kinds.get(one.kind, 0) + 1
    cut = sum(not one.stopped for group in groups for one in group.drawn)
    most = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items(), key=lambda item: -item[1])[:4])
    return (
        f"update {update}: none of {len(groups)} prompts has answers with anything to learn from (mean reward"
        f" {rewards.mean():.3g}; {most}; {cut} of {len(rewards)} answers cut off at rollouts.new_tokens)."
        " Start from a policy that solves some (lora.start=<run>), or use other prompts, more rollouts.samples, or"
        " a graded reward"
    )
