"""Expands short words about lists of groups, such as `data.train`, to the full form that Hydra requires.

A string in such a list stands for the group's first field (`data.train=[a.jsonl,b.jsonl]`), and an item just past the
end of a list is appended to it (`data.heldout.0.path=…` if there is none).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gemma4_tpu.config.keys import element_type, is_group, type_at, unknown_key


def in_full(word: str, override: Override, schema: type) -> str:
    """The word, with strings in a list of groups expanded to the groups that they stand for."""
    if override.is_sweep_override() or override.is_delete():
        return word
    key, value = word.partition("=")[0], override.value()
    if isinstance(value, str) and (item := _group_of(schema, override.key_or_group.rpartition(".")[0])) is not None:
        return word if unknown_key(schema, override.key_or_group) else as_word(f"{key}.{fields(item)[0].name}", value)
    group = _group_of(schema, override.key_or_group)
    if group is None:
        return word
    items = value if isinstance(value, list) else [value]
    if not any(isinstance(item, str) for item in items):
        return word
    first = fields(group)[0].name
    return as_word(key, [{first: item} if isinstance(item, str) else item for item in items])


def extended(words: Sequence[str], schema: type, compose: Callable[[list[str]], DictConfig]) -> list[str]:
    """The words, with those about items past the end of a list replaced by one word for the whole list.

    Args:
      words: valid words of a command line.
      schema: that of its root.
      compose: composes the configuration of some of the words, for the list without the others.
    """
    taken = [OverridesParser.create().parse_override(word) for word in words]
    for key in dict.fromkeys(filter(None, (_list_of(override, schema) for override in taken))):
        items = [override for override in taken if _list_of(override, schema) == key]
        others = [override for override in taken if override not in items]
        try:
            composed = compose([o.input_line or "" for o in others if not o.is_sweep_override()])
        except (HydraException, OmegaConfBaseException):  # reported where all words are composed
            continue
        listed, length = OmegaConf.select(composed, key), len(OmegaConf.select(composed, key))
        behind = {int(override.key_or_group.removeprefix(f"{key}.").partition(".")[0]) for override in items}
        behind -= set(range(length))
        if not behind or behind != set(range(length, length + len(behind))):
            continue
        group: Any = _group_of(schema, key)
        listed.extend([group() for _ in behind])
        for override in items:
            OmegaConf.update(listed, override.key_or_group.removeprefix(f"{key}."), override.value())
        taken = [*others, OverridesParser.create().parse_override(as_word(key, OmegaConf.to_container(listed)))]
    return [override.input_line or "" for override in taken]


def _group_of(schema: type, key: str) -> Any | None:
    """The group in the list at `key`; None if that is not a list of groups."""
    element = element_type(type_at(schema, key)) if unknown_key(schema, key) is None else None
    return element if is_group(element) else None


def _list_of(override: Override, schema: type) -> str | None:
    """`data.train` for a value of `data.train.0.path`; None if the override is not about an item of such a list."""
    parts = override.key_or_group.split(".")
    index = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if index is None or override.is_sweep_override() or unknown_key(schema, override.key_or_group) is not None:
        return None
    key = ".".join(parts[:index])
    return key if _group_of(schema, key) is not None else None


def as_word(key: str, value: Any) -> str:
    """A key and its value as a word of the command line."""
    return f"{key}={_written(value)}"


def _written(value: Any) -> str:
    """A value in the grammar of Hydra's overrides."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_written, value)) + "]"
    if isinstance(value, str):
        return QuotedString(value, Quote.single).with_quotes()
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
