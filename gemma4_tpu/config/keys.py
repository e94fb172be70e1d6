"""Keys of the configuration: walks the schema, reads its documentation, and suggests corrections.

Types come from the dataclasses of this folder (`schema.py`), documentation from the strings below their fields.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from functools import cache
from itertools import pairwise
from typing import Any


@cache
def field_types(schema: type) -> dict[str, Any]:
    """Field name → type of a schema dataclass."""
    return typing.get_type_hints(schema)


@cache
def field_docs(schema: type) -> dict[str, str]:
    """Field name → the string below it, on one line; includes inherited fields."""
    docs: dict[str, str] = {}
    for parent in reversed([base for base in schema.__mro__ if is_dataclass(base)]):
        docs |= _own_docs(parent)
    return docs


def _own_docs(schema: type) -> dict[str, str]:
    (definition,) = ast.parse(inspect.getsource(schema)).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for field, text in pairwise(definition.body):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str):
            docs[field.target.id] = " ".join(text.value.value.split())
    return docs


def is_group(annotation: Any) -> bool:
    """Whether a type of the schema has its own keys."""
    return isinstance(annotation, type) and is_dataclass(annotation)


def is_mapping(annotation: Any) -> bool:
    """Whether a type contains names and values that the schema does not list, as `hardware.compiler_options` does."""
    return typing.get_origin(annotation) is dict


def element_type(annotation: Any) -> Any | None:
    """The element type of a `list[...]` (also of `list[...] | None`); None for anything else."""
    for option in _options(annotation):
        if typing.get_origin(option) is list:
            return typing.get_args(option)[0]
    return None


def type_name(annotation: Any) -> str:
    """A type as written in the help: `int or null`, `list of str`."""
    names = []
    for option in _options(annotation):
        element = element_type(option)
        if element is not None:
            names.append(f"list of {type_name(element)}")
        else:
            names.append("null" if option is type(None) else option.__name__)
    return " or ".join(names)


def leaf_keys(schema: type, prefix: str = "") -> list[str]:
    """Every key that has a value, dotted: `lora.rank`."""
    keys = []
    for name, annotation in field_types(schema).items():
        if is_group(annotation):
            keys += leaf_keys(annotation, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def unknown_key(schema: type, key: str) -> str | None:
    """None if `key` (dotted, list items by number) is in the schema, else the problem with a suggestion."""
    where: Any = schema
    walked = ""
    for part in key.split("."):
        if is_group(where):
            if part not in field_types(where):
                return _no_such_key(schema, where, walked, part, key)
            where = field_types(where)[part]
        elif element_type(where) is not None and part.isdecimal():
            where = element_type(where)
        elif is_mapping(where):
            return f"no such key; give {walked} as a whole: '{walked}={{{part}: …}}'"
        else:
            return f"no such key; {walked} is {type_name(where)} and has no keys"
        walked = f"{walked}.{part}" if walked else part
    return None


def type_at(schema: type, key: str) -> Any:
    """The type of a key (dotted, list items by number) that is in the schema."""
    where: Any = schema
    for part in key.split("."):
        where = field_types(where)[part] if is_group(where) else element_type(where)
    return where


MUCH_NEARER = 0.1
"""Least similarity for a suggestion: `rnk` has .86 with `rank` and .75 with `ranks`."""


def nearest(given: str, candidates: Iterable[str]) -> list[str]:
    """At most two candidates that `given` may mean; one if it is much closer than the next."""
    plain = {re.sub(r"[^a-z0-9.]", "", candidate.lower()): candidate for candidate in candidates}
    wanted = re.sub(r"[^a-z0-9.]", "", given.lower())
    if wanted in plain:
        return [plain[wanted]]
    near = difflib.get_close_matches(wanted, plain, n=2, cutoff=0.6)
    ratios = [difflib.SequenceMatcher(None, candidate, wanted).ratio() for candidate in near]
    return [plain[candidate] for candidate, ratio in zip(near, ratios, strict=True) if ratio > ratios[0] - MUCH_NEARER]


def did_you_mean(given: str, candidates: Iterable[str], write: Callable[[str], str] = str) -> str:
    """`; did you mean X or Y?` for the closest candidates, else an empty string."""
    near = nearest(given, candidates)
    return f"; did you mean {' or '.join(write(name) for name in near)}?" if near else ""


def _no_such_key(schema: type, where: type, walked: str, part: str, key: str) -> str:
    leaves = leaf_keys(schema)
    siblings = [field.name for field in fields(where)]
    namesakes = [leaf for leaf in leaves if leaf.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    meant = [f"{walked}.{name}" for name in nearest(part, siblings)] if walked else []
    meant = meant or (namesakes if len(namesakes) == 1 else nearest(key, leaves)) or nearest(part, siblings)
    if meant:
        return f"no such key; did you mean {' or '.join(meant)}?"
    return f"no such key; {walked or 'the configuration'} has {', '.join(siblings)}"


def _options(annotation: Any) -> tuple[Any, ...]:
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return typing.get_args(annotation)
    return (annotation,)
