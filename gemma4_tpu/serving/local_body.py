"""A request's body as the embedded server reads it: bytes, JSON, a form of `local_protocol`; and OpenAI's errors."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

BODY_BYTES = 32 * 2**20
"""Limit for a request."""
DEEPEST = 100
"""Maximal nesting of lists and objects in a body."""
Form = TypeVar("Form", bound=BaseModel)


class ApiError(Exception):
    """Becomes `{"error": …}`."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def plain(self) -> dict[str, Any]:
        """In OpenAI's format."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def read_request(form: type[Form], body: bytes) -> Form:
    """Parses the body of a POST.

    Raises:
      ApiError: it is not JSON, contains text that is not Unicode, or does not match the schema.
    """
    try:
        value = read_json(body)
    except ValueError as error:
        raise ApiError(400, f"the body is not readable JSON: {error}") from None
    try:
        return form.model_validate(value)
    except ValidationError as error:
        place, told = _problem(value, error)
        raise ApiError(400, f"{place or 'body'}: {told}", param=place) from None


def _problem(value: Any, error: ValidationError) -> tuple[str | None, str]:
    """Where a body doesn't match, and why. Of a key that can have several forms: by the form that it resembles most."""
    errors = error.errors(include_url=False, include_input=False)
    found = [
        (_keys(value, one["loc"], missing=one["type"] == "missing"), one["msg"].removeprefix("Value error, "))
        for one in errors
        if one["loc"][:1] == errors[0]["loc"][:1]
    ]
    place = max((keys for keys, _ in found), key=len)
    told = dict.fromkeys(message for keys, message in found if keys == place)
    return ".".join(map(str, place)) or None, "; or: ".join(told)


def _keys(value: Any, location: tuple[int | str, ...], *, missing: bool) -> tuple[int | str, ...]:
    """Keys of the body; pydantic's location also contains the names of forms. `missing`: the last key is."""
    keys: list[int | str] = []
    for part in location[:-1] if missing else location:
        if (isinstance(value, dict) and part in value) or (isinstance(value, list) and part in range(len(value))):
            value = value[part]  # type: ignore[index]
            keys.append(part)
    return (*keys, location[-1]) if missing else tuple(keys)


def read_json(text: str | bytes) -> Any:
    """Raises `ValueError` for anything that is not JSON, nests too deeply, or contains text that is not Unicode."""
    try:
        value = json.loads(text, parse_constant=_no_number)
    except RecursionError:
        raise ValueError(f"more than {DEEPEST} levels") from None
    level = [value]
    for _ in range(DEEPEST + 1):
        holders = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level = [item for holder in holders for item in holder]
    if level:
        raise ValueError(f"more than {DEEPEST} levels")
    try:  # a tokenizer cannot read half of a surrogate pair
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("a lone surrogate, which is not a character") from None
    return value


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


async def whole_body(request: Request) -> bytes:
    """Raises `ApiError` if the body is not declared as JSON, or too large."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        told = f"the content-type is {kind}" if kind else "there is no content-type"
        raise ApiError(415, f"{told}; send application/json")
    body = bytearray()
    try:
        async for piece in request.stream():
            body += piece
            if len(body) > BODY_BYTES:
                raise ApiError(413, f"the body has more than {BODY_BYTES} bytes")
    except ClientDisconnect:
        raise ApiError(400, "the client left before the end of the body") from None
    return bytes(body)
