"""The training loop, top to bottom: resume, held-out loss, updates, checkpoints, result."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import optax

from gemma4_tpu.config.schema import CheckpointConfig, TrainerConfig
from gemma4_tpu.data.pipeline import Pipeline, Update
from gemma4_tpu.errors import UserError
from gemma4_tpu.step.train_step import Metrics, TrainState
from gemma4_tpu.tracking.result import Result, Totals
from gemma4_tpu.training.checkpoint import Checkpoints
from gemma4_tpu.training.clock import Clock, Window, count_update
from gemma4_tpu.training.hbm import hbm
from gemma4_tpu.training.job import Job, to_mesh
from gemma4_tpu.training.preemption import Preemption
from gemma4_tpu.training.programs import Programs
from gemma4_tpu.training.rates import Rates
from gemma4_tpu.training.spikes import Spikes
from gemma4_tpu.training.watchdog import Watchdog

log = logging.getLogger(__name__)


class Diverged(UserError):
    """NaN or infinity in the loss or the gradient."""


class InFlight(NamedTuple):
    """An update that the devices may still be working on."""

    done: int
    update: Update
    metrics: Metrics
    spike_limit: np.float32 | None


@dataclass(frozen=True)
class Loop:
    """A run under way: what it trains, on what, and where it reports."""

    job: Job
    pipeline: Pipeline
    heldout: list[Update]
    """Batches of the held-out set, in a fixed order; empty: there is none."""
    checkpoints: Checkpoints
    trainer: TrainerConfig
    checkpoint: CheckpointConfig
    schedule: optax.Schedule
    rates: Rates
    fingerprints: dict[str, Any]
    """Of data, tokenizer and base weights; saved with every checkpoint."""
    report: Callable[[dict[str, Any], int], None]
    """Takes the metrics of an update: metrics.jsonl, tracker and progress bar."""
    flush: Callable[[], None]
    """Called before each save: what was reported is then where the checkpoint will be."""
    preemption: Preemption
    watchdog: Watchdog
    sample: Callable[[Any, int], None]
    """Takes the trained values at each held-out evaluation: answers to held-out prompts."""

    def run(self, resume_from: int | None) -> Result:
        """Trains to the last update, or to the one that a preemption stops at, and returns the result.

        Args:
          resume_from: the update whose checkpoint to continue from; None: from the start.

        Raises:
          Diverged: NaN or infinity; the checkpoints before it are kept.
        """
        # ── state: fresh or restored ───────────────────────────────────────────────────────────────────────────────
        state, totals, spikes = self.job.state, Totals(), Spikes(self.trainer.spike_factor)
        if resume_from is not None:
            state, position = self.checkpoints.restore(resume_from, state)
            self.pipeline.set_state(position["pipeline"], self.checkpoint.resume_allow)
            totals = Totals(**position["totals"])
            spikes = Spikes(self.trainer.spike_factor, **position["spikes"])
            log.info("resumed from the checkpoint at update %d", resume_from)
        self.watchdog.progress()
        clock = Clock(earlier_seconds=totals.seconds)
        done, last, stops = int(state.update), self.pipeline.total_updates, False
        lengths = sorted({*self.pipeline.lengths, *map(_length, self.heldout)})
        programs = Programs(self.job.step, state, lengths, self.watchdog.paused)

        # ── held-out loss before the first update ──────────────────────────────────────────────────────────────────
        if done == 0:
            self._evaluate(programs, state, totals, 0)
        clock.lap()

        # ── updates: while the devices work on one, the host reads the metrics of the one before ───────────────────
        window, in_flight = Window(), None
        for update in self.pipeline:
            done += 1
            limit = spikes.limit(done)
            state, metrics = programs.train(state, self.job.base, to_mesh(update.arrays, self.job.mesh), limit)
            if in_flight:
                window = self._finish(in_flight, window, totals, spikes, clock)
            in_flight = InFlight(done, update, metrics, limit)
            stops = self.preemption.reached(done)
            evaluates = done == last or (self.trainer.eval_every and done % self.trainer.eval_every == 0)
            saves = stops or done == last or done % self.checkpoint.every == 0
            if not (evaluates or saves):
                continue

            # ── held-out loss and checkpoint: what is saved has been seen to be finite ─────────────────────────────
            window, in_flight = self._finish(in_flight, window, totals, spikes, clock), None
            heldout_loss = self._evaluate(programs, state, totals, done) if evaluates else None
            if saves or (self.checkpoint.keep_best and heldout_loss is not None and totals.heldout_update_best == done):
                totals.seconds = clock.total
                self.flush()
                self.checkpoints.save(state, self._position(totals, spikes), heldout_loss)
            clock.lap()
            if stops:
                break

        # ── result ─────────────────────────────────────────────────────────────────────────────────────────────────
        self.checkpoints.wait()
        totals.seconds = clock.total
        return self._result("preempted" if stops and done < last else "finished", totals)

    def _position(self, totals: Totals, spikes: Spikes) -> dict[str, Any]:
        """What a resumed run needs besides the training state, as JSON."""
        return {
            "fingerprints": self.fingerprints,
            "pipeline": self.pipeline.get_state(),
            "totals": asdict(totals),
            "spikes": {"losses": spikes.losses, "newest_at": spikes.newest_at},
        }

    def _finish(self, flight: InFlight, window: Window, totals: Totals, spikes: Spikes, clock: Clock) -> Window:
        """Waits for an update, checks and counts it, and reports it if it is due; returns the window to go on with."""
        loss, grad_norm = float(flight.metrics.loss), float(flight.metrics.grad_norm)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._stop_diverged(flight.done, flight.update, loss, grad_norm)
        self.preemption.something_to_save()
        self.watchdog.progress()
        window.add(flight.update, clock.lap())
        count_update(totals, flight.update, loss, window)
        if spikes.add(flight.done, loss, flight.spike_limit):
            totals.skipped_updates += 1
            rows = _row_names(flight.update)
            log.warning(
                "update %d skipped: loss %.4f is above %.4f (trainer.spike_factor=%g times the median); made from the"
                " rows %s", flight.done, loss, flight.spike_limit, spikes.factor, ", ".join(rows),
            )  # fmt: skip
        totals.seconds = clock.total
        if flight.done % self.trainer.log_every and flight.done != self.pipeline.total_updates:
            return window
        self.report(self._row(flight, loss, grad_norm, totals, window), flight.done)
        return Window(first=False)

    def _evaluate(self, programs: Programs, state: TrainState, totals: Totals, update: int) -> float | None:
        """Mean loss over the held-out set, dropout off; reported and remembered."""
        if not self.heldout:
            return None
        total, count = 0.0, 0
        for batch in self.heldout:
            summed, targets = programs.evaluate(state.trained, self.job.base, to_mesh(batch.arrays, self.job.mesh))
            total, count = total + float(summed), count + int(targets)
            self.watchdog.progress()
        loss = total / count
        self.report({"heldout_loss": loss}, update)
        with self.watchdog.paused():
            self.sample(state.trained, update)
        if totals.heldout_loss_first is None:
            totals.heldout_loss_first = loss
        totals.heldout_loss_last = loss
        if totals.heldout_loss_best is None or loss < totals.heldout_loss_best:
            totals.heldout_loss_best, totals.heldout_update_best = loss, update
        return loss

    def _row(self, flight: InFlight, loss: float, grad_norm: float, totals: Totals, window: Window) -> dict[str, Any]:
        """The metrics of one logged update; rates are means since the row before."""
        rate = window.real_tokens / window.seconds
        return {
            "loss": loss,
            "learning_rate": float(self.schedule(flight.done - 1)),
            "grad_norm": grad_norm,
            "epoch": flight.update.epoch,
            "real_tokens": flight.update.real_tokens,
            "target_tokens": flight.update.target_tokens,
            "real_tokens_per_second": rate,
            "target_tokens_per_second": window.target_tokens / window.seconds,
            "fill": flight.update.fill,
            "update_seconds": window.seconds / window.updates,
            "seconds": totals.seconds,
            **({"skipped_updates": totals.skipped_updates} if self.trainer.spike_factor is not None else {}),
            **self._utilisation(rate),
            **hbm(self.job.mesh.local_devices),
            **({"usd": self._usd(totals.seconds)} if self.rates.usd_per_hour is not None else {}),
        }

    def _utilisation(self, tokens_per_second: float | None) -> dict[str, float]:
        peak = self.rates.peak_flops_per_second
        if not peak or tokens_per_second is None:
            return {}
        return {"mfu": tokens_per_second * self.rates.flops_per_token / peak}

    def _usd(self, seconds: float) -> float | None:
        return None if self.rates.usd_per_hour is None else self.rates.usd_per_hour * seconds / 3600

    def _stop_diverged(self, done: int, update: Update, loss: float, grad_norm: float) -> None:
        rows = _row_names(update)
        log.error("update %d was made from the rows %s", done, ", ".join(rows))
        shown = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more (log.txt lists them)" if len(rows) > 8 else "")
        kept = self.checkpoints.updates
        raise Diverged(
            f"update {done}: loss {loss:g}, gradient norm {grad_norm:g}; made from the rows {shown}. "
            + (f"The last good checkpoint is at update {kept[-1]}. " if kept else "There is no checkpoint yet. ")
            + "Look at these rows, or lower optimizer.learning_rate."
        )

    def _result(self, status: str, totals: Totals) -> Result:
        rate = totals.timed_tokens / totals.timed_seconds if totals.timed_seconds else None
        return Result(
            **asdict(totals),
            status=status,
            fill=totals.real_tokens / totals.slots if totals.slots else None,
            real_tokens_per_second=rate,
            lora_parameters=0 if self.job.step.full else self.job.trained_parameters,
            adapted_modules=self.job.adapted_modules,
            mfu=self._utilisation(rate).get("mfu"),
            hbm_peak_bytes=hbm(self.job.mesh.local_devices).get("hbm_peak_bytes"),
            usd=self._usd(totals.seconds),
        )


def _length(update: Update) -> int:
    return update.arrays["tokens"].shape[-1]


def _row_names(update: Update) -> list[str]:
    """Where the examples of an update came from, sorted."""
    return sorted({str(origin) for row in update.origins() for origin in row})
