"""Draws README's picture from the plans of this folder: what one job costs for each size, on two slices.

python experiments/plans/make_picture.py
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.plans.make_table import HERE, MACHINES, SIZES, known
from gemma4_tpu.plotting import COLOURS, INK, new_figure
from gemma4_tpu.reporting.plan_rows import band

SLICES = ("v5p-8", "v6e-4")
"""Those on which most sizes are planned to the end: four chips each."""
MODES = {"light": (INK, "#dddddd"), "dark": ("#d0d7de", "#3d444d")}
"""Mode → colours of text and of the grid; the background is the page's own."""
TITLE = "One epoch over 9,959 examples (9.2M tokens), LoRA of rank 64: dollars on demand"
SUBTITLE = "Estimated from the TPU compiler's schedule, as a range. Nothing here has run on a TPU yet."


@dataclass(frozen=True)
class SliceBar:
    """One size on one slice."""

    size: str
    machine: str
    usd: dict[str, float]
    """At `low` and `high`."""
    hours: dict[str, float]

    @property
    def label(self) -> str:
        return f"{self.machine}: ${band(self.usd, '{:.2f}')}, {band(self.hours, times=60)} min"


def bars() -> list[SliceBar]:
    """LoRA plans with a schedule and a price, the largest size first."""
    assert set(SLICES) <= set(MACHINES)
    plans = known()
    keys = [(size, machine) for size in SIZES for machine in SLICES]
    drawn = [(key, plans.get((*key, "lora"))) for key in keys]
    return [
        SliceBar(*key, usd=plan["usd_estimate"]["on_demand"], hours=plan["hours"])
        for key, plan in drawn
        if plan and plan["fits"] and plan.get("step_seconds") and "on_demand" in plan["usd_estimate"]
    ]


def draw(mode: str) -> Path:
    """`price_light.svg` or `price_dark.svg`."""
    ink, grid = MODES[mode]
    style: dict[str, Any] = {
        "text.color": ink, "axes.labelcolor": ink, "xtick.color": ink, "ytick.color": ink, "axes.edgecolor": ink,
        "grid.color": grid, "axes.grid.axis": "x", "savefig.transparent": True, "svg.hashsalt": "gemma4-tpu",
        "legend.labelcolor": ink,
    }  # fmt: skip
    path, shown = HERE / f"price_{mode}.svg", bars()
    with new_figure(path, (9.2, 3.6), style) as figure:
        axes = figure.subplots()
        for at, bar in enumerate(shown):
            low, high = sorted((bar.usd["low"], bar.usd["high"]))
            axes.barh(at, high - low, left=low, height=0.62, color=COLOURS[SLICES.index(bar.machine)])
            axes.text(high + 0.08, at, bar.label, va="center", fontsize=9)
        sizes = list(dict.fromkeys(bar.size for bar in shown))
        middles = [[at for at, bar in enumerate(shown) if bar.size == size] for size in sizes]
        axes.set_yticks([sum(places) / len(places) for places in middles], [_spoken(size) for size in sizes])
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.4 * max(max(bar.usd.values()) for bar in shown))
        axes.xaxis.set_major_formatter("${x:.0f}")
        axes.set_title(f"{SUBTITLE}", fontsize=9, color=ink, pad=6)
        figure.suptitle(TITLE, x=0.01, ha="left", fontsize=11, color=ink)
    return path


def _spoken(size: str) -> str:
    return size.removeprefix("gemma4_").upper().replace("_", "-")


if __name__ == "__main__":
    for each in MODES:
        print(draw(each))
