"""Types of plain values, checked as a file is read, so that whatever follows may rely on them.

A shape is a function from (value, its dotted key) to a complaint, or to None if the value has the shape. Mappings may
have keys that their shape doesn't mention: later versions add keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

Shape = Callable[[Any, str], str | None]
"""(value, dotted key) → what is wrong, as `hours.low is 'x', not a number`; None: nothing."""
_LARGEST = 2.0**63
_SHOWN_CHARACTERS = 40


def leaf(words: str, test: Callable[[Any], bool]) -> Shape:
    """Values that pass a test; `words` say what is expected."""
    return lambda value, key: None if test(value) else f"{key or 'the file'} {_given(value)}, not {words}"


def _given(value: Any) -> str:
    """A value in a complaint: containers by their type, since they may be large."""
    match value:
        case None:
            return "is null"
        case dict():
            return "is a mapping"
        case list():
            return "is a list"
    text = repr(value)
    return f"is {text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + '…'}"


def _is_number(value: Any) -> bool:
    """Numbers that a float can hold; NaN and the infinities are numbers."""
    return isinstance(value, float) or _is_whole(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < _LARGEST


ANYTHING: Shape = leaf("anything", lambda value: True)
TEXT = leaf("text", lambda value: isinstance(value, str))
FLAG = leaf("true or false", lambda value: isinstance(value, bool))
WHOLE = leaf("a whole number", _is_whole)
COUNT = leaf("a count", lambda value: _is_whole(value) and value >= 0)
NUMBER = leaf("a number", _is_number)
FINITE = leaf("a finite number", lambda value: _is_number(value) and math.isfinite(value))
AMOUNT = leaf("a number that is not negative", lambda value: _is_number(value) and 0 <= value < math.inf)
POSITIVE = leaf("a number above 0", lambda value: _is_number(value) and 0 < value < math.inf)
_MAPPING = leaf("a mapping", lambda value: isinstance(value, dict))


def choice(*names: str) -> Shape:
    """One of these words."""
    return leaf(f"one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names)


def maybe(shape: Shape) -> Shape:
    """The same, or null."""
    return lambda value, key: None if value is None else shape(value, key)


def either(*shapes: Shape) -> Shape:
    """Any one of several; the complaint is the last one's."""

    def check(value: Any, key: str) -> str | None:
        told = None
        for shape in shapes:
            if (told := shape(value, key)) is None:
                return None
        return told

    return check


def both(*shapes: Shape) -> Shape:
    """All of several; the complaint is the first one."""
    return lambda value, key: next((told for shape in shapes if (told := shape(value, key))), None)


def listed(shape: Shape) -> Shape:
    """A list of values of one shape."""

    def check(value: Any, key: str) -> str | None:
        if not isinstance(value, list):
            return f"{key} {_given(value)}, not a list"
        return next((told for i, one in enumerate(value) if (told := shape(one, f"{key}[{i}]"))), None)

    return check


def each(shape: Shape) -> Shape:
    """A mapping with values of one shape, under any keys."""

    def check(value: Any, key: str) -> str | None:
        if told := _MAPPING(value, key):
            return told
        return next((told for name, one in value.items() if (told := shape(one, _below(key, name)))), None)

    return check


def fields(needed: Mapping[str, Shape], known: Mapping[str, Shape] | None = None) -> Shape:
    """A mapping that has all `needed` keys; those `known` may be missing."""
    shapes = {**needed, **(known or {})}

    def check(value: Any, key: str) -> str | None:
        if told := _MAPPING(value, key):
            return told
        for name, shape in shapes.items():
            if name not in value:
                if name in needed:
                    return f"{_below(key, name)} is missing"
            elif told := shape(value[name], _below(key, name)):
                return told
        return None

    return check


def known(**shapes: Shape) -> Shape:
    """A mapping whose keys may all be missing."""
    return fields({}, shapes)


def when(test: Callable[[dict[str, Any]], Any], then: Shape, otherwise: Shape = ANYTHING) -> Shape:
    """A mapping that has one of two shapes, as a test of it says."""

    def check(value: Any, key: str) -> str | None:
        return _MAPPING(value, key) or (then if test(value) else otherwise)(value, key)

    return check


def of_one(shape: Shape, names: str) -> dict[str, Shape]:
    """One shape for several keys, separated by spaces."""
    return dict.fromkeys(names.split(), shape)


def _below(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)
