"""Points of a load from benchmark results under the key names of `vllm bench serve`: one JSON object per cell.

What was asked comes from `config.yaml` next to the cells: `served` (a record of `gemma4_tpu.serve`) or `slice` and
`architecture`, as `gemma4_tpu.bench` writes them; `serving` with `run`; `hardware.name` and `model.name`; or from a
`setup` of a `figures.yaml` that lists the folder. Without any of them the slice is `local` and no ceiling is known.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma4_tpu.architectures import ARCHITECTURES, ArchitectureError, from_hf_config
from gemma4_tpu.costing.ceiling import ModelDemand, Serving
from gemma4_tpu.costing.figures import MEASURED, Point
from gemma4_tpu.errors import UserError
from gemma4_tpu.hardware import LOCAL, SLICES
from gemma4_tpu.models.kv_cache import DTYPE_BYTES
from gemma4_tpu.tracking.records import CELL, config_of, read_record

log = logging.getLogger(__name__)

_MERGED = "merged"
_OVERLOADED = "overloaded"  # throughput is valid, but latencies measure the queue


def read_points(folder: Path, *, setup: Serving | None = None, system: str | None = None) -> list[Point] | None:
    """The points of a benchmark's folder (`*.json`, `cells/*.json`); None if it is not one.

    Args:
      folder: with a JSON object per cell. Cells with failed requests are skipped, and logged.
      setup: model and slice; None: from `config.yaml`.
      system: whose training it is added to.
    """
    records = [(path, read_record(path)) for path in sorted(folder.glob("*.json"))]
    records += [(path, read_record(path, CELL)) for path in sorted(folder.glob("cells/*.json"))]
    cells = [(path, record.values) for path, record in records if record.kind == CELL and "completed" in record.values]
    cells.sort(key=lambda one: _load(one[1]))
    if not cells:
        return None
    slice_, serving = (setup.slice.name, setup) if setup else _setup(folder)
    left_out = [path.name for path, cell in cells if not _is_whole(cell)]
    if left_out:
        log.warning(
            "%s: skipped %d cells with failed requests or without a completed one: %s",
            folder,
            len(left_out),
            ", ".join(left_out),
        )
    return [_point(path, cell, slice_, serving, system) for path, cell in cells if _is_whole(cell)]


def _load(cell: Mapping[str, Any]) -> tuple[float, ...]:
    """Sort key of cells: lengths, then number of requests, numerically (10 comes after 2)."""
    n = max(1, cell["completed"])
    rate, users = cell.get("request_rate"), cell.get("max_concurrency")
    loads = (math.inf if rate is None else float(rate), math.inf if users is None else float(users))
    return cell["total_input_tokens"] / n, cell["total_output_tokens"] / n, *loads


def _is_whole(cell: Mapping[str, Any]) -> bool:
    """Whether anything was measured, under the stated load."""
    return bool(cell["completed"]) and cell.get("state", "ok") in ("ok", _OVERLOADED)


def _point(path: Path, cell: Mapping[str, Any], slice_: str, serving: Serving | None, system: str | None) -> Point:
    n = cell["completed"]
    mean_in, mean_out = cell["total_input_tokens"] / n, cell["total_output_tokens"] / n
    rate, users = cell.get("request_rate"), cell.get("max_concurrency")
    load = f"{rate} requests/s" if rate is not None else ""
    if users is not None:
        load = f"{users} users" if rate in (None, "inf") else f"{load}, {users} at a time"
    cached, overloaded = _cached(cell), cell.get("state") == _OVERLOADED
    return Point(
        name=f"{mean_in:,.0f} in, {mean_out:,.0f} out" + (f", {load}" if load else ""),
        label=MEASURED,
        source=str(path.parent),
        system=system,
        slice=slice_,
        serving=serving,
        input_tokens=mean_in,
        output_tokens=mean_out,
        sequences=users or n,
        output_tokens_per_second=cell["output_throughput"],
        whole=not cached,
        ttft_seconds=None if cached or overloaded else _seconds(cell.get("median_ttft_ms")),
        tpot_seconds=_seconds(cell.get("median_tpot_ms")),
        note="Prompts were found in the prefix cache: they are not compared with the ceiling." if cached else "",
    )


def _cached(cell: Mapping[str, Any]) -> bool:
    """Whether prompts were found in the prefix cache, as far as the client counted it."""
    counted = [value for key, value in cell.items() if key.startswith("prefix_cache_hit")]
    return any(isinstance(value, int | float) and value > 0 for value in counted)


def _seconds(milliseconds: float | None) -> float | None:
    return milliseconds / 1000 if milliseconds else None


def _setup(folder: Path) -> tuple[str, Serving | None]:
    """(slice, model on it if known), by `config.yaml`."""
    config = config_of(folder)
    if config.get("served"):
        return _setup(Path(config["served"]))
    serving = config.get("serving")
    if not isinstance(serving, dict) or not serving.get("slice"):
        name, size = (
            config.get(key) or config.get(group, {}).get("name")
            for key, group in (("slice", "hardware"), ("architecture", "model"))
        )
        known = name in SLICES and size in ARCHITECTURES
        return name or LOCAL, Serving(model=ModelDemand.of(ARCHITECTURES[size]), slice=SLICES[name]) if known else None
    name, model = serving["slice"], served_model(str(config.get("run") or ""))
    return name, served_as(serving, model) if model is not None and name in SLICES else None


def served_as(serving: Mapping[str, Any], model: ModelDemand) -> Serving:
    """The settings of `gemma4_tpu.serve` (`serving` of its configuration) that a ceiling depends on."""
    weights, cache = serving.get("weight_dtype", "bfloat16"), serving.get("kv_cache_dtype", "auto")
    speculation = (serving.get("flags") or {}).get("speculative-config") or {}
    return Serving(
        model=model,
        slice=SLICES[serving["slice"]],
        weights_dtype=weights,
        kv_dtype=cache if cache in DTYPE_BYTES else "fp8",  # `auto`: the image decides; fp8 has the higher ceiling
        replicas=serving.get("data_parallel_size", 1),
        speculated=speculation.get("num_speculative_tokens", 0) if isinstance(speculation, dict) else 0,
    )


def served_model(run: str) -> ModelDemand | None:
    """The model in a merged folder, or in the run folder that contains one; None if there is none."""
    for folder in (Path(run), Path(run) / _MERGED):
        if run and (folder / "config.json").is_file():
            try:
                return ModelDemand.of(from_hf_config(json.loads((folder / "config.json").read_text(encoding="utf-8"))))
            except (ValueError, ArchitectureError) as error:
                raise UserError(f"{folder / 'config.json'}: {error}") from None
    return None
