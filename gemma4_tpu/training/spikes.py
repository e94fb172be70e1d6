"""Loss spikes: an update whose loss is far above the recent ones is skipped on the devices, and changes nothing."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

import numpy as np

WINDOW_UPDATES = 64
"""Updates that the running median is taken over."""
WARMUP_UPDATES = 16
"""Losses that must be known before any update is skipped."""


@dataclass
class Spikes:
    """The running median, saved with every checkpoint so that a resumed run skips the very same updates.

    The limit of update u is made of the losses up to u - 2: while u is sent to the devices, u - 1 is still under way.
    """

    factor: float | None
    """`trainer.spike_factor`; None: never."""
    losses: list[float] = field(default_factory=list)
    """Of the latest updates that were not skipped, the newest last."""
    newest_at: int = 0
    """The update that the last loss was seen at."""

    def limit(self, update: int) -> np.float32 | None:
        """float32 scalar: a larger loss skips `update`; None: spikes are not looked for."""
        if self.factor is None:
            return None
        known = self.losses[:-1] if self.newest_at == update - 1 else self.losses
        known = known[-WINDOW_UPDATES:]
        return np.float32(self.factor * statistics.median(known) if len(known) >= WARMUP_UPDATES else math.inf)

    def add(self, update: int, loss: float, limit: np.float32 | None) -> bool:
        """Takes the loss of a finished update; returns whether it was skipped."""
        if limit is None:
            return False
        if skipped := bool(np.float32(loss) > limit):
            return skipped
        self.losses, self.newest_at = [*self.losses[-WINDOW_UPDATES:], loss], update
        return skipped
