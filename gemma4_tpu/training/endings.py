"""What ends a run before its last update: a held-out loss that no longer falls, and the time it may take."""

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
    """Held-out evaluations without improvement; saved with every checkpoint, so that a resumed run ends at the very
    same update. All processes see the same losses.
    """

    trainer: TrainerConfig
    best: float | None = None
    """The loss that the next ones are compared with, in nats per target token."""
    since: int = 0
    """Evaluations since then."""

    @classmethod
    def of(cls, trainer: TrainerConfig, position: dict[str, Any]) -> Patience:
        """As a checkpoint remembers it; as at first where it was saved before there was any."""
        return cls(trainer, **position.get("patience", {}))

    def saved(self) -> dict[str, Any]:
        """For the checkpoint, as JSON."""
        return {"best": self.best, "since": self.since}

    def add(self, loss: float) -> None:
        """Takes the held-out loss of an evaluation."""
        if self.best is None or loss < self.best - self.trainer.min_delta:
            self.best, self.since = loss, 0
        else:
            self.since += 1

    @property
    def exhausted(self) -> bool:
        """Whether the run is to end here."""
        return self.trainer.patience is not None and self.since >= self.trainer.patience

    def told(self) -> str:
        """Why it ended."""
        below = f" by more than trainer.min_delta={self.trainer.min_delta:g}" if self.trainer.min_delta else ""
        return (
            f"trainer.patience={self.trainer.patience}: {self.since} held-out evaluations in a row were not below "
            f"{self.best:.4f}{below}"
        )


def check_patience(trainer: TrainerConfig, heldout: bool) -> None:
    """Refuses (`UserError`) `trainer.patience` where no rows are held out."""
    if trainer.patience is not None and not heldout:
        raise UserError(
            f"trainer.patience={trainer.patience}: no rows are held out, so there is no loss to watch; give "
            "data.heldout or data.heldout_fraction, or trainer.patience=null"
        )


class TimeLimit:
    """`trainer.time_limit`, counted from the moment that this is made; on several hosts process 0's clock counts."""

    def __init__(self, limit: str | None, hosts: Hosts):
        self._limit, self._hosts, self._started_at = limit, hosts, time.monotonic()

    def reached(self) -> bool:
        """Whether to save and end: the same answer on every process, for which they wait for each other."""
        seconds = seconds_of(self._limit) if self._limit is not None else None
        return seconds is not None and self._hosts.from_first(lambda: time.monotonic() - self._started_at >= seconds)

    def elapsed_seconds(self) -> float:
        """Since this start began."""
        return time.monotonic() - self._started_at

    def told(self) -> str:
        """Why it ended, and how it goes on."""
        return f"trainer.time_limit={self._limit} has passed; saved, and the same command with this run_dir resumes"
