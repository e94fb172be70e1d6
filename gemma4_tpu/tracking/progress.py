"""Progress of a run as a person sees it: a bar on a terminal, occasional lines elsewhere, and a summary at the end."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

from rich import progress
from rich.console import Console
from rich.text import Text

from gemma4_tpu.markdown import shown
from gemma4_tpu.prices import format_usd
from gemma4_tpu.tracking.logs import console
from gemma4_tpu.tracking.metrics import HELDOUT
from gemma4_tpu.tracking.result import Result
from gemma4_tpu.tracking.run import RunFolder

log = logging.getLogger(__name__)


class Progress:
    """Progress over the updates of a run; use it as a context manager.

    On a terminal a bar shows update, loss, real tokens/s and the time left; elsewhere a log line does, at most every
    `seconds_between_lines`. Both fit into 80 columns.
    """

    def __init__(
        self, total_updates: int, *, first_update: int = 0, show: bool = True, seconds_between_lines: float = 5.0,
        beside_loss: str | None = None,
    ):  # fmt: skip
        """Starts at `first_update` (that of the checkpoint, in a resumed run); `show=False` prints nothing.

        `beside_loss`: a measure to show with the held-out loss, or until there is one with the other.
        """
        self._beside_loss = beside_loss
        self._total = total_updates
        self._update = first_update
        self._seconds_between_lines = seconds_between_lines
        self._last_line_at = -float("inf")
        self._timed_from: tuple[int, float] | None = None
        self._metrics: dict[str, Any] = {}
        self._show = show
        self._bar = _bar() if show and console().is_terminal else None
        if self._bar:
            self._task = self._bar.add_task("", total=total_updates, completed=first_update, facts="compiling")

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, update: int) -> None:
        """Tells that `update` updates are done."""
        self._update = update
        if self._timed_from is None:  # the first update of a process compiles, so the time left counts from its end
            self._timed_from = (update, time.monotonic())
        if self._bar:
            self._bar.update(self._task, completed=update, facts=self._facts())

    def log(self, metrics: dict[str, Any], update: int) -> None:
        """Shows `loss`, `heldout_loss` and `real_tokens_per_second`, as far as `metrics` has them."""
        self._metrics.update(metrics)
        if update > self._update:
            self.advance(update)
        if self._bar:
            self._bar.update(self._task, facts=self._facts())
        elif self._show and (self._is_line_due() or update >= self._total):
            self._last_line_at = time.monotonic()
            log.info("%d/%d  %s", self._update, self._total, self._facts())

    def seconds_left(self) -> float | None:
        """Time to the last update, at the mean pace since the first; None before two updates."""
        if self._timed_from is None or self._update <= self._timed_from[0]:
            return None
        first, since = self._timed_from
        return (time.monotonic() - since) / (self._update - first) * (self._total - self._update)

    def _is_line_due(self) -> bool:
        return time.monotonic() - self._last_line_at >= self._seconds_between_lines

    def _facts(self) -> str:
        rate = self._metrics.get("real_tokens_per_second")
        left = self.seconds_left()
        facts = [
            *self._losses(),
            f"{rate:,.0f} tok/s" if rate is not None else "",
            f"ETA {_clock(left)}" if left is not None else "",
        ]
        return "  ".join(fact for fact in facts if fact)

    def _losses(self) -> list[str]:
        """Both losses, as far as they are known; the last one with the measure."""
        known = [(label, prefix) for label, prefix in (("loss", ""), ("held-out", HELDOUT))
                 if self._metrics.get(f"{prefix}loss") is not None]  # fmt: skip
        told = [f"{label} {self._metrics[f'{prefix}loss']:.4f}" for label, prefix in known]
        if known and (beside := self._metrics.get(f"{known[-1][1]}{self._beside_loss}")) is not None:
            told[-1] += f" ({self._beside_loss} {beside:.2f})"
        return told


def _bar() -> progress.Progress:
    return progress.Progress(
        progress.BarColumn(bar_width=None),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[facts]}"),
        console=console(),
        expand=True,
    )


def print_summary(run: RunFolder, result: Result, next_steps: Sequence[str] = ()) -> None:
    """Prints the run's result to stdout, and what to do next (commands or paths, one per line)."""
    rows = [("Run folder", shown(run.path)), ("Status", _ended(result))]
    if result.heldout_loss_last is not None:
        best = f"  (best {result.heldout_loss_best:.4f}" if result.heldout_loss_best is not None else ""
        at = f" at update {result.heldout_update_best}" if best and result.heldout_update_best is not None else ""
        first = f"{result.heldout_loss_first:.4f} → " if result.heldout_loss_first is not None else ""
        rows.append(("Held-out loss", f"{first}{result.heldout_loss_last:.4f}{best}{at}{')' * bool(best)}"))
    if result.measures:
        rows.append(("Measures", ", ".join(f"{name} {value:.4g}" for name, value in shown_measures(result).items())))
    fill = f", fill {result.fill:.1%}" if result.fill is not None else ""
    rows.append(("Trained on", f"{result.real_tokens:,} real tokens ({result.target_tokens:,} with loss){fill}"))
    rate = f", {result.real_tokens_per_second:,.0f} real tokens/s" if result.real_tokens_per_second else ""
    rows.append(("Time", f"{format_seconds(result.seconds)} for {result.updates:,} updates{rate}"))
    if result.usd is not None:
        rows.append(("Cost", format_usd(result.usd)))
    rows += [("Next" if number == 0 else "", step) for number, step in enumerate(next_steps)]
    out = Console(highlight=False)
    out.print()
    for label, value in rows:
        out.print(Text(f"{label:<15}", style="bold").append(value, style="not bold"), soft_wrap=True)


def shown_measures(result: Result) -> dict[str, float]:
    """What the objective says of the held-out set at last, under `heldout_…`, or else of the last update."""
    heldout = {name: value for name, value in result.measures.items() if name.startswith(HELDOUT)}
    return heldout or result.measures


def _ended(result: Result) -> str:
    reason = result.error or result.ended
    return result.status + (f": {reason}" if reason else "")


def format_seconds(seconds: float) -> str:
    """`4.2 s`, `3 min 12 s`, `5 h 07 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
