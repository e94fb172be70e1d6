"""Keeps secrets out of everything that a run writes about itself."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

_SECRET_NAME = re.compile(r"(^|_)(TOKEN|KEY|APIKEY|SECRET|PASSWORD|PASSWD)(_|$)", re.IGNORECASE)
_MIN_SECRET_CHARACTERS = 8  # shorter values, such as KEY=1, are no secrets and would blank out ordinary words
_KNOWN_FORMS = re.compile(
    r"hf_[A-Za-z0-9]{20,}|wandb_v1_\w{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|sk-[\w-]{20,}"
    r"|AIza[\w-]{30,}|ya29\.[\w.-]{20,}|AKIA[A-Z0-9]{16}"
)
_NAMED = r"(?:[\w-]*[_-])?(?:token|api[_-]?key|secret|password|passwd)"
_ASSIGNMENT = re.compile(rf"(?i)(\b{_NAMED}[\"']?\s*[=:]\s*)[^\s,]+")
_OPTION = re.compile(rf"(?i)--?{_NAMED}")
_URL_LOGIN = re.compile(r"(\w+://)[^/\s@]+@")


def redact(text: str) -> str:
    """Replaces secrets by `***`: values of environment variables whose names say token, key, secret or password,
    strings in the form of a well-known provider's key, and logins inside URLs.
    """
    for name, value in os.environ.items():
        if len(value) >= _MIN_SECRET_CHARACTERS and _SECRET_NAME.search(name):
            text = text.replace(value, "***")
    return _URL_LOGIN.sub(r"\1***@", _KNOWN_FORMS.sub("***", text))


def redact_arguments(arguments: Sequence[str]) -> list[str]:
    """Like `redact`, and blanks the values of arguments such as `--api-key=…`, `--api-key …` or `hub_token=…`."""
    before = ["", *arguments]
    return [
        "***" if _OPTION.fullmatch(previous) else _ASSIGNMENT.sub(r"\1***", redact(argument))
        for previous, argument in zip(before, arguments, strict=False)
    ]
