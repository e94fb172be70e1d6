"""Keeps secrets out of everything that a command writes or prints: the one place that knows what a secret looks like.

Files, records, trackers, logs and refusals come through here (`tracking/files.py`, `tracking/logs.py`, `errors.py`);
a test plants secrets wherever a user could put one and searches everything that is left.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence

_SECRET_NAME = re.compile(
    r"(^|_)(TOKEN|(KEY|APIKEY|SECRET|PASS|PASSWORD|PASSWD|PASSPHRASE|PAT|CREDENTIAL)S?)(_|$)"  # HF_TOKEN, DB_PASS
    r"|(TOKEN|APIKEY|ACCESSKEY|SECRET|SSHPASS|PASSWORD|PASSWD|_PWD|CONNECTION_STRING)$"  # PGPASSWORD, accessToken
    r"|(API|ACCESS|AUTH|HF)_?TOKENS$",  # unlike MAX_TOKENS
    re.IGNORECASE,
)
_MIN_SECRET_CHARACTERS = 8  # shorter values, such as KEY=1, are no secrets and would blank out ordinary words
_KNOWN_FORMS = re.compile(
    r"hf_[A-Za-z0-9]{20,}|wandb_v1_\w{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|sk-[\w-]{20,}"
    r"|AIza[\w-]{30,}|ya29\.[\w.-]{20,}|A[KS]IA[A-Z0-9]{16}|glpat-[\w-]{20,}|xox[abeprs]-[\w-]{10,}|npm_[A-Za-z0-9]{36}"
    r"|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]+|(?<=hooks\.slack\.com/services/)[\w/]{20,}|AccountKey=[\w+/=]{20,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
)
_NAMED = r"(?:[\w-]*[_-])?(?:token|api[_-]?key|secret|password|passwd|signature)"
_ASSIGNMENT = re.compile(rf"(?i)(\b{_NAMED}[\"']?\s*[=:]\s*)[^\s,]+")
_OPTION = re.compile(rf"(?i)--?{_NAMED}")
_URL_LOGIN = re.compile(r"(\w+://)[^/\s@\"'<>]+@")
_URL_QUERY = re.compile(rf"(?i)([?&](?:{_NAMED}|sig)=)[^&\s\"'<>]+")
_HEADER = re.compile(r"(?i)(\bbearer\s+|\bauthorization[\"']?\s*[=:]\s*[\"']?(?:basic\s+)?)[\w.~+/=-]{16,}")


def is_secret_name(name: str) -> bool:
    """Whether an environment variable of this name holds what nobody else should see."""
    return bool(_SECRET_NAME.search(name))


def is_secret(name: str, value: str) -> bool:
    """Whether an environment variable holds a secret; the place of a key (`SSH_KEY_FILE`) is none."""
    return len(value) >= _MIN_SECRET_CHARACTERS and is_secret_name(name) and not os.path.exists(value)


def redact(text: str) -> str:
    """Replaces secrets by `***`: values of environment variables whose names say token, key, secret or password,
    strings in the form of a well-known provider's key, logins and secret parameters inside URLs, and
    `Authorization` headers.
    """
    return redactor()(text)


def redactor() -> Callable[[str], str]:
    """`redact` for many texts, with the environment as it is now."""
    held = [value for name, value in os.environ.items() if is_secret(name, value)]
    values = re.compile("|".join(map(re.escape, sorted(held, key=len, reverse=True)))) if held else None

    def blank(text: str) -> str:
        if len(text) < _MIN_SECRET_CHARACTERS:
            return text
        if values is not None:
            text = values.sub("***", text)
        text = _KNOWN_FORMS.sub("***", text)
        text = _URL_QUERY.sub(r"\1***", _URL_LOGIN.sub(r"\1***@", text)) if "://" in text else text
        return _HEADER.sub(r"\1***", text)

    return blank


def redact_arguments(arguments: Sequence[str]) -> list[str]:
    """Like `redact`, and blanks the values of arguments such as `--api-key=…`, `--api-key …` or `hub_token=…`."""
    before, blank = ["", *arguments], redactor()
    return [
        "***" if _OPTION.fullmatch(previous) else _ASSIGNMENT.sub(r"\1***", blank(argument))
        for previous, argument in zip(before, arguments, strict=False)
    ]
