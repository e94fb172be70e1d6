"""Running totals of a run, and the figures derived from them: the row of a logged update, the final result."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gemma4_tpu.data.pipeline import Update
from gemma4_tpu.tracking.result import Result, Totals
from gemma4_tpu.training.prediction import Prediction
from gemma4_tpu.training.rates import Rates
from gemma4_tpu.training.setup import Setup

HBM_KEYS = {"hbm_bytes": "bytes_in_use", "hbm_peak_bytes": "peak_bytes_in_use"}
"""Key of a metric → JAX's name for it."""


@dataclass
class Window:
    """Updates since the last logged row."""

    updates: int = 0
    real_tokens: int = 0
    target_tokens: int = 0
    seconds: float = 0.0


class Tally:
    """Tokens, time and losses of a run, including earlier starts."""

    def __init__(
        self, setup: Setup, rates: Rates, totals: Totals, prediction: Prediction | None = None,
        overhead_seconds: float = 0.0,
    ):  # fmt: skip
        """Continues from the `totals` of earlier starts; compares measured times with a plan's `prediction`.
        `overhead_seconds` is this start's time up to now, and what earlier starts spent in vain.
        """
        totals.overhead_seconds += overhead_seconds
        self._setup, self._rates, self._totals, self._prediction = setup, rates, totals, prediction
        self._update_seconds: list[float] = []
        self._ratios: list[float] = []
        self._window = Window()
        self._compiles = True  # the first update after a start compiles
        self._lap_at = time.perf_counter()
        self._started_at = self._lap_at - totals.seconds

    def totals(self) -> Totals:
        """The totals as of now."""
        self._totals.seconds = time.perf_counter() - self._started_at
        return self._totals

    def start_lap(self) -> None:
        """Starts timing the next update; the time since the last one counts for the run, but for no update."""
        self._lap_at = time.perf_counter()

    def count(self, update: Update, loss: float, measures: Mapping[str, float], *, skipped: bool) -> None:
        """Adds an update that is finished, or was skipped because its loss was a spike; `measures` are its
        objective's.
        """
        totals, window = self._totals, self._window
        now = time.perf_counter()
        seconds, self._lap_at = now - self._lap_at, now
        window.updates += 1
        window.real_tokens += update.real_tokens
        window.target_tokens += update.target_tokens
        window.seconds += seconds
        totals.updates += 1
        totals.skipped_updates += skipped
        totals.real_tokens += update.real_tokens
        totals.target_tokens += update.target_tokens
        totals.slots += round(update.real_tokens / update.fill)
        if not self._compiles:
            totals.timed_tokens += update.real_tokens
            totals.timed_seconds += seconds
            self._update_seconds.append(seconds)
            if self._prediction is not None:
                self._ratios.append(self._prediction.ratio(seconds, update.arrays["tokens"].shape[-1]))
        self._compiles = False
        if totals.train_loss_first is None:
            totals.train_loss_first = loss
        totals.train_loss_last = loss
        totals.measures |= measures

    def count_heldout(self, loss: float, update: int, measures: Mapping[str, float]) -> None:
        """Records the held-out loss after `update`, and the objective's measures."""
        totals = self._totals
        totals.measures |= measures
        if totals.heldout_loss_first is None:
            totals.heldout_loss_first = loss
        totals.heldout_loss_last = loss
        if totals.heldout_loss_best is None or loss < totals.heldout_loss_best:
            totals.heldout_loss_best, totals.heldout_update_best = loss, update

    def row(self, update: Update) -> dict[str, Any]:
        """Figures of the last counted update; rates are means since the previous row."""
        window, self._window = self._window, Window()
        rate, seconds = window.real_tokens / window.seconds, self.totals().seconds
        return {
            "epoch": update.epoch,
            "real_tokens": update.real_tokens,
            "target_tokens": update.target_tokens,
            "real_tokens_per_second": rate,
            "target_tokens_per_second": window.target_tokens / window.seconds,
            "fill": update.fill,
            "update_seconds": window.seconds / window.updates,
            "seconds": seconds,
            **_known(mfu=self._rates.mfu(rate), usd=self._rates.usd(seconds)),
            **hbm(self._setup.mesh.local_devices),
        }

    def _update_times(self) -> dict[str, Any]:
        """Measured times of updates, and what a plan predicted."""
        found = {"update_seconds": _percentile(self._update_seconds, 0.5)}
        if self._prediction is None:
            return found
        low, middle, high = (_percentile(self._ratios, share) for share in (0.1, 0.5, 0.9))
        return found | {
            "update_seconds_predicted": self._prediction.step_seconds,
            "predicted_by": self._prediction.plan,
            "measured_over_predicted": middle,
            "measured_over_predicted_low": low,
            "measured_over_predicted_high": high,
        }

    def result(self, status: str, ended: str | None = None) -> Result:
        """The run's result, and why it `ended` before its last update, if it did."""
        totals = self.totals()
        rate = totals.timed_tokens / totals.timed_seconds if totals.timed_seconds else None
        return Result(
            **asdict(totals),
            status=status,
            ended=ended,
            fill=totals.real_tokens / totals.slots if totals.slots else None,
            real_tokens_per_second=rate,
            goodput=_share(totals.timed_seconds, totals.seconds + totals.overhead_seconds),
            lora_parameters=self._setup.adapter_parameters,
            in_full_parameters=self._setup.in_full_parameters,
            adapted_modules=self._setup.adapted_modules,
            mfu=self._rates.mfu(rate),
            **self._update_times(),
            hbm_peak_bytes=hbm(self._setup.mesh.local_devices).get("hbm_peak_bytes"),
            usd=self._rates.usd(totals.seconds),
        )


def _percentile(values: list[float], share: float) -> float | None:
    """The nearest value that this share of them does not exceed; None for an empty list."""
    return sorted(values)[round(share * (len(values) - 1))] if values else None


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _known(**figures: float | None) -> dict[str, float]:
    return {name: figure for name, figure in figures.items() if figure is not None}


def hbm(devices: Iterable[Any]) -> dict[str, int]:
    """Device memory, where the backend reports it (TPUs and GPUs do, CPUs do not).

    `hbm_bytes` (now) and `hbm_peak_bytes` (since the start) of the fullest of this process's devices; empty if not
    reported.
    """
    counted = [stats for device in devices if (stats := device.memory_stats())]
    return {key: max(stats.get(name, 0) for stats in counted) for key, name in HBM_KEYS.items() if counted}
