"""One way to draw: colours, style, a figure that is saved when it is done. Imports matplotlib inside functions only."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#333333"
COLOURS = ("#4c78c8", "#d9692c", "#54a24b", "#8e6bbf", "#3aa6a6", "#b0567d", "#e0a63a", "#777777", "#9c7a4f")
STYLE: Any = {
    "font.size": 10,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titlepad": 14,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": True,
    "legend.edgecolor": "none",
    "legend.labelcolor": INK,
    "savefig.dpi": 150,
}


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


def draw_titled(draw: Callable[[Any], None], title: str, path: Path, inches: tuple[float, float]) -> Path:
    """One pair of axes, drawn on by `draw`, under a title for the whole picture."""
    with new_figure(path, inches) as figure:
        draw(figure.subplots())
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    return path


def running_means(values: Sequence[float], window: int) -> list[float]:
    """The mean of the `window` values around each one (fewer at the ends)."""
    half = window // 2
    return [statistics.fmean(values[max(0, at - half) : at + half + 1]) for at in range(len(values))]
