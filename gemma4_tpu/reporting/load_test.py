"""The page about a load test: `report.md` and `report.html` in its folder, and the tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemma4_tpu.benching.all_cells import Results, coverage_line
from gemma4_tpu.benching.cells import Cell
from gemma4_tpu.benching.checks import BenchChecked
from gemma4_tpu.benching.cross_check import LATENCY_BOUND, THROUGHPUT_BOUND, verdict
from gemma4_tpu.markdown import table
from gemma4_tpu.reporting.html import html_page
from gemma4_tpu.reporting.load_plots import plot_results
from gemma4_tpu.tracking.files import write_text

_MARK = "†"
_COLUMNS = ("in", "out", "load", "state", "output tok/s", "total tok/s", "requests/s",
            "TTFT p50", "TTFT p99", "TPOT p50", "ITL p50", "E2EL p50", "notes")  # fmt: skip
_COMPARED = {  # column → key of `cross_check.COMPARED`
    "requests/s": "request_throughput", "output tok/s": "output_throughput", "TTFT p50": "median_ttft_ms",
    "TPOT p50": "median_tpot_ms", "ITL p50": "median_itl_ms", "E2EL p50": "median_e2el_ms",
}  # fmt: skip
_WORDS = {"state", "notes", "verdict"}
"""Columns of words; the others hold numbers."""
_LAG_MS = 10.0  # a client that sends later than this has become part of what is measured


def write_report(folder: Path, results: Results, compared: dict[str, Any] | None, checked: BenchChecked) -> str:
    """Writes `report.md`, `report.html` and `plots/`; returns the tables as Markdown.

    Args:
      folder: of the benchmark.
      results: of its cells.
      compared: what `cross_check` returned, if it was asked for.
      checked: where the server is.
    """
    plots = plot_results(results, folder / "plots", f"{folder.parent.name} / {folder.name}")
    tables = [_measured(results)] + ([_crossed(results, compared)] if compared else [])
    parts = [f"# Benchmark {folder.name}", *_facts(results, checked), tables[0]]
    if compared:
        parts += ["## Cross-check by `vllm bench serve`", _agreement(results, compared), tables[1]]
    pictures = "\n".join(f"![{path.stem}](plots/{path.name})" for path in plots)
    text = "\n\n".join([*parts, pictures]).rstrip() + "\n"
    write_text(folder / "report.md", text)
    write_text(folder / "report.html", html_page(text, folder))
    return "\n\n".join(tables)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    align = "".join("l" if column in _WORDS else "r" for column in columns)
    return "\n".join(table(columns, rows, align)).rstrip()


def _facts(results: Results, checked: BenchChecked) -> list[str]:
    """What is to be known before the figures are read."""
    model = next((result["model_id"] for result in results.values()), "")
    return [
        f"Model `{model}` at `{checked.endpoint}` ({checked.slice}). Measured by this client;"
        " times in ms, definitions of `vllm bench serve`.",
        f"{coverage_line(results)}. {_prefix_cache(results)}",
        f"{_MARK} of fewer than 100 values: that of the slowest one or two, not a 99th percentile to rely on.",
    ]


def _measured(results: Results) -> str:
    """Our own client's figures."""
    return _table(_COLUMNS, [_row(cell, result) for cell, result in results.items()])


def _prefix_cache(results: Results) -> str:
    """What is known of it over all cells that ran."""
    ran = [result for result in results.values() if result.get("completed")]
    known = [result for result in ran if result["prefix_cache_hit_tokens"] is not None]
    if not known:
        return "Prefix-cache hits: unknown, the server's /metrics does not count them." if ran else ""
    hits, queries = (sum(result[f"prefix_cache_{what}_tokens"] for result in known) for what in ("hit", "query"))
    if not queries:
        return "Prefix-cache hits: none, the server looked nothing up (it has no prefix cache, or it is off)."
    return f"Prefix-cache hits: {hits:,.0f} of {queries:,.0f} prompt tokens."


def _row(cell: Cell, result: dict[str, Any]) -> list[str]:
    first = [*_asked(cell), result["state"]]
    if not result.get("completed"):
        return [*first, *["–"] * 8, result.get("reason", "")]
    throughputs = [_number(result[f"{name}_throughput"]) for name in ("output", "total_token")]
    marked = _MARK if "ttft" in result["p99_marked"] else ""
    return [
        *first, *throughputs, f"{result['request_throughput']:.2f}",
        _number(result["median_ttft_ms"]), f"{_number(result['p99_ttft_ms'])}{marked}",
        _number(result["median_tpot_ms"]), _number(result["median_itl_ms"]), _number(result["median_e2el_ms"]),
        "; ".join(_notes(result)),
    ]  # fmt: skip


def _asked(cell: Cell) -> list[str]:
    return [f"{cell.input_tokens:,}", f"{cell.output_tokens:,}", cell.load]


def _notes(result: dict[str, Any]) -> list[str]:
    """What makes a cell's figures mean something else."""
    notes = [result["reason"]] if "reason" in result else []
    hits, queries = result["prefix_cache_hit_tokens"], result["prefix_cache_query_tokens"]
    if hits:
        notes.append(f"{hits / queries:.0%} of prompt tokens from the prefix cache")
    if result["median_sending_lag_ms"] > _LAG_MS:
        notes.append(f"sent {result['median_sending_lag_ms']:,.0f} ms late (median)")
    if result["short_answers"]:
        notes.append(f"{result['short_answers']} answers shorter than asked for")
    if result["tokens_counted_by"] == "chunks":
        notes.append("no usage from the server: chunks counted as tokens")
    elif result["chunks_per_token"] < 0.95:
        notes.append(f"{result['chunks_per_token']:.2f} chunks per token")
    return notes


def _cross_checked(results: Results, compared: dict[str, Any]) -> dict[Cell, dict[str, Any]]:
    return {cell: compared["cells"][cell.name] for cell in results if cell.name in compared["cells"]}


def _agreement(results: Results, compared: dict[str, Any]) -> str:
    found = _cross_checked(results, compared)
    agree = sum(one["agrees"] for one in found.values())
    more = f" {compared['not_run']} cells without a measurement of ours were left out." if compared["not_run"] else ""
    return (
        f"{agree} of {len(found)} cells agree.{more} Each figure is this client's / vLLM's = ratio. They agree within"
        f" {THROUGHPUT_BOUND:.0%} of a throughput and {LATENCY_BOUND:.0%} of a median latency, or 5 ms of TTFT and E2EL"
        " and 1 ms of TPOT and ITL, whichever is more."
    )


def _crossed(results: Results, compared: dict[str, Any]) -> str:
    """Both clients' figures, side by side."""
    rows = []
    for cell, one in _cross_checked(results, compared).items():
        figures = [_both(one["figures"].get(key)) for key in _COMPARED.values()]
        rows.append([*_asked(cell), *figures, verdict(one)])
    return _table(("in", "out", "load", *_COMPARED, "verdict"), rows)


def _both(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return "–"
    return f"{_number(figure['ours'])} / {_number(figure['vllm'])} = {figure['ratio']:.2f}"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.1f}"
