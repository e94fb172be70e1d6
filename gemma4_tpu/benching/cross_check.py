"""Our client compared with vLLM's: repeats every measured cell with `vllm bench serve`, and reports disagreements.

Both clients use the same definitions, so their figures differ only by client overhead and chance. The bounds are above
the differences measured between them on one server (throughput within 5%; median TTFT 16.7 and 18.9 ms here, 13.1 and
14.9 there).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from gemma4_tpu.benching.all_cells import Results
from gemma4_tpu.benching.cells import Cell
from gemma4_tpu.benching.latencies import LAG_MS, P99_FROM
from gemma4_tpu.benching.one_cell import FAILED, MEASURED, OK
from gemma4_tpu.benching.vllm_client import VllmClient
from gemma4_tpu.config.serving import BenchConfig
from gemma4_tpu.tracking.records import CELL, CROSS_CHECK, read_record, write_record

log = logging.getLogger(__name__)

FOLDER = "cross_check"
"""Subfolder of a load test's folder: vLLM's result of each cell, its client's output, and the comparison."""
THROUGHPUT_BOUND = 0.10
LATENCY_BOUND = 0.25
COMPARED = {
    "request_throughput": (THROUGHPUT_BOUND, 0.0), "output_throughput": (THROUGHPUT_BOUND, 0.0),
    "total_token_throughput": (THROUGHPUT_BOUND, 0.0),
    "median_ttft_ms": (LATENCY_BOUND, 5.0), "median_tpot_ms": (LATENCY_BOUND, 1.0),
    "median_itl_ms": (LATENCY_BOUND, 1.0), "median_e2el_ms": (LATENCY_BOUND, 5.0),
}  # fmt: skip
"""Key → (largest difference relative to vLLM's figure, difference that never counts: a client's own time)."""
_SHARE = 0.02  # of tokens; smaller differences explain nothing


def cross_check(client: VllmClient, config: BenchConfig, results: Results, folder: Path) -> dict[str, Any]:
    """Runs missing cells and compares; writes `cross_check/comparison.json` and returns its contents.

    Args:
      client: vLLM's client.
      config: the cells and how they are run.
      results: our client's.
      folder: the load test's.
    """
    place = folder / FOLDER
    place.mkdir(exist_ok=True)
    cells = [cell for cell, result in results.items() if result["state"] in MEASURED]
    compared = {}
    for number, cell in enumerate(cells, start=1):
        log.info("vllm bench serve, %d of %d: %s", number, len(cells), cell.shown)
        theirs = _theirs(client, cell, results[cell]["model_id"], place)
        compared[cell.name] = found = compare(results[cell], theirs)
        say = log.info if found["agrees"] else log.warning
        say("%s: %s", cell.shown, verdict(found))
    bounds = {"throughput": THROUGHPUT_BOUND, "latency": LATENCY_BOUND}
    told = {"bounds": bounds, "not_run": len(results) - len(cells), "cells": compared}
    write_record(place / "comparison.json", CROSS_CHECK, told)
    return told


def _theirs(client: VllmClient, cell: Cell, model: str, place: Path) -> dict[str, Any]:
    """Their result of a cell, that of an earlier start if it is good."""
    path = place / f"{cell.name}.json"
    before = read_record(path).values if path.is_file() else None
    if before and before["state"] == OK:
        return before
    attempt = before["attempt"] + 1 if before else 0
    theirs = client.run(cell, model, place / f"{cell.name}.log", attempt)
    write_record(path, CELL, theirs, compact=True)
    return theirs


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Returns `state`, `agrees`, for each key of `COMPARED` both figures, their ratio (ours / vLLM's) and `agrees`, and
    likely `causes` of disagreements.
    """
    if theirs["state"] == FAILED:
        return {"state": FAILED, "agrees": False, "figures": {}, "causes": [theirs["reason"]]}
    figures = {}
    for key, (bound, free) in COMPARED.items():
        a, b = ours[key], theirs.get(key)
        if a is not None and b:
            agrees = abs(a - b) <= max(bound * b, free)
            figures[key] = {"ours": a, "vllm": b, "ratio": a / b, "agrees": agrees}
    agrees = all(figure["agrees"] for figure in figures.values())
    causes = [] if agrees else _causes(ours, theirs, figures)
    return {"state": OK, "agrees": agrees, "figures": figures, "causes": causes}


def verdict(found: dict[str, Any]) -> str:
    """A comparison in words."""
    if found["state"] == FAILED:
        return f"vLLM's client failed: {found['causes'][0]}"
    if found["agrees"]:
        return "agrees"
    off = [f"{key} {figure['ratio']:.2f}" for key, figure in found["figures"].items() if not figure["agrees"]]
    return f"disagrees ({', '.join(off)}): {'; '.join(found['causes'])}"


def _causes(ours: dict[str, Any], theirs: dict[str, Any], figures: dict[str, Any]) -> list[str]:
    """Known causes of such differences that apply here; if none does, what remains."""
    causes = []
    for what, key in (("answers", "total_output_tokens"), ("prompts", "total_input_tokens")):
        if abs(ours[key] - theirs[key]) > _SHARE * theirs[key]:
            causes.append(f"{what} of {ours[key]:,} tokens here, {theirs[key]:,} there")
    cached = [_cached(one) for one in (ours, theirs)]
    if abs((cached[0] or 0) - (cached[1] or 0)) > _SHARE:
        shares = " and ".join("?" if share is None else f"{share:.0%}" for share in cached)
        causes.append(f"{shares} of prompt tokens from the prefix cache (vLLM's warm-up repeats its first prompt)")
    if ours["median_sending_lag_ms"] > LAG_MS:
        causes.append(f"this client sent {ours['median_sending_lag_ms']:,.0f} ms late (median)")
    gaps = figures.get("median_itl_ms")
    if gaps and not gaps["agrees"] and ours["chunks_per_token"] < 1 - _SHARE:
        causes.append(f"{ours['chunks_per_token']:.2f} chunks per token: gaps are between chunks, pooled")
    if not causes and ours["completed"] < P99_FROM:
        causes.append(f"chance: {ours['completed']} requests each, at different times; use more requests")
    return causes or ["no known cause; did this machine carry another load meanwhile?"]


def _cached(result: dict[str, Any]) -> float | None:
    """Share of prompt tokens that came from the prefix cache; None: not reported."""
    hits, queries = result.get("prefix_cache_hit_tokens"), result.get("prefix_cache_query_tokens")
    return None if hits is None or queries is None else hits / queries if queries else 0.0
