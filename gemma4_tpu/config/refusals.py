"""Problems of a configuration: collected, then refused together in one message."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gemma4_tpu.errors import UserError


@dataclass(frozen=True)
class Refusal:
    """Something for the user to put right."""

    message: str
    """Names the key, what was given, and what would work."""
    doubt: tuple[str, ...] = ()
    """Groups and keys whose values are not known because of it."""

    def clouds(self, message: str) -> bool:
        """Whether `message`, about the values that are left, speaks of something in doubt."""
        return any(re.search(rf"\b{re.escape(name)}\b", message) for name in self.doubt)


def refusal(problems: Sequence[Refusal]) -> UserError:
    """One error that tells every problem."""
    messages = list(dict.fromkeys(problem.message for problem in problems))
    if len(messages) == 1:
        return UserError(messages[0])
    return UserError("\n".join([f"{len(messages)} problems in the configuration:", *(f"  - {m}" for m in messages)]))
