"""Curves of a run, drawn from `metrics.jsonl`: losses and throughput."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma4_tpu.tracking.metrics import read_metrics
from gemma4_tpu.tracking.run import RunFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TRAIN, _HELDOUT, _INK, _FAINT = "#4c78c8", "#d9692c", "#333333", "#dddddd"
STYLE: Any = {
    "font.size": 10,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titlepad": 14,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.8,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": True,
    "legend.edgecolor": "none",
    "legend.labelcolor": _INK,
    "savefig.dpi": 150,
}
SMOOTH_FROM_POINTS = 40

Points = tuple[list[int], list[float]]


def plot_run(run: RunFolder) -> list[Path]:
    """Draws `plots/loss.png` and `plots/throughput.png`; a plot without any point is left out. Returns their paths."""
    rows = read_metrics(run.metrics_path)
    title = f"{run.path.parent.name} / {run.path.name}"
    drawn = []
    if _points(rows, "loss")[0] or _points(rows, "heldout_loss")[0]:
        drawn.append(_plot_loss(rows, title, run.plots / "loss.png"))
    if _points(rows, "real_tokens_per_second")[0]:
        drawn.append(_plot_throughput(rows, title, run.plots / "throughput.png"))
    return drawn


def _plot_loss(rows: list[dict[str, Any]], title: str, path: Path) -> Path:
    updates, losses = _points(rows, "loss")
    heldout_updates, heldout = _points(rows, "heldout_loss")

    def draw(axes) -> None:
        smooth = len(losses) >= SMOOTH_FROM_POINTS
        if losses:
            label = None if smooth else "training"
            alpha = 0.3 if smooth else 1
            axes.plot(updates, losses, color=_TRAIN, alpha=alpha, linewidth=1, marker=_marker(losses), label=label)
        if smooth:
            window = max(5, len(losses) // 25 | 1)
            means = running_means(losses, window)
            axes.plot(updates, means, color=_TRAIN, linewidth=2, label=f"training (mean of {window} points)")
        if heldout:
            axes.plot(heldout_updates, heldout, color=_HELDOUT, linewidth=2, marker="o", markersize=4, label="held-out")
            _label_ends(axes, heldout_updates, heldout)
        axes.set_ylabel("loss (nats per target token)")
        axes.legend(loc="upper right")

    return _save(draw, title, path)


def _label_ends(axes: Any, updates: Sequence[int], losses: Sequence[float]) -> None:
    """Writes the first and the last held-out loss beside their points."""
    axes.margins(x=0.09)
    for at, align, shift in {(0, "right", -7), (len(losses) - 1, "left", 7)}:
        axes.annotate(
            f"{losses[at]:.2f}", (updates[at], losses[at]), xytext=(shift, 0), textcoords="offset points",
            color=_HELDOUT, ha=align, va="center",
        )  # fmt: skip


def _plot_throughput(rows: list[dict[str, Any]], title: str, path: Path) -> Path:
    updates, rates = _points(rows, "real_tokens_per_second")

    def draw(axes) -> None:
        median = statistics.median(rates)
        axes.plot(updates, rates, color=_TRAIN, linewidth=1.5, marker=_marker(rates))
        axes.axhline(median, color=_INK, linewidth=1, linestyle=(0, (4, 3)), label=f"median {median:,.0f}")
        axes.set_ylim(0, max(rates) * 1.12)
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.set_ylabel("real tokens per second")
        axes.legend(loc="lower right")

    return _save(draw, title, path)


@contextmanager
def new_figure(path: Path, inches: tuple[float, float], style: dict[str, Any] | None = None) -> Iterator[Figure]:
    """A figure to draw on, without pyplot (no display, no global state); saved to `path` at the end.

    `style` holds rcParams besides `STYLE`.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE | (style or {})):
        figure = Figure(figsize=inches, layout="constrained")
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def _save(draw: Callable[[Any], None], title: str, path: Path) -> Path:
    """One pair of axes over updates."""
    from matplotlib.ticker import MaxNLocator

    with new_figure(path, (7, 4)) as figure:
        axes = figure.subplots()
        draw(axes)
        axes.set_title(title)
        axes.set_xlabel("update")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return path


def _points(rows: Sequence[dict[str, Any]], key: str) -> Points:
    """(updates, values) of the rows that have this key with a finite value."""
    having = [row for row in rows if row.get(key) is not None and math.isfinite(row[key])]
    return [row["update"] for row in having], [row[key] for row in having]


def _marker(values: Sequence[float]) -> str:
    """A line through a single point would not be seen."""
    return "o" if len(values) == 1 else ""


def running_means(values: Sequence[float], window: int) -> list[float]:
    """The mean of the `window` values around each one (fewer at the ends)."""
    half = window // 2
    return [statistics.fmean(values[max(0, at - half) : at + half + 1]) for at in range(len(values))]
