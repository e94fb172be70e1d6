"""Problems in a configuration, collected and then refused in one message."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gemma4_tpu.errors import UserError


@dataclass(frozen=True)
class Refusal:
    """A problem for the user to fix."""

    message: str
    """Names the key, what was given, and what would work."""
    doubt: tuple[str, ...] = ()
    """Groups and keys whose values are unknown because of it."""

    def clouds(self, message: str) -> bool:
        """Whether `message`, about the remaining values, concerns something in doubt."""
        return any(re.search(rf"\b{re.escape(name)}\b", message) for name in self.doubt)


def resume_allow(already: Iterable[str], more: Iterable[str]) -> str:
    """The word that makes a resumed run accept `more` differences, besides those that it `already` accepts."""
    return f"checkpoint.resume_allow=[{','.join(dict.fromkeys([*already, *more]))}]"


def refusal(problems: Sequence[Refusal]) -> UserError:
    """One error that lists every problem."""
    messages = list(dict.fromkeys(problem.message for problem in problems))
    if len(messages) == 1:
        return UserError(messages[0])
    return UserError("\n".join([f"{len(messages)} problems in the configuration:", *(f"  - {m}" for m in messages)]))
