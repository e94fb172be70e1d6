"""The training loop, top to bottom: resume, held-out loss, updates, checkpoints, result."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import optax

from gemma4_tpu.config.outputs import CheckpointConfig
from gemma4_tpu.config.schema import TrainerConfig
from gemma4_tpu.data.pipeline import Update
from gemma4_tpu.errors import UserError
from gemma4_tpu.step.objective import means
from gemma4_tpu.step.train_step import TrainState, UpdateMetrics
from gemma4_tpu.tracking.metrics import HELDOUT, MetricsFile
from gemma4_tpu.tracking.result import Result, Totals
from gemma4_tpu.training.batches import Batches
from gemma4_tpu.training.checkpoint import Checkpoints
from gemma4_tpu.training.endings import Patience, TimeLimit
from gemma4_tpu.training.prediction import Prediction
from gemma4_tpu.training.preemption import Preemption
from gemma4_tpu.training.profile import Profile
from gemma4_tpu.training.programs import Programs
from gemma4_tpu.training.rates import Rates
from gemma4_tpu.training.setup import Setup, to_mesh
from gemma4_tpu.training.spikes import Spikes
from gemma4_tpu.training.tally import Tally
from gemma4_tpu.training.watchdog import Watchdog

log = logging.getLogger(__name__)


class Diverged(UserError):
    """NaN or infinity in the loss or the gradient."""


class InFlight(NamedTuple):
    """An update that the devices may still be computing."""

    done: int
    update: Update
    metrics: UpdateMetrics
    spike_limit: np.float32 | None


@dataclass(frozen=True)
class Loop:
    """A run in progress: its data, its programs, and where it reports."""

    setup: Setup
    batches: Batches
    checkpoints: Checkpoints
    trainer: TrainerConfig
    checkpoint: CheckpointConfig
    schedule: optax.Schedule
    rates: Rates
    fingerprints: dict[str, Any]
    """Of data, tokenizer and base weights; saved with every checkpoint."""
    report: Callable[[dict[str, Any], int], None]
    """Receives the metrics of an update: metrics.jsonl, tracker and progress bar."""
    preemption: Preemption
    time_limit: TimeLimit
    watchdog: Watchdog
    sample: Callable[[Any, int], None]
    """Called with the trained values at each held-out evaluation, to answer held-out prompts."""
    profile: Profile
    prediction: Prediction | None = None
    """The step time predicted by the run's plan."""
    history: MetricsFile | None = None
    """What has been reported so far."""

    def run(self, resume_from: int | None) -> Result:
        """Trains until the last update, or until something stops the run, and returns the result.

        Args:
          resume_from: the update whose checkpoint to resume from; None: from the start.

        Raises:
          Diverged: NaN or infinity; earlier checkpoints are kept.
        """
        state, totals, spikes, patience = self._begin(resume_from)
        overhead_seconds = self.time_limit.elapsed_seconds() + self._undone_seconds(totals)
        tally = Tally(self.setup, self.rates, totals, self.prediction, overhead_seconds)
        done, last = int(state.update), self.batches.source.total_updates
        programs = Programs(self.setup.step, state, self.batches.lengths, self.watchdog.paused)
        in_flight: list[InFlight] = []  # at most one
        preempted = timed_out = False

        def land() -> None:
            while in_flight:
                self._finish(in_flight.pop(), tally, spikes)

        def trained() -> Any:  # called if the next update depends on the result of the previous ones
            land()
            return state.trained

        # ── held-out loss before the first update ──────────────────────────────────────────────────────────────────
        if done == 0:
            self._evaluate(programs, state, tally, patience, 0)
        tally.start_lap()

        # ── updates: while the devices work on one, the host reads the metrics of the one before ───────────────────
        for update in () if patience.exhausted else self.batches.source.updates(trained):
            done += 1
            limit = spikes.limit(done)
            if self.profile.starts(done):  # the trace contains whole updates only
                land()
                self.profile.start()
                tally.start_lap()
            with self.profile.annotation(done):
                state, metrics = programs.train(state, self.setup.base, to_mesh(update.arrays, self.setup.mesh), limit)
            land()
            in_flight.append(InFlight(done, update, metrics, limit))
            if self.profile.ends(done):
                land()
                self.profile.stop()
                tally.start_lap()
            preempted, timed_out = self.preemption.reached(done), self.time_limit.reached()
            evaluates = done == last or _due(done, self.trainer.eval_every)
            saves = preempted or timed_out or done == last or _due(done, self.checkpoint.every)
            if not (evaluates or saves):
                continue

            # ── held-out loss and checkpoint: what is saved has been seen to be finite ─────────────────────────────
            land()
            heldout_loss = self._evaluate(programs, state, tally, patience, done) if evaluates else None
            best = self.checkpoint.keep_best and tally.totals().heldout_update_best == done
            if saves or best or patience.exhausted:
                self.batches.source.ready_to_save(state.trained, done)
                self.checkpoints.save(state, self._position(tally, spikes, patience), heldout_loss)
            tally.start_lap()
            if preempted or timed_out or patience.exhausted:
                break

        self.checkpoints.wait(state, self._position(tally, spikes, patience))
        if done == last or preempted:
            return tally.result("finished" if done == last else "preempted")
        if patience.exhausted:
            return tally.result("finished", patience.told())
        return tally.result("stopped", self.time_limit.told())

    def _begin(self, resume_from: int | None) -> tuple[TrainState, Totals, Spikes, Patience]:
        """State, sums and losses to continue from: fresh, or from a checkpoint."""
        state, totals, spikes = self.setup.state, Totals(), Spikes(self.trainer.spike_factor)
        patience = Patience(self.trainer)
        if resume_from is not None:
            state, position = self.checkpoints.restore(resume_from, state)
            self.batches.source.set_state(position["pipeline"], self.checkpoint.resume_allow)
            totals = Totals(**position["totals"])
            spikes = Spikes(self.trainer.spike_factor, **position["spikes"])
            patience = Patience.of(self.trainer, position)
            log.info("resumed from the checkpoint at update %d", resume_from)
            if self.history:
                self.history.compare(position.get("rows"))
        self.watchdog.progress()
        return state, totals, spikes, patience

    def _undone_seconds(self, totals: Totals) -> float:
        """Seconds of updates that an earlier start made after the checkpoint resumed from."""
        reported = self.history.undone_at_seconds if self.history else None
        return max(0.0, reported - totals.seconds) if reported is not None else 0.0

    def _position(self, tally: Tally, spikes: Spikes, patience: Patience) -> dict[str, Any]:
        """What a resumed run needs besides the training state, as JSON."""
        return {
            "fingerprints": self.fingerprints,
            "schedule": {
                "updates": self.batches.source.total_updates,
                "learning_rate": float(self.schedule(tally.totals().updates - 1)),
            },
            "pipeline": self.batches.source.get_state(),
            "totals": asdict(tally.totals()),
            "spikes": {"losses": spikes.losses, "newest_at": spikes.newest_at},
            "patience": patience.saved(),
            "rows": self.history.rows if self.history else None,
        }

    def _finish(self, flight: InFlight, tally: Tally, spikes: Spikes) -> None:
        """Waits for an update, checks and counts it, and reports it if due."""
        loss, grad_norm = float(flight.metrics.loss), float(flight.metrics.grad_norm)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._stop_diverged(flight.done, flight.update, loss, grad_norm)
        self.batches.source.landed(flight.done, loss)
        self.preemption.something_to_save()
        self.watchdog.progress()
        skipped = spikes.add(flight.done, loss, flight.spike_limit)
        measures = means(flight.metrics.stats) | {**flight.update.figures}
        tally.count(flight.update, loss, measures, skipped=skipped)
        if skipped:
            log.warning(
                "update %d skipped: loss %.4f is above %.4f (trainer.spike_factor=%g times the median); it used the"
                " rows %s", flight.done, loss, flight.spike_limit, spikes.factor, ", ".join(_row_names(flight.update)),
            )  # fmt: skip
        if flight.done % self.trainer.log_every == 0 or flight.done == self.batches.source.total_updates:
            more = {} if spikes.factor is None else {"skipped_updates": tally.totals().skipped_updates}
            learning_rate = float(self.schedule(flight.done - 1))
            row = {"loss": loss, **measures, "learning_rate": learning_rate, "grad_norm": grad_norm, **more}
            self.report(row | tally.row(flight.update), flight.done)

    def _evaluate(
        self, programs: Programs, state: TrainState, tally: Tally, patience: Patience, update: int
    ) -> float | None:
        """Mean loss over the held-out set, without dropout, of the values to evaluate; reported and remembered."""
        if not self.batches.heldout:
            return None
        total, count, values = 0.0, 0.0, state.evaluated()
        sums: dict[str, Any] = {}
        for batch in self.batches.heldout:
            summed, part, stats = programs.evaluate(values, self.setup.base, to_mesh(batch.arrays, self.setup.mesh))
            total, count = total + float(summed), count + float(part)
            sums = {name: np.add(sums.get(name, 0.0), np.array(pair, np.float64)) for name, pair in stats.items()}
            self.watchdog.progress()
        loss, measures = total / count, {f"{HELDOUT}{name}": value for name, value in means(sums).items()}
        self.report({"heldout_loss": loss, **measures}, update)
        with self.watchdog.paused():
            self.sample(values, update)
        tally.count_heldout(loss, update, measures)
        patience.add(loss)
        return loss

    def _stop_diverged(self, done: int, update: Update, loss: float, grad_norm: float) -> None:
        rows = _row_names(update)
        log.error("update %d used the rows %s", done, ", ".join(rows))
        shown = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more (log.txt lists them)" if len(rows) > 8 else "")
        kept = self.checkpoints.updates
        raise Diverged(
            f"update {done}: loss {loss:g}, gradient norm {grad_norm:g}; it used the rows {shown}. "
            + (f"The last good checkpoint is at update {kept[-1]}. " if kept else "There is no checkpoint yet. ")
            + "Inspect these rows, or lower optimizer.learning_rate."
        )


def _due(done: int, every: int) -> bool:
    """Whether something that happens every `every` updates is due; 0: never."""
    return bool(every) and done % every == 0


def _row_names(update: Update) -> list[str]:
    """Where the examples of an update came from, sorted."""
    return sorted({str(origin) for row in update.origins() for origin in row})
