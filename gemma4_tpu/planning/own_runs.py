"""`plan.calibration`: the band of measured over planned time from your own runs. Imports no JAX."""

from __future__ import annotations

import logging
from pathlib import Path

from gemma4_tpu.errors import UserError
from gemma4_tpu.hardware import SLICES, Chip
from gemma4_tpu.planning.calibration import Band
from gemma4_tpu.tracking.records import config_of
from gemma4_tpu.tracking.result import Result

log = logging.getLogger(__name__)

MARGIN = 1.1
"""Factor by which another configuration can lie outside the measured band. *Assumed*."""


def band_of_runs(place: Path, chip: Chip) -> Band:
    """From the 10th to the 90th percentile over the updates of all runs on this chip, plus a margin.

    Args:
      place: run folder, or a folder of them.
      chip: the chip planned for; runs on others do not count.

    Raises:
      UserError: there is no run, or none on this chip whose step was both predicted and measured.
    """
    runs = sorted({path.parent for pattern in ("result.json", "*/result.json") for path in place.glob(pattern)})
    found = [ratios for run in runs if (ratios := _ratios(run, chip)) is not None]
    if not found:
        raise UserError(
            f"plan.calibration={place}: of {len(runs)} run(s) none has measured_over_predicted in result.json "
            f"on {chip.name}; train with a plan at hand (trainer.plan) on such a slice first"
        )
    return Band(
        min(low for low, _ in found) / MARGIN, max(high for _, high in found) * MARGIN,
        f"{len(found)} own run(s) on {chip.name}, 10th to 90th percentile of updates, times {MARGIN:g} either way",
    )  # fmt: skip


def _ratios(run: Path, chip: Chip) -> tuple[float, float] | None:
    """(10th, 90th percentile) of measured over predicted time; None: another chip, or one of them is unknown."""
    try:
        result, config = Result.read(run / "result.json"), config_of(run)
    except UserError as error:
        raise UserError(f"plan.calibration: {run}: damaged, or no training run ({error})") from None
    name = config.get("hardware", {}).get("name")
    if name not in SLICES or SLICES[name].chip is not chip:
        log.info("plan.calibration: %s ran on %s, not %s", run, name, chip.name)
        return None
    low, high = result.measured_over_predicted_low, result.measured_over_predicted_high
    return None if low is None or high is None else (low, high)
