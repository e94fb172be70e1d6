"""Curves over updates: those of a run folder's `plots/`, and those of a page, which must be legible on a phone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gemma4_tpu.hardware import GIB
from gemma4_tpu.plotting import COLOURS, INK, new_figure, running_means
from gemma4_tpu.tracking.metrics import HELDOUT, measures_of, read_metrics
from gemma4_tpu.tracking.run import RunFolder

SMOOTH_FROM_POINTS = 40
_SMALL = {"font.size": 11, "axes.titlesize": 12, "axes.titlepad": 10, "savefig.dpi": 170}
_INCHES = (5.0, 3.1)


class Followed(NamedTuple):
    """A run and its rows of `metrics.jsonl`."""

    name: str
    rows: Sequence[dict[str, Any]]


class _Curve(NamedTuple):
    file: str
    title: str
    key: str
    scale: float = 1.0
    smooth: bool = False


_PER_TOKEN = " (nats per target token)"
"""Not for objectives that count something else; those have their own measures."""
_CURVES = (
    _Curve("loss", f"training loss{_PER_TOKEN}", "loss", smooth=True),
    _Curve("heldout_loss", f"held-out loss{_PER_TOKEN}", "heldout_loss"),
    _Curve("learning_rate", "learning rate", "learning_rate"),
    _Curve("throughput", "real tokens per second", "real_tokens_per_second", smooth=True),
    _Curve("hbm", "device memory in use (GiB, fullest device)", "hbm_bytes", 1 / GIB),
)
NOT_RECORDED = {"heldout_loss": "held-out loss", "learning_rate": "learning rate", "hbm_bytes": "device memory",
                "real_tokens_per_second": "throughput", "loss": "training loss"}  # fmt: skip
"""Key of a row → the name of its curve."""


def draw_curves(runs: Sequence[Followed], folder: Path) -> list[Path]:
    """Draws a plot for each quantity that any run has recorded; a single run's losses share one plot.

    Returns:
      Paths, in display order.
    """
    drawn = []
    measures = measures_of(row for run in runs for row in run.rows)
    for curve in (*_CURVES, *map(_of_measure, measures), *(_of_measure(f"{HELDOUT}{name}") for name in measures)):
        own = curve.key.removeprefix(HELDOUT)
        if len(runs) == 1 and curve.key.startswith(HELDOUT) and own in _recorded(runs):
            continue  # both in one plot
        lines = [(run.name, *points_of(run.rows, curve.key, curve.scale)) for run in runs]
        if any(updates for _, updates, _ in lines):
            drawn.append(_draw(curve, lines, runs, folder / f"{curve.file}.png"))
    return drawn


def _of_measure(key: str) -> _Curve:
    words = key.removeprefix(HELDOUT).replace("_", " ")
    return _Curve(key, f"held-out {words}" if key.startswith(HELDOUT) else words, key, smooth=True)


def missing(runs: Sequence[Followed]) -> list[str]:
    """Names of the curves that no run has recorded."""
    return [words for key, words in NOT_RECORDED.items() if key not in _recorded(runs)]


def _recorded(runs: Sequence[Followed]) -> set[str]:
    return {key for run in runs for row in run.rows for key, value in row.items() if value is not None}


def _draw(
    curve: _Curve, lines: Sequence[tuple[str, list[int], list[float]]], runs: Sequence[Followed], path: Path
) -> Path:
    """Draws one plot."""
    from matplotlib.ticker import MaxNLocator

    with new_figure(path, _INCHES, _SMALL) as figure:
        axes = figure.subplots()
        for number, (name, updates, values) in enumerate(lines):
            _line(axes, updates, values, COLOURS[number % len(COLOURS)], name if len(lines) > 1 else None, curve.smooth)
        measures = measures_of(row for run in runs for row in run.rows)
        axes.set_title(curve.title.removesuffix(_PER_TOKEN) if measures else curve.title)
        if len(lines) == 1 and (curve.key == "loss" or curve.key in measures):
            _add_heldout(axes, runs[0], curve.key)
        axes.set_xlabel("update")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
        if curve.key != "heldout_loss" and not measures:
            axes.set_ylim(bottom=0)
        if curve.key == "learning_rate":
            axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4))
        elif max(max(values, default=0) for _, _, values in lines) >= 1000:
            axes.yaxis.set_major_formatter("{x:,.0f}")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=9.5)
    return path


def _line(axes: Any, updates: list[int], values: list[float], colour: str, label: str | None, smooth: bool) -> None:
    """Draws a line; many noisy points are drawn pale, behind their running mean."""
    marker = "o" if len(values) == 1 else ""
    if not smooth or len(values) < SMOOTH_FROM_POINTS:
        axes.plot(updates, values, color=colour, linewidth=1.8, marker=marker, label=label)
        return
    axes.plot(updates, values, color=colour, linewidth=0.8, alpha=0.3)
    window = max(5, len(values) // 25 | 1)
    means = running_means(values, window)
    axes.plot(updates, means, color=colour, linewidth=2, label=label or f"mean of {window} points")


def _add_heldout(axes: Any, run: Followed, key: str) -> None:
    updates, values = points_of(run.rows, f"{HELDOUT}{key}")
    if not values:
        return
    axes.set_title(axes.get_title().removeprefix("training "))
    axes.plot(updates, values, color=COLOURS[1], linewidth=2, marker="o", markersize=4, label="held-out")
    for at in {0, len(values) - 1}:
        axes.annotate(f"{values[at]:.3g}", (updates[at], values[at]), xytext=(0, 6), textcoords="offset points",
                      color=COLOURS[1], ha="left" if at == 0 else "right", va="bottom")  # fmt: skip


def points_of(rows: Sequence[dict[str, Any]], key: str, scale: float = 1.0) -> tuple[list[int], list[float]]:
    """(updates, values) of the rows that have this key with a finite value."""
    having = [row for row in rows if row.get(key) is not None and math.isfinite(row[key])]
    return [row["update"] for row in having], [row[key] * scale for row in having]


# ── a run folder's own plots ───────────────────────────────────────────────────────────────────────────────────────


def plot_run(run: RunFolder) -> list[Path]:
    """Draws `plots/loss.png` and `plots/throughput.png`, except plots without any point. Returns their paths."""
    rows = read_metrics(run.metrics_path)
    title = f"{run.path.parent.name} / {run.path.name}"
    drawn = []
    if points_of(rows, "loss")[0] or points_of(rows, "heldout_loss")[0]:
        drawn.append(_losses_of(rows, title, run.plots / "loss.png"))
    if points_of(rows, "real_tokens_per_second")[0]:
        drawn.append(_throughput_of(rows, title, run.plots / "throughput.png"))
    return drawn


def _losses_of(rows: Sequence[dict[str, Any]], title: str, path: Path) -> Path:
    updates, losses = points_of(rows, "loss")
    heldout_updates, heldout = points_of(rows, "heldout_loss")

    def draw(axes) -> None:
        smooth = len(losses) >= SMOOTH_FROM_POINTS
        if losses:
            label = None if smooth else "training"
            alpha = 0.3 if smooth else 1
            axes.plot(updates, losses, color=COLOURS[0], alpha=alpha, linewidth=1, marker=_marker(losses), label=label)
        if smooth:
            window = max(5, len(losses) // 25 | 1)
            means = running_means(losses, window)
            axes.plot(updates, means, color=COLOURS[0], linewidth=2, label=f"training (mean of {window} points)")
        if heldout:
            style = {"color": COLOURS[1], "linewidth": 2, "marker": "o", "markersize": 4}
            axes.plot(heldout_updates, heldout, label="held-out", **style)
            _label_ends(axes, heldout_updates, heldout)
        axes.set_ylabel("loss" if measures_of(rows) else f"loss{_PER_TOKEN}")
        axes.legend(loc="upper right")

    return _over_updates(draw, title, path)


def _label_ends(axes: Any, updates: Sequence[int], losses: Sequence[float]) -> None:
    """Writes the first and the last held-out loss next to their points."""
    axes.margins(x=0.09)
    for at, align, shift in {(0, "right", -7), (len(losses) - 1, "left", 7)}:
        axes.annotate(
            f"{losses[at]:.2f}", (updates[at], losses[at]), xytext=(shift, 0), textcoords="offset points",
            color=COLOURS[1], ha=align, va="center",
        )  # fmt: skip


def _throughput_of(rows: Sequence[dict[str, Any]], title: str, path: Path) -> Path:
    updates, rates = points_of(rows, "real_tokens_per_second")

    def draw(axes) -> None:
        median = statistics.median(rates)
        axes.plot(updates, rates, color=COLOURS[0], linewidth=1.5, marker=_marker(rates))
        axes.axhline(median, color=INK, linewidth=1, linestyle=(0, (4, 3)), label=f"median {median:,.0f}")
        axes.set_ylim(0, max(rates) * 1.12)
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.set_ylabel("real tokens per second")
        axes.legend(loc="lower right")

    return _over_updates(draw, title, path)


def _over_updates(draw: Callable[[Any], None], title: str, path: Path) -> Path:
    """Draws one plot over updates."""
    from matplotlib.ticker import MaxNLocator

    with new_figure(path, (7, 4)) as figure:
        axes = figure.subplots()
        draw(axes)
        axes.set_title(title)
        axes.set_xlabel("update")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return path


def _marker(values: Sequence[float]) -> str:
    """The marker: a line through a single point would be invisible."""
    return "o" if len(values) == 1 else ""
