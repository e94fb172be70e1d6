"""Runs all cells of a load test, one after the other; each writes a file, and finished cells do not run again."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich import progress

from gemma4_tpu.benching.cells import Cell, cells_of
from gemma4_tpu.benching.checks import BenchChecked
from gemma4_tpu.benching.client import Target, find_target, tokens_of
from gemma4_tpu.benching.one_cell import FAILED, INFEASIBLE, MEASURED, OK, Told, run_cell
from gemma4_tpu.benching.prompts import PromptSource, read_text
from gemma4_tpu.benching.rate_search import RateFound, RateSearch, figures_of
from gemma4_tpu.benching.slo import limits_of
from gemma4_tpu.config.serving import BenchConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.prices import Price
from gemma4_tpu.tracking.logs import console
from gemma4_tpu.tracking.records import CELL, check_shape, read_record, write_record
from gemma4_tpu.tracking.shapes import LATENCIES
from gemma4_tpu.tracking.typed import AMOUNT, COUNT, NUMBER, TEXT, both, choice, fields, listed, maybe, of_one, when

log = logging.getLogger(__name__)

STATES = (*MEASURED, INFEASIBLE, FAILED)
_OWN = both(
    fields({"state": choice(*STATES), "attempt": COUNT, "model_id": TEXT}),
    when(lambda cell: cell.get("completed"), fields({
        **of_one(AMOUNT, "request_throughput output_throughput total_token_throughput median_sending_lag_ms"),
        **of_one(maybe(AMOUNT), f"{LATENCIES} chunks_per_token"),
        # Differences of counters, of which several servers behind one address have one each.
        **of_one(maybe(NUMBER), "prefix_cache_hit_tokens prefix_cache_query_tokens"),
        **of_one(COUNT, "failed short_answers"), "tokens_counted_by": TEXT, "p99_marked": listed(TEXT),
    }, {"request_goodput": maybe(AMOUNT), "max_output_tokens_per_s": maybe(AMOUNT), "latency_growth": maybe(NUMBER)})),
)  # fmt: skip
"""What a report relies on in a cell of an earlier start."""

Results = dict[Cell, dict[str, Any]]
"""Result by cell, for the cells that have run, in the order of the load test."""


class CellRunner:
    """Runs missing cells, one at a time; each writes `cells/<cell>.json` in the load test's folder."""

    def __init__(self, config: BenchConfig, checked: BenchChecked, folder: Path, bar: _Bar):
        """Raises `UserError` if the server can't be used."""
        self._config, self._checked, self._folder, self._bar = config, checked, folder, bar
        self._target = asyncio.run(find_target(checked.endpoint, config.served_model_name))
        self.results: Results = {}
        """Results of all cells so far."""
        self._source = PromptSource(checked.vocabulary, self._text(config.prompts), config.shared_tokens, config.turns)
        if checked.vocabulary is None and config.prompts is None:
            log.info("the model's vocabulary is unknown, so prompts use token ids 256 to 511; give architecture=<size>")

    def __call__(self, cell: Cell) -> dict[str, Any]:
        """Returns the cell's result, that of an earlier start unless it failed.

        Raises:
          UserError: the server is gone; finished cells are kept.
        """
        self.results[cell] = self.measure(cell, self._folder)
        self._bar.done()
        return self.results[cell]

    def measure(self, cell: Cell, folder: Path) -> dict[str, Any]:
        """The same with its file in `folder`, and not among the results."""
        before = _read(folder, cell)
        return before if before and before["state"] != FAILED else self._run(cell, before, folder)

    def _text(self, path: str | None) -> np.ndarray | None:
        """Token ids of a text file, by the server's tokenizer."""
        return None if path is None else np.array(asyncio.run(tokens_of(self._target, path, read_text(path))))

    def _run(self, cell: Cell, before: dict[str, Any] | None, folder: Path) -> dict[str, Any]:
        attempt = before["attempt"] + 1 if before else 0
        told = self._bar.cell(cell.shown, cell.requests(self._config))
        result = asyncio.run(
            run_cell(self._config, cell, self._target, source=self._source, attempt=attempt, told=told)
        )
        path = _path(folder, cell)
        path.parent.mkdir(exist_ok=True)
        write_record(path, CELL, result, compact=True)
        log.log(logging.INFO if result["state"] == OK else logging.WARNING, "%s", _told_of(cell, result))
        if result["state"] == FAILED and not result["completed"]:
            _still_there(self._target, self._folder)
        return result


def run_sweep(
    config: BenchConfig, checked: BenchChecked, folder: Path, after: Callable[[CellRunner, Cell], None] | None = None
) -> Results:
    """Runs all cells that the configuration lists.

    Args:
      config: with the cells.
      checked: where the server is.
      folder: of the benchmark.
      after: is called after each cell.

    Raises:
      UserError: the server can't be used, or is gone; finished cells are kept.
    """
    cells = cells_of(config)
    with _Bar(len(cells)) as bar:
        run = CellRunner(config, checked, folder, bar)
        if there := [result for cell in cells if (result := _read(folder, cell)) is not None]:
            failed = sum(result["state"] == FAILED for result in there)
            again = f"; {failed} that failed run again" if failed else ""
            log.info("%d of %d cells are done%s", len(there) - failed, len(cells), again)
        for cell in cells:
            run(cell)
            if after:
                after(run, cell)
    return run.results


