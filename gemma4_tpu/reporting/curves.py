"""Curves of one or several runs over their updates, small enough to be read on a telephone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gemma4_tpu.hardware import GIB
from gemma4_tpu.tracking.plots import SMOOTH_FROM_POINTS, new_figure, running_means

COLOURS = ("#4c78c8", "#d9692c", "#54a24b", "#8e6bbf", "#3aa6a6", "#b0567d", "#e0a63a", "#777777")
_SMALL = {"font.size": 11, "axes.titlesize": 12, "axes.titlepad": 10, "savefig.dpi": 170}
_INCHES = (5.0, 3.1)


class Followed(NamedTuple):
    """A run by its rows of `metrics.jsonl`."""

    name: str
    rows: Sequence[dict[str, Any]]


class _Curve(NamedTuple):
    file: str
    title: str
    key: str
    scale: float = 1.0
    smooth: bool = False


_CURVES = (
    _Curve("loss", "training loss (nats per target token)", "loss", smooth=True),
    _Curve("heldout_loss", "held-out loss (nats per target token)", "heldout_loss"),
    _Curve("learning_rate", "learning rate", "learning_rate"),
    _Curve("throughput", "real tokens per second", "real_tokens_per_second", smooth=True),
    _Curve("hbm", "device memory in use (GiB, fullest device)", "hbm_bytes", 1 / GIB),
)
NOT_RECORDED = {"heldout_loss": "held-out loss", "learning_rate": "learning rate", "hbm_bytes": "device memory",
                "real_tokens_per_second": "throughput", "loss": "training loss"}  # fmt: skip
"""Key of a row → its curve in words."""


def draw_curves(runs: Sequence[Followed], folder: Path) -> list[Path]:
    """One picture for each quantity that any run has recorded; a single run's losses share one.

    Returns:
      Paths, in the order in which they are to be seen.
    """
    drawn = []
    for curve in _CURVES:
        if len(runs) == 1 and curve.key == "heldout_loss" and "loss" in _recorded(runs):
            continue
        lines = [(run.name, *_points(run.rows, curve)) for run in runs]
        if any(updates for _, updates, _ in lines):
            drawn.append(_draw(curve, lines, runs, folder / f"{curve.file}.png"))
    return drawn


def missing(runs: Sequence[Followed]) -> list[str]:
    """Curves, in words, that no run has recorded."""
    return [words for key, words in NOT_RECORDED.items() if key not in _recorded(runs)]


def _recorded(runs: Sequence[Followed]) -> set[str]:
    return {key for run in runs for row in run.rows for key, value in row.items() if value is not None}


def _draw(
    curve: _Curve, lines: Sequence[tuple[str, list[int], list[float]]], runs: Sequence[Followed], path: Path
) -> Path:
    """One pair of axes."""
    from matplotlib.ticker import MaxNLocator

    with new_figure(path, _INCHES, _SMALL) as figure:
        axes = figure.subplots()
        for number, (name, updates, values) in enumerate(lines):
            _line(axes, updates, values, COLOURS[number % len(COLOURS)], name if len(lines) > 1 else None, curve.smooth)
        axes.set_title(curve.title)
        if len(lines) == 1 and curve.key == "loss":
            _add_heldout(axes, runs[0])
        axes.set_xlabel("update")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
        if curve.key != "heldout_loss":
            axes.set_ylim(bottom=0)
        if curve.key == "learning_rate":
            axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4))
        elif max(max(values, default=0) for _, _, values in lines) >= 1000:
            axes.yaxis.set_major_formatter("{x:,.0f}")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=9.5)
    return path


def _line(axes: Any, updates: list[int], values: list[float], colour: str, label: str | None, smooth: bool) -> None:
    """Many noisy points stand pale behind their running mean."""
    marker = "o" if len(values) == 1 else ""
    if not smooth or len(values) < SMOOTH_FROM_POINTS:
        axes.plot(updates, values, color=colour, linewidth=1.8, marker=marker, label=label)
        return
    axes.plot(updates, values, color=colour, linewidth=0.8, alpha=0.3)
    window = max(5, len(values) // 25 | 1)
    means = running_means(values, window)
    axes.plot(updates, means, color=colour, linewidth=2, label=label or f"mean of {window} points")


def _add_heldout(axes: Any, run: Followed) -> None:
    updates, values = _points(run.rows, _CURVES[1])
    if not values:
        return
    axes.set_title("loss (nats per target token)")
    axes.plot(updates, values, color=COLOURS[1], linewidth=2, marker="o", markersize=4, label="held-out")
    for at in {0, len(values) - 1}:
        axes.annotate(f"{values[at]:.3g}", (updates[at], values[at]), xytext=(0, 6), textcoords="offset points",
                      color=COLOURS[1], ha="left" if at == 0 else "right", va="bottom")  # fmt: skip


def _points(rows: Sequence[dict[str, Any]], curve: _Curve) -> tuple[list[int], list[float]]:
    """(updates, values) of the rows that have it with a finite value."""
    having = [row for row in rows if row.get(curve.key) is not None and math.isfinite(row[curve.key])]
    return [row["update"] for row in having], [row[curve.key] * curve.scale for row in having]
