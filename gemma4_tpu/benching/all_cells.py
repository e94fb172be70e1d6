"""All cells of a benchmark, one after the other; each leaves a file, and those that are done are not run again."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from pathlib import Path
from typing import Any

from rich import progress

from gemma4_tpu.benching.cells import Cell, cells_of
from gemma4_tpu.benching.checks import BenchChecked
from gemma4_tpu.benching.client import Target, find_target
from gemma4_tpu.benching.one_cell import FAILED, INFEASIBLE, OK, Told, run_cell
from gemma4_tpu.config.serving import BenchConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.tracking.logs import console
from gemma4_tpu.tracking.records import CELL, read_record, write_record

log = logging.getLogger(__name__)

Results = dict[Cell, dict[str, Any]]
"""Cells that have run, in the order of the benchmark."""


def run_sweep(config: BenchConfig, checked: BenchChecked, folder: Path) -> Results:
    """Runs what isn't there yet.

    Args:
      config: the cells and how they are run.
      checked: endpoint and vocabulary.
      folder: of the benchmark; results go to `cells/<cell>.json`.

    Raises:
      UserError: the server can't be used, or is gone; cells that are done are kept.
    """
    target = asyncio.run(find_target(checked.endpoint, config.served_model_name))
    cells = cells_of(config)
    (folder / "cells").mkdir(exist_ok=True)
    results = {cell: result for cell in cells if (result := _read(folder, cell)) is not None}
    kept = {cell for cell, result in results.items() if result["state"] != FAILED}
    if results:
        again = f"; {len(results) - len(kept)} that failed run again" if len(results) > len(kept) else ""
        log.info("%d of %d cells are done%s", len(kept), len(cells), again)
    if checked.vocabulary is None:
        log.info(
            "the model's vocabulary is not known: prompts are of the token ids 256 to 511 (architecture=<size> says it)"
        )
    with _Bar(len(cells)) as bar:
        for cell in cells:
            if cell not in kept:
                attempt = results[cell]["attempt"] + 1 if cell in results else 0
                told = bar.cell(cell.shown, cell.requests(config))
                result = asyncio.run(
                    run_cell(config, cell, target, vocabulary=checked.vocabulary, attempt=attempt, told=told)
                )
                write_record(_path(folder, cell), CELL, result, compact=True)
                results[cell] = result
                log.log(logging.INFO if result["state"] == OK else logging.WARNING, "%s", _told_of(cell, result))
                if result["state"] == FAILED and not result["completed"]:
                    _still_there(target, folder)
            bar.done()
    return {cell: results[cell] for cell in cells}


def coverage(results: Results) -> dict[str, int]:
    """Cells by state."""
    counts = Counter(result["state"] for result in results.values())
    return {"cells": len(results), **{state: counts[state] for state in (OK, INFEASIBLE, FAILED)}}


def coverage_line(results: Results) -> str:
    """How much of what was asked for has been measured."""
    counts = coverage(results)
    missing = ", ".join(f"{counts[state]} {state}" for state in (INFEASIBLE, FAILED) if counts[state])
    completed, failed = (sum(result.get(key, 0) for result in results.values()) for key in ("completed", "failed"))
    return (
        f"{counts[OK]} of {counts['cells']} cells measured{f' ({missing})' if missing else ''};"
        f" {completed:,} requests completed, {failed:,} failed"
    )


def outcome_of(results: Results, compared: dict[str, Any] | None) -> dict[str, Any]:
    """What `result.json` holds. `compared`: what `cross_check` returned, if it was asked for."""
    measured = {cell: result for cell, result in results.items() if result["state"] == OK}
    best = max(measured, key=lambda cell: measured[cell]["output_throughput"], default=None)
    failed = sum(result.get("failed", 0) for result in results.values())
    checks = compared["cells"] if compared else {}
    unchecked = [name for name, found in checks.items() if found["state"] == FAILED]
    crossed = {
        "agree": sum(found["agrees"] for found in checks.values()),
        "disagree": [name for name, found in checks.items() if not found["agrees"] and name not in unchecked],
        "failed": unchecked,
    }
    return {
        "status": "failed" if failed or unchecked else "finished",
        **coverage(results),
        "completed_requests": sum(result.get("completed", 0) for result in results.values()),
        "failed_requests": failed,
        "peak_output_throughput": measured[best]["output_throughput"] if best else None,
        "peak_cell": best.name if best else None,
        "cross_check": crossed if compared else None,
    }


def _read(folder: Path, cell: Cell) -> dict[str, Any] | None:
    path = _path(folder, cell)
    if not path.is_file():
        return None
    try:
        result = read_record(path).values
    except UserError:  # damaged
        result = {}
    if result.get("state") in (OK, INFEASIBLE, FAILED):
        return result
    log.warning("%s: no result of a cell; it runs again", path)
    return None


def _path(folder: Path, cell: Cell) -> Path:
    return folder / "cells" / f"{cell.name}.json"


def _still_there(target: Target, folder: Path) -> None:
    """Whether there is a server for the next cell."""
    try:
        asyncio.run(find_target(target.endpoint, target.model))
    except UserError as gone:
        raise UserError(f"{gone} (the same command with run_dir={folder} goes on when it is back)") from None


# ── what a person sees ─────────────────────────────────────────────────────────────────────────────────────────────


class _Bar:
    """Progress over cells and the requests of the one that runs; nothing where there is no terminal."""

    def __init__(self, cells: int):
        self._bar = progress.Progress(
            progress.BarColumn(bar_width=None),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.description}"),
            console=console(),
            expand=True,
            disable=not console().is_terminal,
        )
        self._cells = self._bar.add_task("cells", total=cells)
        self._requests = self._bar.add_task("", total=None)

    def __enter__(self) -> _Bar:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def cell(self, name: str, requests: int) -> Told:
        """Begins a cell; the function that it returns is told of requests."""
        self._bar.reset(self._requests, total=requests, description=name)

        def told(done: int, failed: int) -> None:
            text = f"{name}, {failed} failed" if failed else name
            self._bar.update(self._requests, completed=done, description=text)

        return told

    def done(self) -> None:
        """One more cell."""
        self._bar.advance(self._cells)


def _told_of(cell: Cell, result: dict[str, Any]) -> str:
    """One line about a cell that has run."""
    if "reason" in result:
        return f"{cell.shown}: {result['state']}: {result['reason']}"
    facts = [f"{result['output_throughput']:,.1f} tok/s"]
    facts += [
        f"{label} {result[key]:,.1f} ms"
        for label, key in (("TTFT", "median_ttft_ms"), ("TPOT", "median_tpot_ms"))
        if result[key] is not None
    ]
    return f"{cell.shown}: {', '.join(facts)}"
