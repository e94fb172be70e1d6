"""From rewards to what each sample weighs in the loss: groups, their means, and what is left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gemma4_tpu.config.rollouts import RolloutsConfig

MEAN, STD = "mean", "std"
_SMALLEST_STD = 1e-6
"""A group's rewards that differ by less are the same."""


@dataclass(frozen=True)
class Weighed:
    """A sample that is trained on."""

    sample: int
    """Its place in the group; of several equal ones, the first."""
    advantage: float
    """Of one of them."""
    copies: int
    """How many samples of the group it stands for; each counts in the loss and in what it is divided by."""


def is_live(rewards: np.ndarray) -> bool:
    """Whether a group's rewards differ: one that has none to prefer carries no signal."""
    return float(rewards.std()) > _SMALLEST_STD


def penalised(rewards: np.ndarray, lengths: np.ndarray, config: RolloutsConfig) -> np.ndarray:
    """Rewards [G] less what answers of `lengths` [G] tokens lose in the last `overlong_tokens` before the limit.

    Nothing where that range begins, `overlong_penalty` at the limit, linear between; in tokens, as the limit is.
    """
    if not config.overlong_tokens:
        return rewards
    begins = config.new_tokens - config.overlong_tokens
    return rewards - config.overlong_penalty * np.clip((lengths - begins) / config.overlong_tokens, 0.0, 1.0)


def advantages(rewards: np.ndarray, kind: str) -> np.ndarray:
    """[G] rewards less their mean, and by `std` over their standard deviation, too."""
    centred = rewards - rewards.mean()
    return centred / (rewards.std() + _SMALLEST_STD) if kind == STD else centred


def weighed(
    tokens: Sequence[np.ndarray], rewards: np.ndarray, stopped: Sequence[bool], config: RolloutsConfig
) -> list[Weighed]:
    """What of a live group is trained on: equal samples once, with their number; cut-off ones not at all.

    The mean is over all samples of the group, cut-off ones included: their reward is what the policy got.

    Args:
      tokens: [G] ids of each answer.
      rewards: [G] penalised.
      stopped: [G] False: cut off.
      config: `advantages`, `mask_truncated`.
    """
    values = advantages(rewards, config.advantages)
    first: dict[tuple[bytes, float], int] = {}
    copies: dict[int, int] = {}
    for i, ids in enumerate(tokens):
        if config.mask_truncated and not stopped[i]:
            continue
        # Equal answers may be rewarded differently, by a reward that draws lots; then they are not one.
        at = first.setdefault((ids.tobytes(), float(values[i])), i)
        copies[at] = copies.get(at, 0) + 1
    return [Weighed(i, float(values[i]), n) for i, n in copies.items()]
