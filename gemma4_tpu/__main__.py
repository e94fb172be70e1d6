"""`gemma4-tpu <command> …`, the console script: what `python -m gemma4_tpu.<command> …` does, and shell completion."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import NoReturn

from gemma4_tpu import __version__
from gemma4_tpu.commands import COMMANDS
from gemma4_tpu.config.entry import EntryPoint
from gemma4_tpu.config.keys import did_you_mean
from gemma4_tpu.config.load import load
from gemma4_tpu.errors import REFUSED, leave

_HELP = ("-h", "--help")
_COMPLETION = ("-sc", "--shell-completion")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of the command; 2 where there is no such command."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in _COMPLETION:
        return _complete(words[1:])
    if (command := _command(words)) is not None:
        return import_module(COMMANDS[command].module).main(words[len(command.split()) :])
    if words and words[0] == "--version":
        print(f"gemma4-tpu {__version__}")
        return 0
    if not words or words[0] in _HELP:
        print(_usage(COMMANDS))
        return 0
    of = {name: entry for name, entry in COMMANDS.items() if name.split()[0] == words[0]}  # `launch` alone is none
    if of and (len(words) == 1 or words[1] in _HELP):
        print(_usage(of))
        return 0
    given, known = " ".join(words[:2] if of else words[:1]), of or COMMANDS
    hint = did_you_mean(given, known)
    print(f"error: {given}: no such command{hint} (there are: {', '.join(known)})", file=sys.stderr)
    return REFUSED


def script() -> NoReturn:
    """The console script."""
    leave(main())


def _command(words: Sequence[str]) -> str | None:
    """The command that these words begin with."""
    return next((name for name in COMMANDS if words[: len(name.split())] == name.split()), None)


def _usage(commands: Mapping[str, EntryPoint]) -> str:
    lines = ["Usage: gemma4-tpu <command> [group=option | key=value] …", ""]
    for name, entry in commands.items():
        lines += textwrap.wrap(f"{name:<9} {entry.summary}", 78, subsequent_indent=" " * 10)
    lines += ["", "gemma4-tpu <command> --help lists its groups and keys. Completion in Bash:"]
    return "\n".join([*lines, '    eval "$(gemma4-tpu --shell-completion install=bash)"'])


def _complete(words: list[str]) -> int:
    """Serves Hydra's completion, which knows nothing of commands: names them, or hands on the line without its command.

    `words` are `install=bash` or `query=bash`; a query finds the line in COMP_LINE.
    """
    command = "train"
    if any(word.startswith("query=") for word in words):
        line = os.environ.get("COMP_LINE", "")
        program, *given = [*line.split(), *[""] * line.endswith(" ")]
        *before, typed = given or [""]
        names = [name.split() for name in COMMANDS]
        following = {name[len(before)] for name in names if name[: len(before)] == before and len(name) > len(before)}
        if following:
            print("\n".join(sorted(word for word in following if word.startswith(typed))))
            return 0
        if (found := _command(given)) is None:
            return 0
        command, rest = found, given[len(found.split()) :]
        os.environ["COMP_LINE"] = " ".join([program, *rest])
    load(["--shell-completion", *words], COMMANDS[command])
    return 0


if __name__ == "__main__":
    script()
