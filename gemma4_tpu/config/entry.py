"""What the base layer needs from a command: schema, help and checks. Each command defines them in its module."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from gemma4_tpu.config.refusals import Refusal

Root = TypeVar("Root")
Checks = TypeVar("Checks")


@dataclass(frozen=True)
class Nothing:
    """The findings of checks that only accept or refuse."""


@dataclass(frozen=True)
class EntryPoint(Generic[Root, Checks]):
    """One `python -m gemma4_tpu.<name>`: its root schema, registered for `conf/<name>.yaml`, and its checks."""

    name: str
    schema: type[Root]
    normalise: Callable[[Root], Root]
    """Brings values with several spellings into their canonical one."""
    examine: Callable[[Root], tuple[Checks | None, list[Refusal]]]
    """Checks everything that can be checked without JAX; returns the findings, or the problems."""
    summary: str
    """Help's first paragraph; its first sentence is the command's line in the map of commands."""
    examples: tuple[tuple[str, str], ...]
    """(arguments, what they do)"""
    shorthands: Mapping[str, str] = field(default_factory=dict)
    """Short name → key that it stands for on the command line."""
    as_written: frozenset[str] = frozenset()
    """Keys of text that the command line takes as it is: characters such as `<` need no second pair of quotes."""

    @property
    def gist(self) -> str:
        """The command in one line."""
        return f"{self.summary.partition('. ')[0].rstrip('.')}."

    @property
    def module(self) -> str:
        return f"gemma4_tpu.{self.name}"

    @property
    def command(self) -> str:
        return f"python -m {self.module}"

    def in_full(self, word: str) -> str:
        """A word of the command line with a shorthand written out, and text quoted for Hydra that is taken as it is."""
        key, equals, value = word.partition("=")
        key = self.shorthands.get(key, key)
        if key in self.as_written and value and not re.fullmatch(r"""(["']).*\1""", value):
            value = "'" + value.replace("'", r"\'") + "'"
        return f"{key}{equals}{value}"
