"""`gemma4-tpu <command> …`, the console script: what `python -m gemma4_tpu.<command> …` does, and shell completion."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Sequence
from importlib import import_module

from gemma4_tpu import __version__
from gemma4_tpu.config.entries import ENTRIES
from gemma4_tpu.config.keys import did_you_mean
from gemma4_tpu.errors import REFUSED

_COMPLETION = ("-sc", "--shell-completion")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of the command; 2 where there is no such command."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in _COMPLETION:
        return _complete(words[1:])
    if words and words[0] in ENTRIES:
        return import_module(f"gemma4_tpu.{words[0]}").main(words[1:])
    if words and words[0] == "--version":
        print(f"gemma4-tpu {__version__}")
        return 0
    if words and words[0] not in ("-h", "--help"):
        listed = ", ".join(ENTRIES)
        print(
            f"error: {words[0]}: no such command{did_you_mean(words[0], ENTRIES)} (there are: {listed})",
            file=sys.stderr,
        )
        return REFUSED
    print(_usage())
    return 0


def _usage() -> str:
    lines = ["Usage: gemma4-tpu <command> [group=option | key=value] …", ""]
    for entry in ENTRIES.values():
        lines += textwrap.wrap(f"{entry.name:<9} {entry.summary}", 78, subsequent_indent=" " * 10)
    lines += ["", "gemma4-tpu <command> --help lists its groups and keys. Completion in Bash:"]
    return "\n".join([*lines, '    eval "$(gemma4-tpu --shell-completion install=bash)"'])


def _complete(words: list[str]) -> int:
    """Serves Hydra's completion, which knows nothing of commands: names them, or hands on the line without its command.

    `words` are `install=bash` or `query=bash`; a query finds the line in COMP_LINE.
    """
    from gemma4_tpu.config.load import load

    name = "train"
    if any(word.startswith("query=") for word in words):
        line = os.environ.get("COMP_LINE", "")
        program, *given = line.split()
        if not given or (len(given) == 1 and not line.endswith(" ")):
            print("\n".join(name for name in ENTRIES if name.startswith("".join(given))))
            return 0
        name, *rest = given
        if name not in ENTRIES:
            return 0
        os.environ["COMP_LINE"] = " ".join([program, *rest]) + " " * line.endswith(" ")
    load(["--shell-completion", *words], ENTRIES[name])
    return 0


if __name__ == "__main__":
    sys.exit(main())
