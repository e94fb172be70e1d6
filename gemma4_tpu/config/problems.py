"""Problems of a configuration: collected, then refused together in one message."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gemma4_tpu.errors import UserError


@dataclass(frozen=True)
class Problem:
    """Something for the user to put right."""

    message: str
    """Names the key, what was given, and what would work."""
    groups: tuple[str, ...] = ()
    """Config groups whose values are in doubt because of it: checks across fields say nothing about these."""


def refusal(problems: Sequence[Problem]) -> UserError:
    """One error that tells every problem."""
    messages = list(dict.fromkeys(problem.message for problem in problems))
    if len(messages) == 1:
        return UserError(messages[0])
    return UserError("\n".join([f"{len(messages)} problems in the configuration:", *(f"  - {m}" for m in messages)]))
