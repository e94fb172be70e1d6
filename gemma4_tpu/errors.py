"""The one exception for what a user can put right, how a command ends, and the exit codes of every entry point."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

REFUSED = 2
"""A `UserError`: one message on stderr."""
STALLED = 3
"""No progress for `trainer.stall_seconds`; all stacks are in log.txt."""
PREEMPTED = 42
"""Preempted and saved (or there was nothing to save yet): the same command resumes. Nothing else exits with it."""
INTERRUPTED = 130
"""Ctrl-C."""
TERMINATED = 143
"""A second SIGTERM, which does not wait for the save."""


class UserError(ValueError):
    """A refusal: names the key, file or row, what was given, and what would work.

    Entry points print its message without a traceback and exit with code 2.
    """


class Ended(NamedTuple):
    """How a command ended that was not refused."""

    code: int
    """Its exit code."""
    folders: tuple[Path, ...] = ()
    """The run folders that it left."""


def exit_code(run: Callable[[], int], *, interrupted: str = "interrupted") -> int:
    """That of an entry point's work: a refusal is one message on stderr, Ctrl-C a line that says `interrupted`."""
    try:
        return run()
    except UserError as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        return INTERRUPTED


def tell(text: str) -> None:
    """Prints what was asked for, also to a reader that has seen enough (`| head`)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def first_line(error: BaseException) -> str:
    """What went wrong, for a record of one line; the log has the rest."""
    return (str(error) or repr(error)).splitlines()[0]


def last_words(printed: str) -> str | None:
    """Why a command of ours ended, by what it printed: its last refusal, else its last line; None: it printed none."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")] or lines
    return told[-1] if told else None
