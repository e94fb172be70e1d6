"""`gemma4-tpu <command> …`, the console script: equivalent to `python -m gemma4_tpu.<command> …`, and a map of
commands.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import NoReturn

from gemma4_tpu import __version__
from gemma4_tpu.commands import COMMANDS, TOOLS
from gemma4_tpu.config.keys import did_you_mean
from gemma4_tpu.errors import REFUSED, leave, tell

_HELP = ("-h", "--help")
_FIRST = """\
Fine-tune Gemma 4 on TPUs: plan, train, verify, serve, and know what it cost.

First:
  gemma4-tpu train                                 # a tiny model: does it work?
  gemma4-tpu plan hardware=v6e4 model=gemma4_31b   # fits? minutes? dollars?
  gemma4-tpu train data=chat_jsonl data.train=rows.csv preview=true  # your rows

Commands:
"""
_LAST = "\ngemma4-tpu <command> --help lists its groups and keys, with examples."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; 2 if there is no such command."""
    words = list(sys.argv[1:] if argv is None else argv)
    if (command := next((name for name in COMMANDS if words[: len(name.split())] == name.split()), None)) is not None:
        return import_module(COMMANDS[command].module).main(words[len(command.split()) :])
    if words and words[0] in TOOLS:
        return import_module(f"gemma4_tpu.{words[0]}").main(words[1:])
    if words and words[0] == "--version":
        print(f"gemma4-tpu {__version__}")
        return 0
    gists = {name: entry.gist for name, entry in COMMANDS.items()} | TOOLS
    if not words or words[0] in _HELP:
        tell(_FIRST + _lines(gists) + _LAST)
        return 0
    of = {name: gist for name, gist in gists.items() if name.split()[0] == words[0]}  # `launch` alone is not a command
    if of and (len(words) == 1 or words[1] in _HELP):
        tell("Usage: gemma4-tpu <command> [group=option | key=value] …\n\n" + _lines(of) + _LAST)
        return 0
    given, known = " ".join(words[:2] if of else words[:1]), of or gists
    hint = did_you_mean(given, known)
    print(f"error: {given}: no such command{hint} (there are: {', '.join(known)})", file=sys.stderr)
    return REFUSED


def _lines(gists: Mapping[str, str]) -> str:
    return "".join(f"  {name:<13} {gist}\n" for name, gist in gists.items())


def script() -> NoReturn:
    """The console script."""
    leave(main())


if __name__ == "__main__":
    script()
