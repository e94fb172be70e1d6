"""`sweep.csv`, `sweep.md` and plots of a sweep folder, written at the end of a sweep or on request."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich.console import Console
from rich.text import Text

from gemma4_tpu.markdown import code, plain, table
from gemma4_tpu.reporting.sweep_plots import plot_sweep
from gemma4_tpu.sweeping.table import SweepTable
from gemma4_tpu.tracking.files import write_text

_LOSS = "loss"
_MEANING = {
    "heldout_loss_last": "held-out loss after the last update, in nats per target token",
    "heldout_loss_best": "lowest held-out loss seen",
    "train_loss_last": "loss of the last update",
    "real_tokens": "non-padding tokens trained on",
    "seconds": "wall-clock time of updates and evaluations, compilation included",
    "real_tokens_per_second": "without the first update (compilation)",
    "usd": "seconds × the slice's price",
    "starts": "processes started; more than one after a preemption",
}


def show_sweep(folder: str | Path, metric: str | None = None) -> int:
    """Writes the table and plots of a sweep folder, and prints a summary. Returns 0.

    Args:
      folder: the sweep's, or any parent of run folders.
      metric: key of `result.json`; None: the sweep's own.

    Raises:
      UserError: the folder contains no jobs, or some jobs have results but none has that metric.
    """
    sweep = SweepTable.of(Path(folder).absolute(), metric)
    write_text(sweep.folder / "sweep.csv", _csv(sweep))
    drawn = plot_sweep(sweep, sweep.folder / "plots")
    write_text(sweep.folder / "sweep.md", "\n".join(_page(sweep, drawn)).rstrip() + "\n")
    _print(sweep)
    return 0


def _csv(sweep: SweepTable) -> str:
    """Overrides × results, with unrounded figures."""
    text, keys, results = io.StringIO(), sweep.keys, sweep.results
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["job", *keys, "status", "starts", *results, "plan", "error"])
    for row in sweep.rows:
        job = row.job
        values = [job.values.get(key, "") for key in keys]
        figures = ["" if row.result.get(key) is None else row.result[key] for key in results]
        writer.writerow([job.name, *values, job.status, job.starts, *figures, job.plan or "", job.error or ""])
    return text.getvalue()


def _page(sweep: SweepTable, drawn: Sequence[Path]) -> Iterator[str]:
    """The table for people: best first, with rounded figures."""
    metric, best, keys, results = sweep.metric, sweep.best, sweep.keys, sweep.results
    yield from [f"# {sweep.title}", "", _counts(sweep), ""]
    if best is not None:
        told = _figure(metric.key, best.result)
        yield from [f"Best by {metric.key} ({metric.direction}d): {code(best.job.name)}, {told}", ""]
    lines = []
    for row in sweep.ranked:
        values = [plain(row.job.values.get(key, "")) for key in keys]
        cells = [*values, row.job.status, str(row.job.starts), *(_figure(key, row.result) for key in results)]
        cells.append(plain(row.job.error or ""))
        lines.append([f"**{cell}**" if cell else "" for cell in cells] if row is best else cells)
    yield from table([*keys, "status", "starts", *results, "error"], lines)
    yield "; ".join(f"`{key}`: {_MEANING[key]}" for key in [*results, "starts"] if key in _MEANING) + "."
    yield ""
    yield from (f"![{path.stem}]({quote(path.relative_to(sweep.folder).as_posix())})" for path in drawn)
    plans = {row.job.name: row.job.plan for row in sweep.rows if row.job.plan}
    if len({*plans.values()}) == 1:
        yield from ["", f"Plan check, the same for every job: {next(iter(plans.values()))}."]
    elif plans:
        yield from ["", "Plan checks before the start:", ""]
        yield from (f"- {code(name)}: {told}" for name, told in plans.items())


def _counts(sweep: SweepTable) -> str:
    statuses = [row.job.status for row in sweep.rows]
    return f"{len(statuses)} jobs: " + ", ".join(f"{statuses.count(s)} {s}" for s in dict.fromkeys(statuses)) + "."


def _figure(key: str, result: dict[str, Any]) -> str:
    value = result.get(key)
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, int):
        return f"{value:,}"
    if _LOSS in key or key == "mfu":
        return f"{value:.4f}"
    return f"{value:,.2f}" if abs(value) < 100 else f"{value:,.0f}"


def _print(sweep: SweepTable) -> None:
    out = Console(highlight=False)
    out.print()
    best, key = sweep.best, sweep.metric.key
    told = [("Sweep", str(sweep.folder)), ("Jobs", _counts(sweep))]
    told += [(row.job.status.capitalize(), f"{row.job.name}: {row.job.error}") for row in sweep.rows if row.job.error]
    if best is not None:
        told.append((f"Best {key}", f"{_figure(key, best.result)}  {best.job.name}"))
        told.append(("Next", f"python -m gemma4_tpu.merge run={best.folder}"))
    told.append(("Table", f"{sweep.folder / 'sweep.md'}, sweep.csv, plots/"))
    width = max(len(label) for label, _ in told) + 2
    for label, value in told:
        out.print(Text(f"{label:<{width}}", style="bold").append(value, style="not bold"), soft_wrap=True)
