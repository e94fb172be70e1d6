"""What a benchmark came to: `result.json`, a Markdown table, and one HTML page that holds its plots."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemma4_tpu.benching.cells import Cell
from gemma4_tpu.benching.load import OK
from gemma4_tpu.benching.plots import plot_results
from gemma4_tpu.benching.sweep import Results, coverage, coverage_line
from gemma4_tpu.config.bench_checks import BenchChecked
from gemma4_tpu.tracking.files import write_text

_MARK = "†"
_COLUMNS = ("in", "out", "load", "state", "output tok/s", "total tok/s", "requests/s",
            "TTFT p50", "TTFT p99", "TPOT p50", "ITL p50", "E2EL p50", "notes")  # fmt: skip
_LAG_MS = 10.0  # a client that sends later than this has become part of what is measured


def outcome(results: Results) -> dict[str, Any]:
    """`result.json`."""
    measured = {cell: result for cell, result in results.items() if result["state"] == OK}
    best = max(measured, key=lambda cell: measured[cell]["output_throughput"], default=None)
    failed = sum(result.get("failed", 0) for result in results.values())
    return {
        "status": "failed" if failed else "finished",
        **coverage(results),
        "completed_requests": sum(result.get("completed", 0) for result in results.values()),
        "failed_requests": failed,
        "peak_output_throughput": measured[best]["output_throughput"] if best else None,
        "peak_cell": best.name if best else None,
    }


def write_report(folder: Path, results: Results, checked: BenchChecked) -> str:
    """Writes `report.md`, `report.html` and `plots/`; returns the table as Markdown."""
    plots = plot_results(results, folder / "plots", f"{folder.parent.name} / {folder.name}")
    rows = [_row(cell, result) for cell, result in results.items()]
    model = next((result["model_id"] for result in results.values()), "")
    facts = [
        f"Model `{model}` at `{checked.endpoint}` ({checked.slice}). Measured by this client;"
        " times in ms, definitions of `vllm bench serve`.",
        f"{coverage_line(results)}.",
        f"{_MARK} of fewer than 100 values: that of the slowest one or two, not a 99th percentile to rely on.",
    ]
    table = _markdown(rows)
    pictures = "\n".join(f"![{path.stem}](plots/{path.name})" for path in plots)
    text = "\n\n".join([f"# Benchmark {folder.name}", *facts, table, pictures]).rstrip() + "\n"
    write_text(folder / "report.md", text)
    write_text(folder / "report.html", _page(folder.name, facts, rows, plots))
    return table


def _row(cell: Cell, result: dict[str, Any]) -> list[str]:
    first = [f"{cell.input_tokens:,}", f"{cell.output_tokens:,}", cell.load, result["state"]]
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


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.1f}"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    align = ["---:", "---:", "---:", "---", *["---:"] * 8, "---"]
    safe = [[text.replace("|", "\\|") for text in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (_COLUMNS, align, *safe))


def _page(name: str, facts: Sequence[str], rows: Sequence[Sequence[str]], plots: Sequence[Path]) -> str:
    """Everything in one file: nothing is fetched."""
    import jinja2

    pictures = [(path.stem.replace("_", " "), base64.b64encode(path.read_bytes()).decode()) for path in plots]
    template = jinja2.Environment(autoescape=True).from_string(Path(__file__).with_name("page.html").read_text("utf-8"))
    plain = [fact.replace("`", "") for fact in facts]
    return template.render(name=name, facts=plain, columns=_COLUMNS, rows=rows, pictures=pictures)
