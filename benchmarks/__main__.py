"""Measures again what stands on the pages of this folder: `make benchmarks`, or some of them by name.

    python -m benchmarks                      # every page's commands, one after the other
    python -m benchmarks training loading     # the pages training.md and loading.md
    python -m benchmarks --list               # only says the commands

The figures of a command that succeeds replace those on its page; those of one that fails stay, and the exit code is 1.
Nothing else should run on the machine. Commands that need something of yours name a variable, such as `$VERILOG_EVAL`,
and are left out while that is not set.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import time

from benchmarks import pages


def measure(page: str, command: str) -> bool:
    """Runs one command, with its progress on stderr; whether the page has its figures now."""
    if missing := [name for name in re.findall(r"\$(\w+)", command) if name not in os.environ]:
        print(f"{page}: left out, since {' and '.join(missing)} is not set: {command}", flush=True)
        return True
    print(f"{page}: {command}", flush=True)
    began = time.monotonic()
    program, *words = [os.path.expandvars(word) for word in shlex.split(command)]
    program = sys.executable if program == "python" else program
    done = subprocess.run([program, *words], cwd=pages.FOLDER.parent, stdout=subprocess.PIPE, text=True)
    told = f"{page}: {time.monotonic() - began:,.0f} s"
    if done.returncode:
        print(f"{told}, exit code {done.returncode}; the page keeps its figures", flush=True)
        return False
    pages.replace(pages.FOLDER / page, command, done.stdout)
    print(told, flush=True)
    return True


def main() -> int:
    """Exit code: 0, or 1 where a command failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    names = sorted({page.stem for page, _ in pages.commands()})
    parser.add_argument("pages", nargs="*", metavar="page", help=f"{', '.join(names)}; none: all")
    parser.add_argument("--list", action="store_true", help="only say the commands")
    asked = parser.parse_args()
    if unknown := sorted(set(asked.pages) - set(names)):
        parser.error(f"no page with figures is called {unknown[0]}; there are {', '.join(names)}")
    chosen = [(page.name, command) for page, command in pages.commands() if page.stem in (asked.pages or names)]
    if asked.list:
        print("\n".join(f"{page}: {command}" for page, command in chosen))
        return 0
    failed = sum(not measure(page, command) for page, command in chosen)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
