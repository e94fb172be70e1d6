"""The one exception for what a user can put right, and the exit codes of every entry point."""

REFUSED = 2
"""A `UserError`: one message on stderr."""
STALLED = 3
"""No progress for `trainer.stall_seconds`; all stacks are in log.txt."""
PREEMPTED = 42
"""Preempted and saved (or there was nothing to save yet): the same command goes on. Nothing else exits with it."""
INTERRUPTED = 130
"""Ctrl-C."""
TERMINATED = 143
"""A second SIGTERM, which does not wait for the save."""


class UserError(ValueError):
    """A refusal: names the key, file or row, what was given, and what would work.

    Entry points print its message without a traceback and exit with code 2.
    """
