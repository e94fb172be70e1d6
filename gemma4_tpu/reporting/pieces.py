"""What pages about figures have in common: head, sources, remarks, and where the text goes."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma4_tpu.costing.figures import BY, Figure
from gemma4_tpu.tracking.files import write_text

UNKNOWN = "not known"


def head(title: str, command: str | None) -> Iterator[str]:
    """The title, and the command that makes the page."""
    yield from [f"# {title}", ""]
    if command:
        yield from ["Made by:", "", f"    {command}", ""]


def sources(figures: Sequence[Figure]) -> Iterator[str]:
    """Who says so, once each."""
    yield from dict.fromkeys(f"- {BY[one.label]}: {one.source}" for one in figures)
    yield ""


def remarks(told: Sequence[str]) -> Iterator[str]:
    """A section of them, if there are any."""
    if told:
        yield from ["## Remarks", "", *(f"- {remark}" for remark in dict.fromkeys(told)), ""]


def joined(parts: Iterable[Iterable[str]]) -> str:
    """The text of all lines."""
    return "\n".join(line for part in parts for line in part) + "\n"


def deliver(text: str, out: str | None) -> None:
    """To the file, else to the terminal."""
    if out is None:
        print(text, end="")
        return
    write_text(Path(out), text)
    print(f"written: {out}")


def command_line(subject: str, places: Sequence[str], changed: Mapping[str, Any]) -> str:
    """The command line that asks for the same again."""
    words = [f"{key}={_written(value)}" for key, value in changed.items()]
    return shlex.join(["python", "-m", "gemma4_tpu.report", subject, *places, *words])


def _written(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {each:g}" for name, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(f"{each:g}" if isinstance(each, float) else str(each) for each in value) + "]"
    return str(value)
