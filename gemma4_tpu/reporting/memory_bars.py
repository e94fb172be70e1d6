"""The plot of what fills HBM: `hbm.png` of plans."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemma4_tpu.hardware import GIB, MeshSizes
from gemma4_tpu.planning.estimate import PlanResult
from gemma4_tpu.plotting import new_figure
from gemma4_tpu.reporting.plan_rows import MEMORY_PARTS, trained

_COLOURS = {
    "base": "#4c78c8", "weights": "#4c78c8", "lora": "#54a24b", "optimizer": "#e0a63a", "average": "#8e6bbf",
    "reference": "#b279a2",
    "teacher": "#9d755d",
    "batch": "#9d9d9d", "temporaries": "#d9692c", "free": "#f0f0f0",
}  # fmt: skip


def plot_hbm(results: Sequence[PlanResult], path: Path) -> None:
    """Draws one stacked bar of HBM per chip for each result, with the limit as a line."""
    with new_figure(path, (8, 1.8 + len(results))) as figure:
        _draw_bars(figure.subplots(), results)


def _draw_bars(axes: Any, results: Sequence[PlanResult]) -> None:
    drawn: set[str] = set()
    described = [_described(result) for result in results]
    common = [words for words, *others in zip(*described, strict=True) if all(other == words for other in others)]
    for place, result in enumerate(results):
        left = 0.0
        parts = result.hbm_parts_bytes_per_chip if result.fits else {"temporaries": result.hbm_bytes_per_chip or 0}
        for kind, size in parts.items():
            label = MEMORY_PARTS[kind] if kind not in drawn else None
            axes.barh(place, size / GIB, left=left, color=_COLOURS[kind], label=label, height=0.6)
            drawn.add(kind)
            left += size / GIB
        limit = result.hbm_limit_bytes_per_chip / GIB
        axes.plot([limit, limit], [place - 0.4, place + 0.4], color="#333333", linewidth=2)
        axes.text(limit, place + 0.42, f"{limit:.1f} GiB", ha="center", va="bottom", fontsize=8)
        label = ", ".join(words for words in described[place] if words not in common)
        axes.text(0, place + 0.34, label, transform=axes.get_yaxis_transform(), ha="left", va="bottom", fontsize=9)
    axes.set_yticks([])
    axes.set_ylim(-0.6, len(results) - 0.2)
    axes.set_xlabel("GiB of HBM per chip (estimated by the TPU compiler)")
    half = len(common) // 2
    axes.set_title("\n".join(", ".join(words) for words in (common[:half], common[half:]) if words), fontsize=10)
    axes.grid(axis="y", visible=False)
    axes.figure.legend(loc="outside lower center", ncols=3, fontsize=9)


def _described(result: PlanResult) -> list[str]:
    """What can differ between the bars of one plot."""
    rows, batches = result.rows_per_update // result.microbatches, result.microbatches
    return [
        result.model,
        trained(result),
        result.slice,
        str(MeshSizes.recorded(result.mesh)),
        f"remat {result.remat}",
        f"{rows} row{'s' * (rows > 1)} of {result.sequence_length} × {batches} microbatch{'es' * (batches > 1)}",
    ]
