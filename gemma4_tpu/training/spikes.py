"""Loss spikes: an update whose loss is far above recent ones is skipped on the devices, and changes nothing."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

import numpy as np

WINDOW_UPDATES = 64
"""Updates in the running median."""
WARMUP_UPDATES = 16
"""Losses that must be known before any update is skipped."""


@dataclass
class Spikes:
    """The running median, saved with every checkpoint so that a resumed run skips exactly the same updates.

    The limit for update u comes from the losses up to u - 2, because u - 1 is still running when u is dispatched.
    """

    factor: float | None
    """`trainer.spike_factor`; None: never skip."""
    losses: list[float] = field(default_factory=list)
    """Of the latest updates that were not skipped, newest last."""
    newest_at: int = 0
    """The update of the last loss."""

    def limit(self, update: int) -> np.float32 | None:
        """float32 scalar: a larger loss skips `update`; None: nothing is skipped."""
        if self.factor is None:
            return None
        known = self.losses[:-1] if self.newest_at == update - 1 else self.losses
        known = known[-WINDOW_UPDATES:]
        return np.float32(self.factor * statistics.median(known) if len(known) >= WARMUP_UPDATES else math.inf)

    def add(self, update: int, loss: float, limit: np.float32 | None) -> bool:
        """Adds the loss of a finished update; returns whether it was skipped."""
        if limit is None:
            return False
        if skipped := bool(np.float32(loss) > limit):
            return skipped
        self.losses, self.newest_at = [*self.losses[-WINDOW_UPDATES:], loss], update
        return skipped