def search_rates(config: BenchConfig, checked: BenchChecked, folder: Path) -> tuple[Results, list[RateFound]]:
    """Searches for the highest rate that keeps `bench.slo`, for each pair of lengths; raises as `run_sweep` does."""
    found = []
    with _Bar(None) as bar:
        run = CellRunner(config, checked, folder, bar)
        for lengths in config.lengths:
            found.append(RateSearch(run, limits_of(config.slo), *lengths).run())
            log.info("%s", found[-1].told)
    lengths_of = config.lengths.index
    in_order = sorted(run.results, key=lambda c: (lengths_of([c.input_tokens, c.output_tokens]), c.rate, c.round))
    return {cell: run.results[cell] for cell in in_order}, found


def coverage(results: Results) -> dict[str, int]:
    """Number of cells by state."""
    counts = Counter(result["state"] for result in results.values())
    return {"cells": len(results), **{state: counts[state] for state in STATES}}


def coverage_line(results: Results) -> str:
    """States how much of the load test has been measured."""
    counts = coverage(results)
    states = ", ".join(f"{counts[state]} {state}" for state in STATES if state != OK and counts[state])
    measured = sum(counts[state] for state in MEASURED)
    completed, failed = (sum(result.get(key, 0) for result in results.values()) for key in ("completed", "failed"))
    return (
        f"{measured} of {counts['cells']} cells measured{f' ({states})' if states else ''};"
        f" {completed:,} requests completed, {failed:,} failed"
    )


def slo_outcome(
    config: BenchConfig, found: list[RateFound], results: Results, price: Price | None
) -> dict[str, Any] | None:
    """What `result.json` says about rate searches; None if there was none. `price`: an hour of the server."""
    if not found:
        return None
    hourly = price.usd_per_hour if price else None
    return {
        "limits": {limit.key: limit.ms for limit in limits_of(config.slo)},
        "price": asdict(price) if price else None,
        "searches": [figures_of(one, results, hourly) for one in found],
    }


def outcome_of(results: Results, compared: dict[str, Any] | None, searched: dict[str, Any] | None) -> dict[str, Any]:
    """The contents of `result.json`.

    Args:
      results: of the cells.
      compared: what `CrossCheck.compared` returned, if it was asked for.
      searched: what `slo_outcome` returned.
    """
    measured = {cell: result for cell, result in results.items() if result["state"] in MEASURED}
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
        "slo": searched,
    }


def _read(folder: Path, cell: Cell) -> dict[str, Any] | None:
    path = _path(folder, cell)
    if not path.is_file():
        return None
    try:
        result = read_record(path, CELL).values
        check_shape(result, _OWN, path)
    except UserError:  # damaged
        result = {}
    if result.get("state") in STATES:
        return result
    log.warning("%s: not the result of a cell; running it again", path)
    return None


def _path(folder: Path, cell: Cell) -> Path:
    return folder / "cells" / f"{cell.name}.json"


def _still_there(target: Target, folder: Path) -> None:
    """Raises `UserError` if the server for the next cell is gone."""
    try:
        asyncio.run(find_target(target.endpoint, target.model))
    except UserError as gone:
        raise UserError(f"{gone} (once it is back, the same command with run_dir={folder} resumes)") from None


# ── on the terminal ────────────────────────────────────────────────────────────────────────────────────────────────


class _Bar:
    """Progress over cells and over the requests of the running cell; shows nothing without a terminal."""

    def __init__(self, cells: int | None):
        """`cells`: how many there will be; None: not known yet."""
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
        """Begins a cell; returns the function to call after each request."""
        self._bar.reset(self._requests, total=requests, description=name)

        def told(done: int, failed: int) -> None:
            text = f"{name}, {failed} failed" if failed else name
            self._bar.update(self._requests, completed=done, description=text)

        return told

    def done(self) -> None:
        """Counts one more finished cell."""
        self._bar.advance(self._cells)


def _told_of(cell: Cell, result: dict[str, Any]) -> str:
    """One line about a finished cell."""
    if "reason" in result:
        return f"{cell.shown}: {result['state']}: {result['reason']}"
    facts = [f"{result['output_throughput']:,.1f} tok/s"]
    facts += [
        f"{label} {result[key]:,.1f} ms"
        for label, key in (("TTFT", "median_ttft_ms"), ("TPOT", "median_tpot_ms"))
        if result[key] is not None
    ]
    state = "" if result["state"] == OK else f"{result['state']}: "
    return f"{cell.shown}: {state}{', '.join(facts)}"
