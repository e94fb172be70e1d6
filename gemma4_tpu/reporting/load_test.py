"""The page about a load test: `report.md` and `report.html` in its folder, and tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gemma4_tpu.benching.all_cells import Results, coverage_line
from gemma4_tpu.benching.cells import Cell
from gemma4_tpu.benching.checks import BenchChecked
from gemma4_tpu.benching.cross_check import LATENCY_BOUND, ROUNDS, THROUGHPUT_BOUND, verdict
from gemma4_tpu.benching.latencies import LAG_MS
from gemma4_tpu.benching.one_cell import OVERLOADED
from gemma4_tpu.markdown import table
from gemma4_tpu.reporting.html import html_page
from gemma4_tpu.reporting.load_plots import plot_results
from gemma4_tpu.reporting.load_rates import RATE_COLUMNS, rate_facts, rate_rows
from gemma4_tpu.tracking.files import write_text

_MARK = "†"
_LATENCIES = ("ttft", "tpot", "itl", "e2el")
_THROUGHPUTS = {  # column → key of a cell
    "output tok/s": "output_throughput", "most in 1 s": "max_output_tokens_per_s",
    "total tok/s": "total_token_throughput",
}  # fmt: skip
_COLUMNS = (
    "in", "out", "load", "state", *_THROUGHPUTS, "requests/s", "goodput",
    *(f"{name.upper()} {statistic}" for name in _LATENCIES for statistic in ("p50", "p99")), "notes",
)  # fmt: skip
_COMPARED = {  # column → key of `cross_check.COMPARED`
    "requests/s": "request_throughput", "output tok/s": "output_throughput", "TTFT p50": "median_ttft_ms",
    "TPOT p50": "median_tpot_ms", "ITL p50": "median_itl_ms", "E2EL p50": "median_e2el_ms",
}  # fmt: skip
_WORDS = {"state", "notes", "verdict", "above it"}
"""Columns of words; the others contain numbers."""


def write_report(
    folder: Path, results: Results, compared: dict[str, Any] | None, searched: dict[str, Any] | None,
    checked: BenchChecked,
) -> str:  # fmt: skip
    """Writes `report.md`, `report.html` and `plots/`; returns the tables as Markdown.

    Args:
      folder: of the benchmark.
      results: of its cells.
      compared: what `CrossCheck.compared` returned, if it was asked for.
      searched: what `slo_outcome` returned, if rates were looked for.
      checked: where the server is.
    """
    plots = plot_results(results, folder / "plots", f"{folder.parent.name} / {folder.name}", searched)
    tables = [_measured(results)]
    parts = [f"# Benchmark {folder.name}", *_facts(results, checked)]
    if searched:
        tables.append(_table(RATE_COLUMNS, rate_rows(searched)))
        parts += ["## The highest rate that keeps the limits", rate_facts(searched), tables[-1], "## Trials"]
    parts.append(tables[0])
    if compared:
        tables.append(_crossed(results, compared))
        parts += ["## Cross-check by `vllm bench serve`", _agreement(results, compared), tables[-1]]
    pictures = "\n".join(f"![{path.stem}](plots/{path.name})" for path in plots)
    text = "\n\n".join([*parts, pictures]).rstrip() + "\n"
    write_text(folder / "report.md", text)
    write_text(folder / "report.html", html_page(text, folder))
    return "\n\n".join(tables)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    align = "".join("l" if column in _WORDS else "r" for column in columns)
    return "\n".join(table(columns, rows, align)).rstrip()


def _facts(results: Results, checked: BenchChecked) -> list[str]:
    """What a reader needs to know before reading the figures."""
    model = next((result["model_id"] for result in results.values()), "")
    return [
        f"Model `{model}` at `{checked.endpoint}` ({checked.slice}). Measured by this client;"
        " times in ms, definitions of `vllm bench serve`.",
        f"{coverage_line(results)}. {_prefix_cache(results)}",
        "`overloaded`: arrivals outpaced completions, so latencies grow for as long as the load lasts.",
        f"{_MARK} of fewer than 100 values: the slowest one or two, not a reliable 99th percentile.",
    ]


def _measured(results: Results) -> str:
    """Figures of our own client; with goodput if there are limits."""
    rows = [dict(zip(_COLUMNS, _row(cell, result), strict=True)) for cell, result in results.items()]
    limited = any(result.get("request_goodput") is not None for result in results.values())
    columns = [column for column in _COLUMNS if limited or column != "goodput"]
    return _table(columns, [[row[column] for column in columns] for row in rows])


def _prefix_cache(results: Results) -> str:
    """Prefix-cache hits over all cells that ran, as far as known."""
    ran = [result for result in results.values() if result.get("completed")]
    known = [result for result in ran if result["prefix_cache_hit_tokens"] is not None]
    if not known:
        return "Prefix-cache hits: unknown; the server's /metrics does not count them." if ran else ""
    hits, queries = (sum(result[f"prefix_cache_{what}_tokens"] for result in known) for what in ("hit", "query"))
    if not queries:
        return "Prefix-cache hits: none; the server looked nothing up (it has no prefix cache, or it is off)."
    return f"Prefix-cache hits: {hits:,.0f} of {queries:,.0f} prompt tokens."


def _row(cell: Cell, result: dict[str, Any]) -> list[str]:
    first = [*_asked(cell), result["state"]]
    if not result.get("completed"):
        return [*first, *["–"] * (len(_COLUMNS) - len(first) - 1), result.get("reason", "")]
    goodput = result.get("request_goodput")
    return [
        *first, *(_number(result.get(key)) for key in _THROUGHPUTS.values()), f"{result['request_throughput']:.2f}",
        "–" if goodput is None else f"{goodput:.2f}", *_latencies(result), "; ".join(_notes(result)),
    ]  # fmt: skip


def _latencies(result: dict[str, Any]) -> Iterator[str]:
    for name in _LATENCIES:
        yield _number(result[f"median_{name}_ms"])
        p99 = result[f"p99_{name}_ms"]
        yield _number(p99) + (_MARK if p99 is not None and name in result["p99_marked"] else "")


def _asked(cell: Cell) -> list[str]:
    return [f"{cell.input_tokens:,}", f"{cell.output_tokens:,}", cell.load]


def _notes(result: dict[str, Any]) -> list[str]:
    """What changes the meaning of a cell's figures."""
    notes = [result["reason"]] if "reason" in result else []
    if result["state"] == OVERLOADED:
        notes.append(f"each second of load adds {result['latency_growth']:.2f} s of latency")
    hits, queries = result["prefix_cache_hit_tokens"], result["prefix_cache_query_tokens"]
    if hits:
        notes.append(f"{hits / queries:.0%} of prompt tokens from the prefix cache")
    if result["median_sending_lag_ms"] > LAG_MS:
        notes.append(f"sent {result['median_sending_lag_ms']:,.0f} ms late (median)")
    if result["short_answers"]:
        notes.append(f"{result['short_answers']} answers shorter than requested")
    if result["tokens_counted_by"] == "chunks":
        notes.append("the server reports no usage: chunks counted as tokens")
    elif (result["chunks_per_token"] or 1.0) < 0.95:  # None: no tokens
        notes.append(f"{result['chunks_per_token']:.2f} chunks per token")
    return notes


def _cross_checked(results: Results, compared: dict[str, Any]) -> dict[Cell, dict[str, Any]]:
    return {cell: compared["cells"][cell.name] for cell in results if cell.name in compared["cells"]}


def _agreement(results: Results, compared: dict[str, Any]) -> str:
    found = _cross_checked(results, compared)
    agree = sum(one["agrees"] for one in found.values())
    more = f" {compared['not_run']} cells without a measurement of ours were left out." if compared["not_run"] else ""
    return (
        f"{agree} of {len(found)} cells agree.{more} Both clients ran each cell {ROUNDS} times, in turn; each figure is"
        f" the median of this client's / of vLLM's = ratio. They agree within {THROUGHPUT_BOUND:.0%} of a throughput"
        f" and {LATENCY_BOUND:.0%} of a median latency, or 5 ms of TTFT and E2EL and 1 ms of TPOT and ITL, whichever is"
        " more."
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
