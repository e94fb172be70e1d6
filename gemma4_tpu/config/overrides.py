"""Checks the command line's `key=value` words, each on its own, so that all problems are found at once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from gemma4_tpu.config.keys import (
    did_you_mean,
    element_type,
    field_types,
    is_group,
    is_mapping,
    nearest,
    type_at,
    unknown_key,
)
from gemma4_tpu.config.lists import in_full
from gemma4_tpu.config.refusals import Refusal
from gemma4_tpu.config.synonyms import synonym
from gemma4_tpu.config.values import bad_value

ONE_OF = (("trainer.epochs", "trainer.max_updates"), ("optimizer.warmup_fraction", "optimizer.warmup_updates"))
"""Pairs of keys that set the same thing in two ways."""

_PATHS = {"data": "data=chat_jsonl data.train", "model": "model.path"}
"""Group → the key that takes a path for it."""


@dataclass(frozen=True)
class Groups:
    """The config groups on the search path."""

    options: dict[str, list[str]]
    """Group → its options."""
    open: bool = False
    """Whether the user added a search path, so that options can exist that are not listed."""


def groups_in(folder: Path) -> dict[str, list[str]]:
    """Group → options, from the subfolders of `folder`."""
    return {
        group.name: sorted((option.stem for option in group.glob("*.yaml")), key=naturally)
        for group in sorted(folder.iterdir())
        if group.is_dir()
    }


def naturally(name: str) -> list[Any]:
    """Sorts v5p8 before v5p16."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def check_overrides(
    words: list[str], *, schema: type, groups: Groups, multirun: bool = False
) -> tuple[list[str], list[Refusal]]:
    """Splits the command line into valid words and problems.

    Short words about lists are expanded. A `+` before an existing key or group makes no difference and is dropped,
    since Hydra would refuse it.
    """
    good, problems = [], []
    for word in words:
        try:
            override = OverridesParser.create().parse_override(word)
        except HydraException:
            problems.append(Refusal(_not_an_override(word, schema)))
            continue
        if (full := in_full(word, override, schema)) != word:
            word, override = full, OverridesParser.create().parse_override(full)
        found = _check_override(word, override, schema, groups, multirun)
        if found:
            problems.append(found)
        else:
            known = override.key_or_group in groups.options or unknown_key(schema, override.key_or_group) is None
            bare = word.lstrip("+") if override.is_add() and known else word
            mapping = unknown_key(schema, override.key_or_group) is None and is_mapping(
                type_at(schema, override.key_or_group)
            )
            good.append(f"+{bare}" if mapping else bare)  # Hydra adds keys to a mapping only with +
    return good, problems


def one_length(words: list[str]) -> list[str]:
    """Words that unset the other key of a pair in `ONE_OF`, set in conf/, when (valid) words set only one of them, such
    as `trainer.epochs=3`. If they set both, both count.
    """
    overrides = [OverridesParser.create().parse_override(word) for word in words]
    given = {o.key_or_group: o.value() for o in overrides if not o.is_sweep_override()}
    dropped = []
    for pair in ONE_OF:
        alone = [key for key in pair if given.get(key) is not None]
        dropped += [f"{key}=null" for key in pair if len(alone) == 1 and key not in given]
    return dropped


def check_file(content: DictConfig, *, label: str, prefix: str, schema: type) -> list[Refusal]:
    """Problems in one YAML file; `prefix` is its group (empty for `# @package _global_`)."""
    problems = []
    for name, value in content.items_ex(resolve=False):
        key = f"{prefix}.{name!s}" if prefix else str(name)
        message = unknown_key(schema, key)
        if message and (ours := synonym(schema, key, str(content._get_node(name)))):
            problems.append(_in_our_words(f"{label}: {key}", ours))
        elif message:
            problems.append(Refusal(f"{label}: {key}: {message}", _meant(message)))
        elif is_group(type_at(schema, key)) and isinstance(value, DictConfig):
            problems += check_file(value, label=label, prefix=key, schema=schema)
        elif not OmegaConf.is_interpolation(content, str(name)) and (message := bad_value(schema, key, value)):
            problems.append(Refusal(f"{label}: {message}", (key,)))
    return problems


