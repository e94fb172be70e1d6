"""`--help`: usage, groups with their options, and every key with its meaning and default."""

from __future__ import annotations

import re
import shutil
import textwrap
from dataclasses import asdict
from typing import Any

from omegaconf import OmegaConf

from gemma4_tpu.config.conf import defaults, groups_of
from gemma4_tpu.config.entry import EntryPoint
from gemma4_tpu.config.keys import field_docs, field_types, is_group, is_mapping, type_name
from gemma4_tpu.config.sweeps import GridSweep, Optuna, Processes

_NARROWEST, _WIDEST = 60, 110
_WORD = re.compile(r"""(?:[^\s'"]|'[^']*'|"[^"]*")+""")


def help_text(entry: EntryPoint) -> str:
    """The whole help page."""
    values = OmegaConf.to_container(defaults(entry), resolve=True)
    lines = _wrapped(entry.summary)
    lines += ["", *_wrapped(f"Usage: {entry.command} [group=option | key=value] …"), "", "Examples:"]
    for arguments, meaning in entry.examples:
        lines += [*_command(f"{entry.command} {arguments}"), *_wrapped(meaning, 6)]
    groups = {group: options for group, options in groups_of(entry).items() if options}
    lines += ["", "Groups (group=option):"] if groups else []
    for group, options in groups.items():
        lines += textwrap.wrap(f"  {group:<11} {', '.join(options)}", _width(), subsequent_indent=" " * 14)
    lines += ["", "Keys (key=value), with their defaults:"]
    lines += _keys(entry.schema, values, "")
    lines += [
        "",
        "Write lists as 'key=[a,b]', and no value as null.",
        *_wrapped("--cfg job prints the configuration instead of running it; --version prints the version."),
        "",
        *_sweeps(entry),
    ]
    return "\n".join(lines)


def _sweeps(entry: EntryPoint) -> list[str]:
    """The help on `--multirun` and its keys."""
    about = (
        "Sweeps: --multirun (-m) runs each combination of key=a,b,c in its own process, under"
        " multirun/<name>/<swept keys>_<hash of what all jobs share>; each job has a folder named after its values."
        " The same command skips finished jobs and resumes the others. Ctrl-C lets jobs save, a second one kills them."
        " A sweep ends with sweep.md, sweep.csv and plots."
    )
    lines = _wrapped(about)
    if entry.name != "train":
        return lines
    lines += ["  hydra.sweep.dir=<folder>  (str)", "      Use another folder for the sweep."]
    for group, schema in (("launcher", Processes), ("sweeper", GridSweep), ("sweeper", Optuna)):
        lines += ["", *_wrapped((schema.__doc__ or "").strip(), 2)]
        values = asdict(schema())
        for name, annotation in field_types(schema).items():
            if not name.startswith("_"):
                kind = "mapping" if is_mapping(annotation) else type_name(annotation)
                lines.append(f"  hydra.{group}.{name}={shown(values[name])}  ({kind})")
                lines += _doc(schema, name)
    return lines


def _doc(schema: type, name: str) -> list[str]:
    return _wrapped(field_docs(schema).get(name, ""), 6)


def _width() -> int:
    """Columns of the terminal, within limits; without a terminal, a readable width."""
    return max(_NARROWEST, min(_WIDEST, shutil.get_terminal_size((_WIDEST, 24)).columns))


def _wrapped(text: str, indent: int = 0) -> list[str]:
    space = " " * indent
    return textwrap.wrap(text, _width(), initial_indent=space, subsequent_indent=space, break_on_hyphens=False)


def _command(text: str) -> list[str]:
    """A command for copying: lines that are too long are continued with a backslash."""
    lines = [" "]
    for word in _WORD.findall(text):
        if len(lines[-1]) + len(word) + 3 > _width() and lines[-1].strip():
            lines[-1] += " \\"
            lines.append("     ")
        lines[-1] += f" {word}"
    return lines


def _keys(schema: type, values: Any, prefix: str) -> list[str]:
    lines = []
    nested = []
    for name, annotation in field_types(schema).items():
        if is_group(annotation):
            about = " ".join((annotation.__doc__ or "").split())
            nested += ["", *_wrapped(about, 2), *_keys(annotation, values[name], f"{name}.")]
            continue
        key = f"  {prefix}{name}={shown(values[name])}  ({type_name(annotation)})"
        lines += [key] if len(key) <= _width() else textwrap.wrap(key, _width(), subsequent_indent=" " * 6)
        lines += _doc(schema, name)
    return lines + nested


def shown(value: Any) -> str:
    """A value in the command line's syntax."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(shown(item) for item in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {shown(item)}" for key, item in value.items()) + "}"
    return str(value)
