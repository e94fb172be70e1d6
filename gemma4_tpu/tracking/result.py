"""`result.json`: the result of a run, under keys that sweeps, reports and later stages rely on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from gemma4_tpu.tracking.records import TRAINING, read_record, write_record


@dataclass(kw_only=True)
class Totals:
    """Totals over a run, interruptions included; saved with every checkpoint.

    Unknown figures are None (null). Losses are means in nats per target token; those of other objectives are in nats
    per unit that they count.
    """

    updates: int = 0
    """Optimizer updates done, including those before a resume."""
    skipped_updates: int = 0
    """Of these, updates that changed nothing because their loss was a spike (`trainer.spike_factor`)."""
    seconds: float = 0.0
    """Wall-clock time of all updates and evaluations, including compilation and the time before a resume."""
    real_tokens: int = 0
    """Non-padding tokens trained on."""
    target_tokens: int = 0
    """Tokens with loss trained on."""
    slots: int = 0
    """Token slots trained on, padding included."""
    timed_tokens: int = 0
    """Real tokens of the updates timed in `timed_seconds`: all except the first after each start (compilation)."""
    timed_seconds: float = 0.0
    """Update time of `timed_tokens`."""
    overhead_seconds: float = 0.0
    """Time not in `seconds`: before each start's updates (loading, placing), and of updates that a kill undid. Starts
    that were killed before they saved count only with their updates.
    """
    train_loss_first: float | None = None
    """Training loss of the first update."""
    train_loss_last: float | None = None
    """Training loss of the last update."""
    heldout_loss_first: float | None = None
    """Held-out loss before the first update."""
    heldout_loss_last: float | None = None
    """Held-out loss after the last update."""
    heldout_loss_best: float | None = None
    """Lowest held-out loss seen."""
    heldout_update_best: int | None = None
    """The update at which it occurred."""
    measures: dict[str, float] = field(default_factory=dict)
    """The objective's measures besides its loss: of the last update and, as `heldout_…`, of the last evaluation."""


@dataclass(kw_only=True)
class Result(Totals):
    """Totals of a run, how it ended, and derived figures; None (null) where unknown."""

    status: str
    """`finished`; `stopped` by `trainer.time_limit` or `preempted` (saved; the same command resumes); `failed` (see
    `error` and log.txt).
    """
    ended: str | None = None
    """One line on why its own settings ended it before its last update; for a `finished` run, `trainer.patience`."""
    error: str | None = None
    """One line on why the run failed."""
    fill: float | None = None
    """Real tokens over token slots."""
    real_tokens_per_second: float | None = None
    """Real tokens per second of update time, over all chips, without the first update (compilation)."""
    goodput: float | None = None
    """Share of the run's time spent training: `timed_seconds` over `seconds` plus `overhead_seconds`. The rest is
    loading, compilation, evaluation, waiting for checkpoints, and updates that a kill undid.
    """
    lora_parameters: int | None = None
    """Trained LoRA parameters; 0 for full fine-tuning."""
    in_full_parameters: int | None = None
    """Parameters of the weights that were trained in full (`lora.modules_to_train`, or all of them)."""
    adapted_modules: int | None = None
    """Weight matrices that carry an adapter."""
    mfu: float | None = None
    """Mean model FLOP/s utilisation, where the chip's peak is known."""
    hbm_peak_bytes: int | None = None
    """Peak memory of the fullest device of process 0 since the (last) start, where the backend reports it."""
    update_seconds: float | None = None
    """Median seconds per update since the last start, without the first (compilation)."""
    update_seconds_predicted: float | None = None
    """The update time that the plan `predicted_by` predicts (`step_seconds`); null on hardware that is not a slice."""
    predicted_by: str | None = None
    """The plan's file."""
    measured_over_predicted: float | None = None
    """Median over updates of measured over predicted time, since the last start."""
    measured_over_predicted_low: float | None = None
    measured_over_predicted_high: float | None = None
    """The 10th and the 90th percentile of the same."""
    usd: float | None = None
    """Cost of `seconds` on the slice, if its price is known."""

    def write(self, path: Path) -> None:
        """Writes `RunFolder.result_path`, atomically."""
        write_record(path, TRAINING, self)

    @classmethod
    def read(cls, path: Path) -> Result:
        """Reads a `result.json`; ignores keys of newer versions."""
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in read_record(path, TRAINING).values.items() if key in known})
