"""Which answers of an update an objective learns from, with which weights, and which loss the step must report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np

from gemma4_tpu.config.rollouts import RolloutsConfig
from gemma4_tpu.rollouts import advantages
from gemma4_tpu.rollouts.batch import Placed
from gemma4_tpu.rollouts.certificate import ExpectedLoss
from gemma4_tpu.rollouts.collecting import Group
from gemma4_tpu.step.grpo import ADVANTAGES, COPIES, OLD_LOGPROBS


@dataclass(frozen=True)
class Selection:
    """Which answers an objective learns from."""

    is_live: Callable[[Group], bool]
    """Whether a group has any."""
    placed: Callable[[Group], list[Placed]]
    """The answers of a live group to train on, each with its weight."""
    fields: Collection[str]
    """Fields of its batches besides those of every batch."""
    loss: Callable[[Mapping[str, np.ndarray]], ExpectedLoss] | None
    """The loss that the step must report for a batch drawn from the current policy; None: the answers do not determine
    it, so the trainer scores them token by token (`Scorer.divergences`) when it is compared with the sampler.
    """


def _policy_loss(arrays: Mapping[str, np.ndarray]) -> ExpectedLoss:
    """With every ratio 1: the mean advantage over all tokens, counting identical answers separately."""
    copies = np.where(arrays["target_mask"], arrays[COPIES], 0.0).astype(np.float64)
    gains = arrays[ADVANTAGES].astype(np.float64)
    return ExpectedLoss(-(copies * gains).sum() / copies.sum(), (copies * np.abs(gains)).sum() / copies.sum())


def _cross_entropy(arrays: Mapping[str, np.ndarray]) -> ExpectedLoss:
    """The mean of −log p over all tokens, as they were drawn."""
    return ExpectedLoss(-float(arrays[OLD_LOGPROBS][arrays["target_mask"]].mean(dtype=np.float64)), 1.0)


def by_advantage(config: RolloutsConfig, fields: Collection[str]) -> Selection:
    """Weighs answers by how much better than their group they are; uses groups whose rewards differ."""

    def rewards(group: Group) -> np.ndarray:
        return advantages.penalised(group.rewards, group.lengths, config)

    def placed(group: Group) -> list[Placed]:
        stopped = [one.stopped for one in group.drawn]
        tokens = [one.tokens for one in group.drawn]
        chosen = advantages.weighed(tokens, rewards(group), stopped, config)
        return [Placed(group.task, group.drawn[one.sample], one.advantage, one.copies) for one in chosen]

    # A group that masking empties has nothing to learn from either.
    return Selection(lambda g: advantages.is_live(rewards(g)) and bool(placed(g)), placed, fields, _policy_loss)


def by_reward(config: RolloutsConfig) -> Selection:
    """Uses answers with a reward above 0, each distinct one once; groups that have any."""

    def placed(group: Group) -> list[Placed]:
        good = [
            one
            for one, reward in zip(group.drawn, group.rewards, strict=True)
            if reward > 0 and (one.stopped or not config.mask_truncated)
        ]
        return [Placed(group.task, one) for one in {one.tokens.tobytes(): one for one in good}.values()]

    return Selection(lambda group: bool(placed(group)), placed, (), _cross_entropy)


def every_answer() -> Selection:
    """Uses all answers of all groups, each distinct one once with its count, truncated ones included."""

    def placed(group: Group) -> list[Placed]:
        alike = Counter(one.tokens.tobytes() for one in group.drawn)
        first = {one.tokens.tobytes(): one for one in reversed(group.drawn)}
        return [Placed(group.task, first[tokens], copies=copies) for tokens, copies in alike.items()]

    return Selection(lambda group: True, placed, (COPIES,), None)
