"""Ends a run before its last update: if the held-out loss stops falling, or at a time limit."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from gemma4_tpu.config.durations import seconds_of
from gemma4_tpu.config.schema import TrainerConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.training.hosts import Hosts


@dataclass
class Patience:
    """Counts held-out evaluations without improvement; saved with every checkpoint, so that a resumed run ends at
    exactly the same update. All processes see the same losses.
    """

    trainer: TrainerConfig
    best: float | None = None
    """The loss to improve on, in nats per target token."""
    since: int = 0
    """Evaluations since then."""

    @classmethod
    def of(cls, trainer: TrainerConfig, position: dict[str, Any]) -> Patience:
        """Restores the count from a checkpoint's position, or starts anew if it has none."""
        return cls(trainer, **position.get("patience", {}))

    def saved(self) -> dict[str, Any]:
        """For the checkpoint, as JSON."""
        return {"best": self.best, "since": self.since}

    def add(self, loss: float) -> None:
        """Adds the held-out loss of an evaluation."""
        if self.best is None or loss < self.best - self.trainer.min_delta:
            self.best, self.since = loss, 0
        else:
            self.since += 1

    @property
    def exhausted(self) -> bool:
        """Whether the run is to end now."""
        return self.trainer.patience is not None and self.since >= self.trainer.patience

    def told(self) -> str:
        """The reason why it ended."""
        below = f" by more than trainer.min_delta={self.trainer.min_delta:g}" if self.trainer.min_delta else ""
        return (
            f"trainer.patience={self.trainer.patience}: {self.since} consecutive held-out evaluations were not below "
            f"{self.best:.4f}{below}"
        )


def check_patience(trainer: TrainerConfig, heldout: bool) -> None:
    """Refuses (`UserError`) `trainer.patience` without held-out rows."""
    if trainer.patience is not None and not heldout:
        raise UserError(
            f"trainer.patience={trainer.patience}: no rows are held out, so there is no loss to watch; give "
            "data.heldout or data.heldout_fraction, or trainer.patience=null"
        )


class TimeLimit:
    """`trainer.time_limit`, counted from construction; on several hosts, by the clock of process 0."""

    def __init__(self, limit: str | None, hosts: Hosts):
        self._limit, self._hosts, self._started_at = limit, hosts, time.monotonic()

    def reached(self) -> bool:
        """Whether to save and end: a collective with the same answer on every process."""
        seconds = seconds_of(self._limit) if self._limit is not None else None
        return seconds is not None and self._hosts.from_first(lambda: time.monotonic() - self._started_at >= seconds)

    def elapsed_seconds(self) -> float:
        """Seconds since this start."""
        return time.monotonic() - self._started_at

    def told(self) -> str:
        """The reason why it ended, and how to resume."""
        return f"trainer.time_limit={self._limit} has passed; saved, and the same command with this run_dir resumes"
