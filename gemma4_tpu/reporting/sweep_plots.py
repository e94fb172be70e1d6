"""Plots of a sweep: parallel coordinates, the metric over each numeric key, held-out curves of all jobs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemma4_tpu.plotting import INK, draw_titled
from gemma4_tpu.reporting.curves import points_of
from gemma4_tpu.sweeping import state
from gemma4_tpu.sweeping.table import JobRow, SweepTable
from gemma4_tpu.tracking.metrics import read_metrics

_BEST, _PALE = "#d9692c", "#9db4dd"
_COLOURS = ("#4c78c8", "#54a24b", "#e0a63a", "#8e6bbf", "#3aa6a6", "#b0567d", "#777777", "#9c7a4f")
_MAX_LEGEND = len(_COLOURS)
_MAX_TICKS = 9


def plot_sweep(sweep: SweepTable, folder: Path) -> list[Path]:
    """Draws the plots for which there are figures; returns their paths. Jobs without the metric are left out."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    known = [row for row in sweep.rows if row.value(sweep.metric.key) is not None]
    keys = [key for key in sweep.keys if len({row.job.values.get(key) for row in known}) > 1]
    drawn = []
    if len(known) > 1 and keys:
        drawn.append(_parallel(sweep, known, keys, folder / "parallel_coordinates.png"))
        numeric = [key for key in keys if all(_number(row.job.values.get(key)) is not None for row in known)]
        drawn += [_over_key(sweep, known, key, keys, folder / f"{key}.png") for key in numeric]
    if curves := _curves(sweep.rows):
        drawn.append(_heldout(sweep, curves, folder / "heldout_loss.png"))
    return drawn


# ── parallel coordinates ───────────────────────────────────────────────────────────────────────────────────────────
class _Axis:
    """One vertical axis: the values of a key or of the metric, from 0 (bottom) to 1."""

    def __init__(self, label: str, values: Sequence[str | float | None], *, metric: bool = False):
        self.label = label
        texts = list(dict.fromkeys(str(value) for value in values))
        numbers = [_number(value) for value in values]
        known = [number for number in numbers if number is not None]
        self._logarithmic = not metric and bool(known) and min(known) > 0 and max(known) >= 8 * min(known)
        if len(known) == len(values):
            low, high = min(map(self._scaled, known)), max(map(self._scaled, known))
            spread = (high - low) or 1.0
            self.places = {text: (self._scaled(float(text)) - low) / spread for text in texts}
        else:
            self.places = {text: i / max(1, len(texts) - 1) for i, text in enumerate(texts)}
        few = not metric and len(texts) <= _MAX_TICKS
        ends = sorted(texts, key=self.places.__getitem__)
        self.ticks = texts if few else [ends[0], ends[-1]]
        self._metric = metric

    def _scaled(self, value: float) -> float:
        return math.log(value) if self._logarithmic else value

    def place(self, value: str | float | None) -> float:
        return self.places[str(value)]

    def tick(self, text: str) -> str:
        return f"{float(text):.4g}" if self._metric else text


def _parallel(sweep: SweepTable, rows: Sequence[JobRow], keys: list[str], path: Path) -> Path:
    metric, best = sweep.metric, sweep.best
    values = [row.value(metric.key) for row in rows]
    axes_of = [_Axis(key, [row.job.values.get(key) for row in rows]) for key in keys]
    axes_of.append(_Axis(metric.key, values, metric=True))

    def draw(axes: Any) -> None:
        from matplotlib import colormaps

        order = sorted(rows, key=lambda row: row is best)  # the best on top
        for row in order:
            given = [row.job.values.get(key) for key in keys] + [row.value(metric.key)]
            heights = [axis.place(value) for axis, value in zip(axes_of, given, strict=True)]
            goodness = 1 - heights[-1] if metric.direction == state.LOWER_IS_BETTER else heights[-1]
            colour = _BEST if row is best else colormaps["Blues"](0.3 + 0.6 * goodness)
            axes.plot(range(len(heights)), heights, color=colour, linewidth=3 if row is best else 1.8, alpha=0.95)
        for x, axis in enumerate(axes_of):
            axes.axvline(x, color=INK, linewidth=1)
            last = x == len(axes_of) - 1
            for text in axis.ticks:
                axes.annotate(
                    axis.tick(text), (x, axis.places[text]), xytext=(8 if last else -8, 0), textcoords="offset points",
                    ha="left" if last else "right", va="center", color=INK,
                    bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
                )  # fmt: skip
        axes.set_xticks(range(len(axes_of)), [axis.label.replace(".", ".\n", 1) for axis in axes_of])
        axes.tick_params(axis="x", length=0)
        axes.set_yticks([])
        axes.margins(x=0.14, y=0.06)
        axes.grid(False)
        axes.spines[["left", "bottom"]].set_visible(False)
        if best is not None:
            axes.plot([], [], color=_BEST, linewidth=3, label=f"best: {best.job.name}")
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0))

    return draw_titled(draw, sweep.title, path, (max(7.0, 1.9 * len(axes_of)), 4))


