"""Measures the figures on the pages of this folder again: `make benchmarks`, or some of them by name.

    python -m benchmarks                      # every page's commands, one after the other: about an hour
    python -m benchmarks training chaos       # the pages training.md and chaos.md; hours, for what is only so measured
    python -m benchmarks --list               # only says the commands

The figures of a command that succeeds replace those on its page; those of one that fails stay, and the exit code is 1.
Nothing else should run on the machine. Commands that need something of yours name a variable, such as `$VERILOG_EVAL`.
While that is not set, what needs it is left out, and the last lines say so.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time

from benchmarks import pages
from benchmarks.pages import Block


def measure(block: Block, command: str, without: list[str]) -> bool:
    """Runs the command of a block, with its progress on stderr; whether the page has its figures now.

    Args:
      block: where the figures go.
      command: it, without the optional words that need what is not here.
      without: these words.
    """
    page = block.page.name
    print(f"{page}: {command}", flush=True)
    began = time.monotonic()
    program, *words = [os.path.expandvars(word) for word in shlex.split(command)]
    program = sys.executable if program == "python" else program
    done = subprocess.run([program, *words], cwd=pages.FOLDER.parent, stdout=subprocess.PIPE, text=True)
    told = f"{page}: {time.monotonic() - began:,.0f} s"
    if done.returncode:
        print(f"{done.stdout}{told}, exit code {done.returncode}; the page keeps its figures", flush=True)
        return False
    lacking = [f"Without `{words}`, whose variable was not set." for words in without]
    pages.replace(block, "\n\n".join([*lacking, done.stdout]))
    print(told, flush=True)
    return True


def main() -> int:
    """Exit code: 0, or 1 where a command failed, or a page was named and left out."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    names = sorted({block.page.stem for block in pages.blocks()})
    parser.add_argument("pages", nargs="*", metavar="page", help=f"{', '.join(names)}; none: all but what takes hours")
    parser.add_argument("--list", action="store_true", help="only say the commands")
    asked = parser.parse_args()
    if unknown := sorted(set(asked.pages) - set(names)):
        parser.error(f"no page with figures is called {unknown[0]}; there are {', '.join(names)}")
    chosen = [block for block in pages.blocks() if block.page.stem in (asked.pages or names)]
    if asked.list:
        for block in chosen:
            print(f"{block.page.name}: {block.command}{' (takes hours: only if named)' if block.only_if_named else ''}")
        return 0
    failed, left_out = False, []
    for block in chosen:
        command, without, missing = block.resolved()
        if block.only_if_named and not asked.pages:
            left_out.append(f"{block.page.name}, which takes hours: name it to measure it")
        elif missing:
            left_out.append(f"{block.page.name}, since {' and '.join(missing)} is not set: {command}")
            failed |= bool(asked.pages)
        else:
            left_out += [f"{block.page.name}: {words}, since its variable is not set" for words in without]
            failed |= not measure(block, command, without)
    for line in left_out:
        print(f"left out: {line}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
