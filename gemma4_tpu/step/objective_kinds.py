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


SFT = "sft"
_OF_PAIRS = ("accuracy", "margin", "chosen_logp", "rejected_logp")
KINDS = {
    SFT: Kind((), CONVERSATIONS),
    "dpo": Kind(("beta", "label_smoothing"), PAIRS, True, (*_OF_PAIRS, "chosen_reward", "rejected_reward")),
}


def rows_of(objective: ObjectiveConfig) -> str:
    """The kind of rows that an objective takes, one of `data.forms`."""
    return KINDS[objective.kind].rows


def every_measure() -> list[str]:
    """Of all kinds."""
    return list(dict.fromkeys(name for kind in KINDS.values() for name in kind.measures))