# ── the metric over one key ────────────────────────────────────────────────────────────────────────────────────────
def _over_key(sweep: SweepTable, rows: Sequence[JobRow], key: str, keys: list[str], path: Path) -> Path:
    """Draws one line for each combination of the other keys, as far as lines can be distinguished."""
    metric, best = sweep.metric, sweep.best
    others = [other for other in keys if other != key]
    groups: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        name = ", ".join(f"{other}={row.job.values.get(other)}" for other in others)
        x, y = _number(row.job.values.get(key)), row.value(metric.key)
        assert x is not None and y is not None
        groups.setdefault(name, []).append((x, y))
    lines = len(groups) <= _MAX_LEGEND

    def draw(axes: Any) -> None:
        for number, (name, points) in enumerate(groups.items()):
            x, y = zip(*sorted(points), strict=True)
            colour = _COLOURS[number] if lines else _PALE
            axes.plot(x, y, color=colour, marker="o", linewidth=1.8 if lines else 0, label=name if lines else None)
        if best is not None:
            at = (_number(best.job.values.get(key)), best.value(metric.key))
            axes.plot(*[[v] for v in at], "o", markersize=13, markerfacecolor="none", color=_BEST, label="best")
        _scale(axes, sorted({point[0] for points in groups.values() for point in points}))
        axes.set_xlabel(key)
        axes.set_ylabel(metric.key)
        axes.margins(x=0.08, y=0.12)
        _legend_beside(axes)

    return draw_titled(draw, sweep.title, path, (9.0, 4))


def _scale(axes: Any, values: list[float]) -> None:
    """Sets a logarithmic axis if values are orders of magnitude apart; labels each of a few values."""
    from matplotlib.ticker import NullLocator

    if values[0] > 0 and values[-1] >= 4 * values[0]:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
    if len(values) <= _MAX_TICKS:
        axes.set_xticks(values, [f"{value:g}" for value in values])


# ── curves ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def _curves(rows: Sequence[JobRow]) -> dict[str, tuple[list[int], list[float]]]:
    """Job → (updates, held-out losses)."""
    curves = {}
    for row in rows:
        points = points_of(read_metrics(row.folder / "metrics.jsonl"), "heldout_loss")
        if points[0]:
            curves[row.job.name] = points
    return curves


def _heldout(sweep: SweepTable, curves: dict[str, tuple[list[int], list[float]]], path: Path) -> Path:
    best = sweep.best

    def draw(axes: Any) -> None:
        few = len(curves) <= _MAX_LEGEND
        for number, (name, (updates, losses)) in enumerate(curves.items()):
            if best is not None and name == best.job.name:
                continue
            colour = _COLOURS[number] if few else _PALE
            axes.plot(updates, losses, color=colour, marker="o", markersize=4, label=name if few else None)
        if best is not None and best.job.name in curves:
            label = f"best: {best.job.name}"
            axes.plot(*curves[best.job.name], color=_BEST, linewidth=2.5, marker="o", markersize=5, label=label)
        axes.set_xlabel("update")
        axes.set_ylabel("held-out loss (nats per target token)")
        _legend_beside(axes)

    return draw_titled(draw, sweep.title, path, (9.0, 4))


def _legend_beside(axes: Any) -> None:
    """Places the legend to the right of the axes, where it hides no line."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
