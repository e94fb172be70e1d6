"""Points of a load from benchmark results under the key names of `vllm bench serve`: one JSON object per cell.

The setup (model, slice, dtypes) comes from the configuration of the server that was asked, where its record is known.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gemma4_tpu.costing.figures import MEASURED, Point
from gemma4_tpu.hardware import LOCAL

_NEEDED = {"output_throughput", "total_input_tokens", "total_output_tokens", "completed"}


def read_points(folder: Path) -> list[Point] | None:
    """The points of a benchmark's folder; None: it is none. Cells in which no request was completed are left out."""
    cells = [
        (path, cell)
        for path in sorted({*folder.glob("*.json"), *folder.glob("cells/*.json")})
        if (cell := _cell(path)) is not None
    ]
    return [_point(path, cell) for path, cell in cells if cell["completed"]] if cells else None


def _cell(path: Path) -> dict[str, Any] | None:
    try:
        cell = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return cell if isinstance(cell, dict) and cell.keys() >= _NEEDED else None


def _point(path: Path, cell: dict[str, Any]) -> Point:
    n = cell["completed"]
    rate = cell.get("request_rate")
    mean_in, mean_out = cell["total_input_tokens"] / n, cell["total_output_tokens"] / n
    return Point(
        name=f"{mean_in:.0f} in, {mean_out:.0f} out, rate {rate}",
        label=MEASURED,
        source=str(path),
        slice=LOCAL,
        input_tokens=mean_in,
        output_tokens=mean_out,
        sequences=cell.get("max_concurrency") or n,
        output_tokens_per_second=cell["output_throughput"],
        whole=True,
        ttft_seconds=_seconds(cell.get("median_ttft_ms")),
        tpot_seconds=_seconds(cell.get("median_tpot_ms")),
    )


def _seconds(milliseconds: float | None) -> float | None:
    return milliseconds / 1000 if milliseconds else None
