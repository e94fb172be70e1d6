"""Small files that are either complete or absent: atomic writes and strict JSON, without secrets."""

from __future__ import annotations

import dataclasses
import glob
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gemma4_tpu.redact import redact, redactor

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def write_text(path: Path, text: str) -> None:
    """Writes through a temporary neighbour and a rename: a reader, or a restart after `kill -9`, never sees half.

    Removes the neighbours of writers that were killed. Secrets are blanked (`gemma4_tpu.redact`).
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        _remove_if_left(left)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(redact(text))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _remove_if_left(temporary: Path) -> None:
    pid = temporary.name.split(".")[-2]
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        temporary.unlink(missing_ok=True)
    except (ValueError, PermissionError):  # not a file of ours, or a process of another user
        return


def write_json(path: Path, value: Any) -> None:
    """Writes `value` (see `jsonable`) as indented strict JSON, atomically."""
    write_text(path, json.dumps(jsonable(value), indent=2, allow_nan=False) + "\n")


def write_compact_json(path: Path, value: Any) -> None:
    """As `write_json`, on one line: for many numbers."""
    write_text(path, json.dumps(jsonable(value), allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The inverse of `write_json`, NaN and the infinities included."""
    return from_jsonable(json.loads(path.read_text(encoding="utf-8")))


def jsonable(value: Any) -> Any:
    """Plain JSON values: dataclasses become objects, arrays lists, NaN and the infinities the strings
    `NaN`, `Infinity` and `-Infinity`, since strict JSON has no other word for them. Secrets are blanked: whatever
    records and trackers are given has gone through here.

    Raises:
      TypeError: a value of any other type; guessing (by `str`) would hide a mistake.
    """
    return _plain(value, redactor(), _strict)


def plain(value: Any) -> Any:
    """As `jsonable`, with floats as they are: for trackers, which know NaN, and to which a text `NaN` is a text."""
    return _plain(value, redactor(), float)


def _strict(number: float) -> float | str:
    return number if math.isfinite(number) else json.dumps(number)


def _plain(value: Any, blank: Callable[[str], str], number: Callable[[float], float | str]) -> Any:
    match value:
        case str():
            return blank(value)
        case None | bool() | int():
            return value
        case float():
            return number(value)
        case dict():
            return {blank(str(key)): _plain(item, blank, number) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item, blank, number) for item in value]
        case Path():
            return blank(str(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value), blank, number)
    if hasattr(value, "tolist"):  # NumPy and JAX scalars and arrays
        return _plain(value.tolist(), blank, number)
    raise TypeError(f"cannot write {type(value).__name__} as JSON: {value!r}")


def from_jsonable(value: Any) -> Any:
    """Converts the three strings for non-finite numbers back to floats, at any depth."""
    match value:
        case str():
            return _NOT_FINITE.get(value, value)
        case dict():
            return {key: from_jsonable(item) for key, item in value.items()}
        case list():
            return [from_jsonable(item) for item in value]
    return value
