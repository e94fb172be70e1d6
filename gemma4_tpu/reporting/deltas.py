"""What the merge added, and where: a table and a plot of the deltas' norms, by layer and module."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gemma4_tpu.markdown import table
from gemma4_tpu.plotting import new_figure
from gemma4_tpu.tracking.files import write_text
from gemma4_tpu.tracking.records import DELTAS, write_record
from gemma4_tpu.tracking.run import RunFolder

if TYPE_CHECKING:
    from gemma4_tpu.export.merge import Delta

_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_deltas(deltas: Sequence[Delta], record: RunFolder, title: str) -> Path:
    """Writes `deltas.json` (every weight), `deltas.md` (by module) and `plots/deltas.png`; returns the table's path."""
    rows = [
        {
            "name": d.name, "delta_norm": d.norm, "base_norm": d.base_norm, "relative": d.relative,
            "changed_fraction": d.changed_values / d.values,
        }
        for d in deltas
    ]  # fmt: skip
    write_record(record.path / "deltas.json", DELTAS, {"weights": rows})
    page = record.path / "deltas.md"
    write_text(page, "\n".join(_lines(deltas, title)))
    _plot(deltas, title, record.plots / "deltas.png")
    return page


def _lines(deltas: Sequence[Delta], title: str) -> Iterator[str]:
    yield from [f"# Delta norms: {title}", ""]
    yield "Frobenius norm of each delta divided by that of its base weight; share of values that changed in this dtype."
    yield ""
    rows = []
    for module in _modules(deltas):
        own = [d for d in deltas if _place(d)[1] == module]
        low, high = min(own, key=lambda d: d.relative), max(own, key=lambda d: d.relative)
        changed = sum(d.changed_values for d in own) / sum(d.values for d in own)
        norms = (statistics.median(d.relative for d in own), low.relative, high.relative)
        layer = _place(high)[0]
        at = "–" if layer is None else layer
        rows.append([module, len(own), *(f"{norm:.2e}" for norm in norms), at, f"{changed:.1%}"])
    heads = ["module", "weights", "median", "smallest", "largest", "at layer", "values changed"]
    yield from table(heads, rows, "lrrrrrr")


def _place(delta: Delta) -> tuple[int | None, str]:
    """(layer, module): `model.layers.3.self_attn.q_proj.weight` is (3, `q_proj`)."""
    found = re.search(r"layers\.(\d+)\.(.+)$", delta.name)
    layer, rest = (int(found[1]), found[2]) if found else (None, delta.name)
    rest = rest.removesuffix(".weight")
    last = rest.rsplit(".", 1)[-1]
    return layer, last if last in _MODULES and "experts" not in rest else rest


def _modules(deltas: Sequence[Delta]) -> list[str]:
    there = dict.fromkeys(_place(d)[1] for d in deltas)
    return [m for m in _MODULES if m in there] + [m for m in there if m not in _MODULES]


def _plot(deltas: Sequence[Delta], title: str, path: Path) -> None:
    """Draws a heat map of layers (across) and modules (down), coloured by relative norm; grey: no delta."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    in_layers = [d for d in deltas if _place(d)[0] is not None]
    modules = _modules(in_layers)
    layers = 1 + max((_place(d)[0] or 0 for d in in_layers), default=0)
    grid = np.full((len(modules), layers), np.nan)
    for delta in in_layers:
        layer, module = _place(delta)
        grid[modules.index(module), layer] = delta.relative if delta.norm else np.nan
    seen = grid[np.isfinite(grid)]
    low, high = (seen.min(), seen.max()) if seen.size else (1e-6, 1.0)
    inches = max(6.0, 3.2 + 0.16 * layers), 1.6 + 0.32 * len(modules)
    with new_figure(path, inches, {"axes.grid": False}) as figure:
        axes = figure.subplots()
        axes.set_facecolor("#e8e8e8")
        scale = LogNorm(low, max(high, low * 1.01))
        image = axes.pcolormesh(grid, cmap="viridis", norm=scale, edgecolors="white", linewidth=0.6)
        axes.invert_yaxis()
        axes.set_yticks(np.arange(len(modules)) + 0.5, modules)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
        labels = [int(tick) for tick in axes.get_xticks() if 0 <= tick < layers]
        axes.set_xticks([label + 0.5 for label in labels], [str(label) for label in labels])
        axes.tick_params(length=0)
        axes.set_xlabel("layer")
        for side in axes.spines.values():
            side.set_visible(False)
        axes.set_title(f"‖delta‖ / ‖base weight‖: {title}")
        bar = figure.colorbar(image, ax=axes, pad=0.01)
        for which in (bar.ax.yaxis.set_major_formatter, bar.ax.yaxis.set_minor_formatter):
            which(lambda value, _: f"{100 * value:.2g}%")
