"""What there is to `objective=`: the keys of each kind, the rows that it takes, its reference, what it tells.

No JAX here: the checks ask, too.
"""

from __future__ import annotations

from typing import NamedTuple

from gemma4_tpu.config.schema import ObjectiveConfig
from gemma4_tpu.data.forms import CONVERSATIONS, PAIRS


class Kind(NamedTuple):
    """One kind of objective."""

    keys: tuple[str, ...]
    """Of `ObjectiveConfig`; every other one is null."""
    rows: str
    """Of `data.forms`."""
    reference: bool = False
    """Whether what the run begins as is part of the loss."""
    measures: tuple[str, ...] = ()
    """What is told beside the loss; the first one also in lines of progress."""
    on_policy: bool = False
    """Whether it learns from its own answers (`rollouts=`); of the rows it takes their prompts."""


SFT = "sft"
_OF_PAIRS = ("accuracy", "margin", "chosen_logp", "rejected_logp")
_OF_ANSWERS = (
    "reward", "entropy", "malformed", "answer_tokens", "truncated", "distinct", "live_groups", "rollout_seconds",
)  # fmt: skip
KINDS = {
    SFT: Kind((), CONVERSATIONS),
    "dpo": Kind(("beta", "label_smoothing"), PAIRS, True, (*_OF_PAIRS, "chosen_reward", "rejected_reward")),
    "ipo": Kind(("beta",), PAIRS, True, (*_OF_PAIRS, "chosen_reward", "rejected_reward")),
    "orpo": Kind(("beta",), PAIRS, False, _OF_PAIRS),
    "grpo": Kind(
        ("clip_low", "clip_high", "max_drift"), CONVERSATIONS, False, (*_OF_ANSWERS, "clipped", "drifted"), True
    ),
    "expert_iteration": Kind((), CONVERSATIONS, False, _OF_ANSWERS, True),
}


def rows_of(objective: ObjectiveConfig) -> str:
    """The kind of rows that an objective takes, one of `data.forms`."""
    return KINDS[objective.kind].rows


def every_measure() -> list[str]:
    """Of all kinds."""
    return list(dict.fromkeys(name for kind in KINDS.values() for name in kind.measures))
