"""Converts rewards to the weight of each sample in the loss: groups, their means, and what is omitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gemma4_tpu.config.rollouts import RolloutsConfig

MEAN, STD = "mean", "std"
_SMALLEST_STD = 1e-6
"""Rewards of a group that differ by less count as equal."""


@dataclass(frozen=True)
class Weighed:
    """A sample that is trained on."""

    sample: int
    """Its index in the group; of several identical samples, the first."""
    advantage: float
    """Advantage of one copy."""
    copies: int
    """How many identical samples of the group it represents; each copy counts in the loss and in its denominator."""


def is_live(rewards: np.ndarray) -> bool:
    """Whether a group's rewards differ; without differences there is no signal."""
    return float(rewards.std()) > _SMALLEST_STD


def penalised(rewards: np.ndarray, lengths: np.ndarray, config: RolloutsConfig) -> np.ndarray:
    """Rewards [G] minus the penalty for answers of `lengths` [G] tokens that reach into the last `overlong_tokens`
    before the limit.

    The penalty is zero where that range begins, `overlong_penalty` at the limit, and linear in between, in tokens.
    """
    if not config.overlong_tokens:
        return rewards
    begins = config.new_tokens - config.overlong_tokens
    return rewards - config.overlong_penalty * np.clip((lengths - begins) / config.overlong_tokens, 0.0, 1.0)


def advantages(rewards: np.ndarray, kind: str) -> np.ndarray:
    """Rewards [G] minus their mean; with `std`, also divided by their standard deviation."""
    centred = rewards - rewards.mean()
    return centred / (rewards.std() + _SMALLEST_STD) if kind == STD else centred


def weighed(
    tokens: Sequence[np.ndarray], rewards: np.ndarray, stopped: Sequence[bool], config: RolloutsConfig
) -> list[Weighed]:
    """Selects what to train on in a live group: identical samples once, with their count, and truncated ones not at
    all.

    The mean covers all samples of the group, truncated ones included, because it estimates the policy's expected
    reward.

    Args:
      tokens: [G] ids of each answer.
      rewards: [G] penalised.
      stopped: [G] False: truncated.
      config: `advantages`, `mask_truncated`.
    """
    values = advantages(rewards, config.advantages)
    first: dict[tuple[bytes, float], int] = {}
    copies: dict[int, int] = {}
    for i, ids in enumerate(tokens):
        if config.mask_truncated and not stopped[i]:
            continue
        # A stochastic reward can differ between identical answers, which are then kept apart.
        at = first.setdefault((ids.tobytes(), float(values[i])), i)
        copies[at] = copies.get(at, 0) + 1
    return [Weighed(i, float(values[i]), n) for i, n in copies.items()]
