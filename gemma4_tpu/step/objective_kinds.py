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
    taught: bool = False
    """Whether a teacher (`objective.teacher`) says what to learn at each token."""

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
do all that the teacher does."""
MAY_BE_NULL = ("teacher", "teacher_model")
"""Keys that a kind may have without a value; a teacher is asked for with what would be one."""
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
    """Of all kinds."""
    return list(dict.fromkeys(name for kind in KINDS.values() for name in kind.measures))
