"""How many real tokens an update of the configured run has, and how many updates there are.

Lengths come from the rows themselves if readable, else from stated lengths; both are packed by the code that training
uses.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field, replace
from statistics import NormalDist
from typing import Any

import numpy as np

from gemma4_tpu.config.schema import DataConfig, ModelConfig, TrainerConfig
from gemma4_tpu.config.tasks import PlanConfig
from gemma4_tpu.data.examples import Examples
from gemma4_tpu.data.forms import CONVERSATIONS
from gemma4_tpu.data.updates import Updates
from gemma4_tpu.errors import UserError
from gemma4_tpu.planning.kernels import Mask
from gemma4_tpu.training.recipe import rows_per_update

log = logging.getLogger(__name__)
ROWS_LOOKED_AT = 500
"""Number of rows used to estimate what attention skips."""


@dataclass(frozen=True)
class Fill:
    """The result of packing a run's data."""

    examples: int
    mean_tokens: float
    """Per example."""
    segment_tokens: float
    """Mean of a segment: of an example, or of a side of a pair."""
    real_tokens_per_update: float
    """Mean over the run, over all chips."""
    fill: float
    """Real tokens as a share of the slots."""
    length_share: float
    """Mean length of the updates' rows over T; 1 unless rows have buckets."""
    updates: int
    source: str
    """`measured` or `assumed`, and from what."""
    rows: list[np.ndarray] = field(default_factory=list)
    """Tokens of each segment, for some rows of T."""

    def share_visited(self, mask: Mask, length: int) -> float:
        """Share of the blocks that `mask` leaves, in rows of `length` tokens, in which two tokens of one example meet.

        `splash` skips the others at run time: ranges of examples that do not overlap. Padding counts as one example.
        """
        if not self.rows:
            return 1.0
        blocks = mask.visited(length)
        met = 0
        for row in self.rows:
            example = np.repeat(np.arange(len(row) + 1), [*row, length - row.sum()])
            (first_q, last_q), (first_kv, last_kv) = (_ends(example, size) for size in (mask.block_q, mask.block_kv))
            met += sum(first_q[i] <= last_kv[j] and first_kv[j] <= last_q[i] for i, j in blocks)
        return met / (len(blocks) * len(self.rows))


@dataclass(frozen=True)
class Lengths:
    """Training examples with their real or assumed lengths."""

    examples: Examples
    source: str
    """As `Fill.source`."""


def lengths_of(
    model: ModelConfig, data: DataConfig, stated: PlanConfig, rows_are: str = CONVERSATIONS, *, data_here: bool
) -> Lengths:
    """Measures the lengths of the training examples by tokenising them, or assumes the `stated` ones.

    Raises:
      UserError: the data is here but cannot be read.
    """
    if data_here:
        return Lengths(
            _read(model, data, rows_are), f"measured: {', '.join(s.path for s in data.train)}, tokenised here"
        )
    lengths = _stated_lengths(stated, data)
    examples, dropped = _of_lengths(lengths), _stated_rows(stated, data) - len(lengths)
    without = f", {dropped:,} longer ones dropped" if dropped else ""
    return Lengths(
        examples,
        f"assumed: {len(examples):,} examples{without}, lognormal lengths of mean {stated.mean_tokens:g} and 99th"
        f" percentile {stated.p99_tokens:g} tokens (plan.rows, plan.mean_tokens, plan.p99_tokens)",
    )


def fill_of(lengths: Lengths, data: DataConfig, trainer: TrainerConfig) -> Fill:
    """Packs the examples into rows and updates, as training does."""
    examples, rows = lengths.examples, rows_per_update(trainer, data)
    plan = Updates(
        examples, data, rows_per_update=rows, seed=trainer.seed, epochs=trainer.epochs, max_updates=trainer.max_updates
    )
    # Each pass over the data packs alike, so the first ones represent a long run.
    looked_at = min(len(plan), 5000)
    slots, real, row_tokens = examples.slots, 0, 0
    whole: list[np.ndarray] = []
    for update in (plan[u] for u in range(looked_at)):
        real += sum(int(slots[row].sum()) for row in update.rows)
        row_tokens += update.length
        if update.length == data.sequence_length and len(whole) < ROWS_LOOKED_AT:
            whole += [examples.lengths(row) for row in update.rows]
    mean, share = real / looked_at, row_tokens / looked_at / data.sequence_length
    fill = mean / (rows * data.sequence_length * share)
    segments = float(examples.lengths(np.arange(len(examples))).mean())
    return Fill(len(examples), float(slots.mean()), segments, mean, fill, share, len(plan), lengths.source, whole)


def _ends(example: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last example in each block of `size` tokens."""
    starts = np.arange(0, len(example), size)
    return example[starts], example[np.minimum(starts + size, len(example)) - 1]


def _read(model: ModelConfig, data: DataConfig, rows_are: str) -> Examples:
    from gemma4_tpu.data.build import build_data
    from gemma4_tpu.data.seen import picture_reader
    from gemma4_tpu.data.tokenizer import load_tokenizer
    from gemma4_tpu.models.base import resolve_base

    named: Any = model if model.path else replace(model, path="random:0")
    base = resolve_base(named)
    tokenizer = load_tokenizer(base.tokenizer_folder, base.new_tokens)
    return build_data(data, tokenizer, rows_are, picture_reader(base, data)).train


def _stated_rows(plan: PlanConfig, data: DataConfig) -> int:
    return plan.rows if data.max_rows is None else min(plan.rows, data.max_rows)


def _stated_lengths(plan: PlanConfig, data: DataConfig) -> np.ndarray:
    """int64 [rows]: quantiles of the lognormal distribution with this mean and 99th percentile.

    Those beyond T are left out, as training drops them; but if the 99th percentile fits, so does the last 1%, of which
    nothing is stated.

    Raises:
      UserError: none is left.
    """
    rows = _stated_rows(plan, data)
    tail = NormalDist().inv_cdf(0.99)
    spread = math.log(plan.p99_tokens / plan.mean_tokens)
    # mean = exp(µ + σ²/2) and p99 = exp(µ + tail·σ); no lognormal is steeper than σ = tail
    sigma = tail - math.sqrt(max(tail**2 - 2 * spread, 0.0))
    mu = math.log(plan.mean_tokens) - sigma**2 / 2
    normal = NormalDist(mu, sigma) if sigma else None
    lengths = [math.exp(normal.inv_cdf((i + 0.5) / rows)) if normal else plan.mean_tokens for i in range(rows)]
    whole = np.maximum(np.round(lengths), 1).astype(np.int64)
    if plan.p99_tokens <= data.sequence_length:
        return np.minimum(whole, data.sequence_length)
    if not (fitting := whole[whole <= data.sequence_length]).size:
        raise UserError(
            f"plan.mean_tokens={plan.mean_tokens:g}: no row fits into data.sequence_length={data.sequence_length}, and"
            " training drops longer ones; give a larger data.sequence_length, or the lengths of your rows"
        )
    return fitting


def _of_lengths(slots: np.ndarray) -> Examples:
    """Examples with these lengths and no content."""
    offsets = np.concatenate([[0], np.cumsum(slots + 1)])
    total, count = int(offsets[-1]), len(slots)
    return Examples(
        tokens=np.zeros(total, np.int32),
        flags=np.zeros(total, bool),
        offsets=offsets,
        source=np.zeros(count, np.int16),
        weights=(1.0,),
        files=("",),
        file=np.zeros(count, np.int32),
        row=np.arange(1, count + 1),
    )
