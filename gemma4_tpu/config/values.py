"""Checks whether a value fits the type of a key."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gemma4_tpu.config.keys import element_type, field_types, is_group, is_mapping, type_at, type_name, unknown_key


def bad_value(schema: type, key: str, value: Any) -> str | None:
    """None if `value` fits the type of `key`, else the refusal."""
    kind = type_at(schema, key)
    element = element_type(kind)
    if element is not None and is_group(element) and isinstance(value, list):
        for index, item in enumerate(value):
            for name in item if isinstance(item, dict) else ():
                message = unknown_key(element, str(name))
                if message:
                    return f"{key}.{index}.{name}: {message}"
    where, _, name = key.rpartition(".")
    group = type_at(schema, where) if where else schema
    if not is_group(group):  # an item of a list, judged by the keys set in it
        return None
    try:  # in the group alone, since building a whole configuration for each key takes ten times as long
        OmegaConf.update(OmegaConf.structured(group), name, value, merge=True)
    except (OmegaConfBaseException, ValueError, TypeError):
        shown = "null" if value is None else value
        return f"{key}={shown}: not {_article(type_name(kind))}{_form_hint(key, kind, element, value)}"
    return None


def empty_keys(group: Any, prefix: str = "") -> list[str]:
    """Keys that are empty where null says "none": `run_dir=$RUN`, if there is no RUN, would be the current folder.

    Args:
      group: a root configuration, or a group of it.
      prefix: of its keys, with a dot at the end.
    """
    keys: list[str] = []
    schema: type = type(group)
    for name, kind in field_types(schema).items():
        value, key = getattr(group, name), f"{prefix}{name}"
        if value == "" and kind == (str | None):
            keys.append(key)
        listed = isinstance(value, list)
        for item, where in [(item, f"{key}.{i}.") for i, item in enumerate(value)] if listed else [(value, f"{key}.")]:
            keys += empty_keys(item, where) if is_group(type(item)) else []
    return keys


def _form_hint(key: str, kind: Any, element: Any, value: Any) -> str:
    """A hint on the syntax of a list or a mapping."""
    if is_mapping(kind):
        return f"; write '{key}={{name: value}}'"
    if element is None or isinstance(value, list):
        return ""
    if value is None:
        return f"; write '{key}=[]'"
    item = f"{{path: {value}}}" if is_group(element) else value
    return f"; write '{key}=[{item}]'"


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'aeio' else 'a'} {name}"
