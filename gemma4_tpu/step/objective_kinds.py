"""The kinds of `objective=`: their keys, the rows they take, their reference, and what they report.

Imports no JAX, because the checks use it.
"""

from __future__ import annotations

from typing import NamedTuple

from gemma4_tpu.config.schema import ObjectiveConfig
from gemma4_tpu.data.forms import CONVERSATIONS, PAIRS


class Kind(NamedTuple):
    """One kind of objective."""

    keys: tuple[str, ...]
    """Keys of `ObjectiveConfig` that it uses; all others must be null."""
    rows: str
    """Of `data.forms`."""
    reference: bool = False
    """Whether the loss involves the model that the run starts from."""
    measures: tuple[str, ...] = ()
    """What it reports besides the loss; the first one also appears in progress lines."""
    on_policy: bool = False
    """Whether it learns from its own answers (`rollouts=`); it then uses only the prompts of rows."""
    taught: bool = False
    """Whether a teacher (`objective.teacher`) provides the target at each token."""

    @property
    def rewarded(self) -> bool:
        """Whether its answers need a reward."""
        return self.on_policy and not self.taught


SFT = "sft"
_OF_PAIRS = ("accuracy", "margin", "chosen_logp", "rejected_logp")
_OF_ANSWERS = ("entropy", "answer_tokens", "truncated", "distinct", "rollout_seconds")
_OF_REWARDS = ("reward", "malformed", "live_groups")
_TEACHING = ("teacher", "teacher_model", "teacher_checkpoint", "divergence")
REVERSE, FORWARD = "reverse", "forward"
"""KL(student ‖ teacher), which makes a student do only what the teacher does, and KL(teacher ‖ student), which makes it
do everything that the teacher does.
"""
MAY_BE_NULL = ("teacher", "teacher_model")
"""Keys that a kind can leave null; asking for a teacher without naming one is refused elsewhere."""
KINDS = {
    SFT: Kind((), CONVERSATIONS),
    "dpo": Kind(("beta", "label_smoothing"), PAIRS, True, (*_OF_PAIRS, "chosen_reward", "rejected_reward")),
    "ipo": Kind(("beta",), PAIRS, True, (*_OF_PAIRS, "chosen_reward", "rejected_reward")),
    "orpo": Kind(("beta",), PAIRS, False, _OF_PAIRS),
    "grpo": Kind(
        ("clip_low", "clip_high", "max_drift"), CONVERSATIONS,
        measures=(*_OF_REWARDS, *_OF_ANSWERS, "clipped", "drifted"), on_policy=True,
    ),
    "expert_iteration": Kind((), CONVERSATIONS, measures=(*_OF_REWARDS, *_OF_ANSWERS), on_policy=True),
    "distill": Kind(_TEACHING, CONVERSATIONS, measures=_OF_ANSWERS, on_policy=True, taught=True),
    "distill_offline": Kind((*_TEACHING, "teacher_top", "teacher_store"), CONVERSATIONS, taught=True),
}  # fmt: skip


def rows_of(objective: ObjectiveConfig) -> str:
    """The kind of rows that an objective takes, one of `data.forms`."""
    return KINDS[objective.kind].rows


def every_measure() -> list[str]:
    """Measures of all kinds."""
    return list(dict.fromkeys(name for kind in KINDS.values() for name in kind.measures))
