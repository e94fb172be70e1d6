"""The plot of one iteration of the slowest loop, one group of layers: what core, HBM and links do at each moment."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from gemma4_tpu.planning.schedule import PARTS
from gemma4_tpu.planning.walk import CORE, HBM, Event, Walked, slowest_loop
from gemma4_tpu.plotting import new_figure

COLOURS = {
    "base_products": "#4c78c8", "lora": "#54a24b", "attention": "#e0a63a", "attention_glue": "#f2d28b",
    "elementwise": "#9d9d9d", "optimizer": "#b279a2", "collectives_exposed": "#d9692c", "copies": "#72b7b2",
    "loop": "#dddddd",
}  # fmt: skip
_NAMES = {
    "collectives_exposed": "collectives", "attention_glue": "around attention", "base_products": "base products",
    "loop": "inner loop",
}  # fmt: skip


def plot_timeline(walked: Walked, title: str, path: Path) -> None:
    """Draws rows for the core, for HBM (copies alongside the core) and for each set of interconnect links in use.

    Args:
      walked: the whole step's events.
      title: the plot's.
      path: PNG file to write.
    """
    once = slowest_loop(walked)
    rows = [CORE, HBM, *sorted({event.row for event in once.events} - {CORE, HBM})]
    labels = {CORE: "core", HBM: "HBM copies"} | {row: f"links along {row}" for row in rows[2:]}
    if len(rows) == 2:  # nothing is sent
        rows.append("")
        labels[""] = "links"
    with new_figure(path, (11, 1.8 + 0.55 * len(rows))) as figure:
        axes = figure.subplots()
        for part in (*PARTS, "loop"):
            drawn = False
            for place, row in enumerate(reversed(rows)):
                spans = _spans(event for event in once.events if (event.row, event.part) == (row, part))
                if spans:
                    label = None if drawn else _NAMES.get(part, part)
                    axes.broken_barh(spans, (place - 0.38, 0.76), facecolors=COLOURS[part], linewidth=0, label=label)
                    drawn = True
        axes.set_yticks(range(len(rows)), [labels[row] for row in reversed(rows)])
        axes.set_xlim(0, once.seconds * 1e3)
        axes.set_xlabel("ms (estimated by the compiler's schedule)")
        axes.set_title(title)
        axes.grid(visible=False)
        figure.legend(loc="outside lower center", ncols=5, fontsize=9)


def _spans(events: Iterable[Event]) -> list[tuple[float, float]]:
    """(start, length) in ms; adjacent spans are merged."""
    spans: list[tuple[float, float]] = []
    for event in sorted(events, key=lambda event: event.start):
        start, end = event.start * 1e3, event.end * 1e3
        if spans and start - sum(spans[-1]) < 1e-4:
            start = spans[-1][0]
            spans[-1] = (start, max(sum(spans[-1]), end) - start)
        else:
            spans.append((start, end - start))
    return spans