def _check_override(word: str, override: Override, schema: type, groups: Groups, multirun: bool) -> Refusal | None:
    name = override.key_or_group
    if name.partition(".")[0].partition("/")[0] == "hydra":
        return None if multirun or name == "hydra.searchpath" else Refusal(_hydra_word(word, name))
    if override.is_sweep_override() and not multirun:
        listed = unknown_key(schema, name) is None and element_type(type_at(schema, name)) is not None
        one = f"write '{name}=[a,b]'" if listed else "give one value"
        return Refusal(f"{word}: several values are a sweep; {one}, or add --multirun", (name,))
    if name in groups.options:
        return _check_option(word, override, schema, groups)
    message = unknown_key(schema, name)
    if message and (ours := synonym(schema, name, override.get_value_string())):
        return _in_our_words(word, ours)
    if message:
        meant = nearest(name, groups.options) if "." not in name else []
        if meant:
            message = f"no such key or group; did you mean {' or '.join(meant)}?"
        return Refusal(f"{word}: {message}", _meant(message))
    if override.is_delete():
        return Refusal(f"{word}: keys can't be removed; give {name}=null if null is allowed")
    for value in _values(override):
        message = bad_value(schema, name, value)
        if message:
            return Refusal(message, (name,))
    return None


def _in_our_words(word: str, ours: str) -> Refusal:
    return Refusal(f"{word}: no such key; here it is {ours}", (ours.partition("=")[0],))


def _check_option(word: str, override: Override, schema: type, groups: Groups) -> Refusal | None:
    group, options = override.key_or_group, groups.options[override.key_or_group]
    if override.is_delete() and group in field_types(schema):
        return Refusal(f"{word}: groups can't be removed; give {group}=<one of {', '.join(options)}>", (group,))
    if override.is_delete() or groups.open:
        return None
    # An experiment can set anything, so without it nothing else can be judged.
    doubtful = (group,) if group in field_types(schema) else tuple(groups.options)
    for value in _values(override):
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            listed = ", ".join(options)
            return Refusal(f"{word}: a group takes one of its options ({listed}); keys: {group}.key=value", doubtful)
        if str(value) not in options:
            hint = _as_path(group, str(value)) or did_you_mean(str(value), options, lambda option: f"{group}={option}")
            return Refusal(f"{word}: no such option{hint} (options: {', '.join(options) or 'none'})", doubtful)
    return None


def _as_path(group: str, value: str) -> str:
    """How to give a file or folder that was given as an option of a group; empty: it looks like none."""
    looks = "/" in value or Path(value).suffix not in ("", ".yaml", ".yml")
    return f"; a path is given as {_PATHS[group]}={value}" if looks and group in _PATHS else ""


def _values(override: Override) -> Iterator[Any]:
    """The value of an override, or each value of an enumerated sweep; of a range two, which have the types of all."""
    if not override.is_sweep_override():
        yield override.value()
    elif override.is_discrete_sweep():
        for text in islice(override.sweep_string_iterator(), 2 if override.is_range_sweep() else None):
            yield OverridesParser.create().parse_override(f"x={text}").value()


def _not_an_override(word: str, schema: type) -> str:
    file = Path(word.rpartition("=")[2].lstrip("@"))
    if file.suffix in (".yaml", ".yml") and (word.startswith("-") or "=" not in word):
        return (
            f"{word}: a file of settings is an experiment: --config-dir <folder> experiment={file.stem} reads"
            f" <folder>/experiment/{file.stem}.yaml"
        )
    if word.startswith("-"):
        name, _, value = word.lstrip("-").partition("=")
        message = unknown_key(schema, name)
        if message and (ours := synonym(schema, name, value)):
            return f"{word}: no such flag; settings are written without dashes, and here it is {ours}"
        (meant, *_) = [name] if message is None else (*_meant(message), "key")
        switch = unknown_key(schema, meant) is None and type_at(schema, meant) is bool
        return f"{word}: no such flag; settings are written {meant}={'true' if switch else 'value'}"
    if "=" not in word:
        return f"{word}: settings are written key=value{_such_as(word, schema)}"
    key, _, value = word.partition("=")
    if plain_list := re.fullmatch(r"\[([^\[\]'\"]+)\]", value):
        value = ",".join(f"'{item.strip()}'" for item in plain_list[1].split(","))
        return f'{word}: the value can\'t be read; quote what it lists: "{key}=[{value}]"'
    return f"{word}: the value can't be read; quote it: \"{key}='{value}'\""


def _such_as(word: str, schema: type) -> str:
    examples = (word + "=…", "lora.rank=8", f"run={word}", f"model.path={word}", f"endpoint={word}")
    example = next((one for one in examples if unknown_key(schema, one.partition("=")[0]) is None), None)
    return f", such as {example}" if example else ""


def _hydra_word(word: str, name: str) -> str:
    if name in ("hydra.run.dir", "hydra.output_subdir"):
        return f"{word}: the run folder is set by run_dir=<folder>"
    return f"{word}: takes effect with --multirun only (hydra.searchpath works always)"


def _meant(message: str) -> tuple[str, ...]:
    """The names that a message suggests, whose values are in doubt."""
    hint = message.partition("did you mean ")[2].rstrip("?")
    return tuple(hint.split(" or ")) if hint else ()
