"""Builds this process's share of every update, and of the held-out batches, from tokenised rows for one mesh."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from gemma4_tpu.config.schema import DataConfig, TrainerConfig
from gemma4_tpu.data.build import TrainingData
from gemma4_tpu.data.picture_cache import Shown
from gemma4_tpu.data.pipeline import Pipeline, Source, Update, heldout_batches
from gemma4_tpu.models.sharding import row_places
from gemma4_tpu.training.checks import rows_per_microbatch, rows_per_update
from gemma4_tpu.training.setup import rows_here

log = logging.getLogger(__name__)


class Batches(NamedTuple):
    """The data that a run trains on and is evaluated on, update by update."""

    source: Source
    heldout: list[Update]
    """In a fixed order; empty without a held-out set."""
    rows: int
    """Rows per microbatch, over all processes."""
    segment_tokens: float
    """Mean length of a segment: of an example, or of one side of a pair."""
    shown: Shown | None = None
    """Features of the pictures."""

    @property
    def lengths(self) -> list[int]:
        """Static lengths T of all rows, sorted."""
        return sorted({*self.source.lengths, *(update.arrays["tokens"].shape[-1] for update in self.heldout)})


def make_batches(
    data: TrainingData, config: DataConfig, trainer: TrainerConfig, mesh: Mesh, on_policy: Source | None = None,
    shown: Shown | None = None,
) -> Batches:  # fmt: skip
    """Packs the rows into updates, unless the policy makes them, and the held-out rows into rows of the same lengths.

    Raises:
      UserError: the rows of an update do not divide evenly over the mesh, or there is nothing to train on.
    """
    rows = rows_per_microbatch(trainer, config, row_places(mesh))
    shape: dict[str, Any] = {
        "rows_per_update": rows_per_update(trainer, config),
        "microbatches": trainer.microbatches,
        "row_slice": rows_here(mesh, rows),
        "shown": shown,
    }
    source = on_policy or Pipeline(
        examples=data.train, data=config, seed=trainer.seed, epochs=trainer.epochs, max_updates=trainer.max_updates,
        **shape,
    )  # fmt: skip
    same_lengths = replace(config, buckets=source.lengths)
    heldout = list(heldout_batches(data.heldout, same_lengths, **shape)) if data.heldout else []
    updates, epochs = source.total_updates, source.total_epochs
    log.info("%d updates of %d rows: %.2f epochs", updates, shape["rows_per_update"], epochs)
    return Batches(source, heldout, rows, float(data.train.lengths(np.arange(len(data.train))).mean()), shown)
