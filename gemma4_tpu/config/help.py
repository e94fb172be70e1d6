"""`--help`: usage, groups with their options, every key with its meaning and default."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from gemma4_tpu.config.keys import field_docs, field_types, is_group, type_name

if TYPE_CHECKING:
    from gemma4_tpu.config.entries import EntryPoint

_WIDTH = 110


def help_text(entry: EntryPoint) -> str:
    """The whole help page."""
    from gemma4_tpu.config.load import defaults, groups_of

    values = OmegaConf.to_container(defaults(entry))
    lines = textwrap.wrap(entry.summary, _WIDTH)
    lines += ["", f"Usage: {entry.command} [group=option | key=value] …", "", "Examples:"]
    for arguments, meaning in entry.examples:
        lines += [f"  {entry.command} {arguments}".rstrip(), f"      {meaning}"]
    lines += ["", "Groups (group=option):"]
    for group, options in groups_of(entry).items():
        if options:
            listed = f"  {group:<11} {', '.join(options)}"
            lines += textwrap.wrap(listed, _WIDTH, subsequent_indent=" " * 14)
    lines += ["", "Keys (key=value), with their defaults:"]
    lines += _keys(entry.schema, values, "")
    lines += [
        "",
        "Lists are written 'key=[a,b]', no value is written null.",
        "--cfg job prints the configuration instead of running it,",
        "--multirun (-m) runs a sweep such as lora.rank=4,8, --version prints the version.",
    ]
    return "\n".join(lines)


def _keys(schema: type, values: Any, prefix: str) -> list[str]:
    lines = []
    nested = []
    for name, annotation in field_types(schema).items():
        if is_group(annotation):
            nested += ["", f"  {(annotation.__doc__ or '').strip()}", *_keys(annotation, values[name], f"{name}.")]
            continue
        lines.append(f"  {prefix}{name}={_show(values[name])}  ({type_name(annotation)})")
        lines += textwrap.wrap(
            field_docs(schema).get(name, ""), _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6
        )
    return lines + nested


def _show(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(_show(item) for item in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_show(item)}" for key, item in value.items()) + "}"
    return str(value)
