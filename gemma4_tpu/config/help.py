"""`--help`: usage, groups with their options, every key with its meaning and default."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from gemma4_tpu.config.keys import field_docs, field_types, is_group, is_mapping, type_name
from gemma4_tpu.config.sweep_settings import Grid, Optuna, Processes

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
        "--cfg job prints the configuration instead of running it, --version prints the version.",
        "",
        *_sweeps(entry),
    ]
    return "\n".join(lines)


def _sweeps(entry: EntryPoint) -> list[str]:
    """What `--multirun` does, and its keys."""
    about = (
        "Sweeps: --multirun (-m) runs each combination of key=a,b,c as a process of its own, in"
        " multirun/<name>/<swept keys>_<hash of what all jobs share>, where each job has a folder named after its"
        " values: the same command skips what is finished and goes on with what is not. Ctrl-C lets jobs save, a"
        " second one kills them. At the end come sweep.md, sweep.csv and plots."
    )
    lines = textwrap.wrap(about, _WIDTH)
    if entry.name != "train":
        return lines
    lines += ["  hydra.sweep.dir=<folder>  (str)", "      Another folder for the sweep."]
    for group, schema in (("launcher", Processes), ("sweeper", Grid), ("sweeper", Optuna)):
        lines += ["", f"  {(schema.__doc__ or '').strip()}"]
        values = asdict(schema())
        for name, annotation in field_types(schema).items():
            if not name.startswith("_"):
                kind = "mapping" if is_mapping(annotation) else type_name(annotation)
                lines.append(f"  hydra.{group}.{name}={shown(values[name])}  ({kind})")
                lines += _doc(schema, name)
    return lines


def _doc(schema: type, name: str) -> list[str]:
    text = field_docs(schema).get(name, "")
    return textwrap.wrap(text, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _keys(schema: type, values: Any, prefix: str) -> list[str]:
    lines = []
    nested = []
    for name, annotation in field_types(schema).items():
        if is_group(annotation):
            nested += ["", f"  {(annotation.__doc__ or '').strip()}", *_keys(annotation, values[name], f"{name}.")]
            continue
        lines.append(f"  {prefix}{name}={shown(values[name])}  ({type_name(annotation)})")
        lines += _doc(schema, name)
    return lines + nested


def shown(value: Any) -> str:
    """A value as the command line takes it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(shown(item) for item in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {shown(item)}" for key, item in value.items()) + "}"
    return str(value)
