"""Ours against vLLM's: every measured cell also by `vllm bench serve`, in turn, and where the two disagree.

Both clients have the same definitions, so their figures differ by what each client costs and by chance. The bounds are
above what was seen between them on one server (throughput within 5%; median TTFT 16.7 and 18.9 ms here, 13.1 and 14.9
there). A machine that is busy for a while would be busy for one of two clients that run one after the other: so they
take turns, and medians of the rounds are compared.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gemma4_tpu.benching.all_cells import CellRunner, Results
from gemma4_tpu.benching.cells import Cell
from gemma4_tpu.benching.latencies import LAG_MS, P99_FROM
from gemma4_tpu.benching.one_cell import FAILED, MEASURED, OK
from gemma4_tpu.benching.vllm_client import VllmClient
from gemma4_tpu.tracking.records import CELL, CROSS_CHECK, read_record, write_record

log = logging.getLogger(__name__)

FOLDER = "cross_check"
"""In a benchmark's folder: vLLM's results of each cell, what its client printed, our further rounds (in `cells`), and
the comparison."""
ROUNDS = 3
"""Of each client, in turn: a pause of the machine spoils one of three."""
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


class CrossCheck:
    """The cells of a benchmark by both clients in turn; vLLM's rounds and our further ones are kept, too."""

    def __init__(self, client: VllmClient, folder: Path):
        """`client`: vLLM's. `folder`: of the benchmark."""
        self._client, self._place = client, folder / FOLDER
        self._place.mkdir(exist_ok=True)
        self._compared: dict[str, dict[str, Any]] = {}

    def __call__(self, run: CellRunner, cell: Cell) -> None:
        """Runs what isn't there yet of a cell whose first round by our client is done, and compares."""
        first = run.results[cell]
        if first["state"] not in MEASURED:
            return
        ours, theirs = [first], []
        for number in range(1, ROUNDS + 1):
            again = replace(cell, round=number)
            if number > 1:
                ours.append(run.measure(again, self._place))
            log.info("vllm bench serve, round %d of %d: %s", number, ROUNDS, cell.shown)
            theirs.append(self._theirs(again, first["model_id"]))
            if FAILED in (ours[-1]["state"], theirs[-1]["state"]):
                break
        self._compared[cell.name] = found = compare(ours, theirs)
        say = log.info if found["agrees"] else log.warning
        say("%s: %s", cell.shown, verdict(found))

    def compared(self, results: Results) -> dict[str, Any]:
        """Returns (and writes) what is in `cross_check/comparison.json`. `results`: all of ours."""
        bounds = {"throughput": THROUGHPUT_BOUND, "latency": LATENCY_BOUND}
        told = {
            "bounds": bounds, "rounds": ROUNDS, "not_run": len(results) - len(self._compared), "cells": self._compared
        }  # fmt: skip
        write_record(self._place / "comparison.json", CROSS_CHECK, told)
        return told

    def _theirs(self, cell: Cell, model: str) -> dict[str, Any]:
        """Their result of a cell, from an earlier start if it is good."""
        path = self._place / f"{cell.name}.json"
        before = read_record(path).values if path.is_file() else None
        if before and before["state"] == OK:
            return before
        attempt = before["attempt"] + 1 if before else 0
        theirs = self._client.run(cell, model, self._place / f"{cell.name}.log", attempt)
        write_record(path, CELL, theirs, compact=True)
        return theirs


Rounds = Sequence[Mapping[str, Any]]
"""A client's results of the same cell."""


def compare(ours: Rounds, theirs: Rounds) -> dict[str, Any]:
    """`state`, `agrees`; for each key of `COMPARED` both medians, their ratio (ours / vLLM's), `agrees` and the rounds'
    own figures; where they don't, the likely `causes`.
    """
    for told, rounds in (("this client", ours), ("vLLM's client", theirs)):
        if bad := next((one for one in rounds if one["state"] not in MEASURED), None):
            return {"state": FAILED, "agrees": False, "figures": {}, "causes": [f"{told} failed: {bad['reason']}"]}
    figures = {}
    for key, (bound, free) in COMPARED.items():
        a, b = _median(ours, key), _median(theirs, key)
        if a is not None and b:
            figures[key] = {
                "ours": a, "vllm": b, "ratio": a / b, "agrees": abs(a - b) <= max(bound * b, free),
                "rounds": {"ours": [one[key] for one in ours], "vllm": [one[key] for one in theirs]},
            }  # fmt: skip
    agrees = all(figure["agrees"] for figure in figures.values())
    causes = [] if agrees else _causes(ours, theirs, figures)
    return {"state": OK, "agrees": agrees, "figures": figures, "causes": causes}


def _median(rounds: Rounds, key: str) -> float | None:
    """None: one of them has no such figure."""
    values = [value for one in rounds if (value := one.get(key)) is not None]
    return statistics.median(values) if len(values) == len(rounds) else None


def verdict(found: dict[str, Any]) -> str:
    """A comparison in words."""
    if found["state"] == FAILED:
        return str(found["causes"][0])
    if found["agrees"]:
        return "agrees"
    off = [f"{key} {figure['ratio']:.2f}" for key, figure in found["figures"].items() if not figure["agrees"]]
    return f"disagrees ({', '.join(off)}): {'; '.join(found['causes'])}"


def _causes(ours: Rounds, theirs: Rounds, figures: dict[str, Any]) -> list[str]:
    """What is known to move such figures and did differ here; else what is left."""
    causes = []
    for what, key in (("answers", "total_output_tokens"), ("prompts", "total_input_tokens")):
        a, b = (sum(one[key] for one in rounds) for rounds in (ours, theirs))
        if abs(a - b) > _SHARE * b:
            causes.append(f"{what} of {a:,} tokens here, {b:,} there")
    cached = [_cached(rounds) for rounds in (ours, theirs)]
    if abs((cached[0] or 0) - (cached[1] or 0)) > _SHARE:
        shares = " and ".join("?" if share is None else f"{share:.0%}" for share in cached)
        causes.append(f"{shares} of prompt tokens from the prefix cache (vLLM's warm-up repeats its first prompt)")
    if (lag := _median(ours, "median_sending_lag_ms") or 0.0) > LAG_MS:
        causes.append(f"this client sent {lag:,.0f} ms late (median)")
    gaps, chunks = figures.get("median_itl_ms"), _median(ours, "chunks_per_token") or 0.0
    if gaps and not gaps["agrees"] and chunks < 1 - _SHARE:
        causes.append(f"{chunks:.2f} chunks per token: gaps are between chunks, pooled")
    if not causes and (completed := min(one["completed"] for one in ours)) < P99_FROM:
        causes.append(f"chance: {completed} requests a round, at other times; more requests tell")
    return causes or ["none that is known of; another load on this machine meanwhile?"]


def _cached(rounds: Rounds) -> float | None:
    """Share of prompt tokens that came from the prefix cache; None: the server doesn't tell."""
    counted = [(one.get("prefix_cache_hit_tokens"), one.get("prefix_cache_query_tokens")) for one in rounds]
    told = [(hits, queries) for hits, queries in counted if hits is not None and queries is not None]
    if len(told) < len(rounds):
        return None
    queries = sum(queries for _, queries in told)
    return sum(hits for hits, _ in told) / queries if queries else 0.0
