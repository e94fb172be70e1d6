"""`sweep.csv`, `sweep.md` and plots of a sweep folder, made at the end of a sweep and at any other time."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich.console import Console
from rich.text import Text

from gemma4_tpu.errors import UserError
from gemma4_tpu.markdown import code, plain, table
from gemma4_tpu.reporting.sweep_plots import plot_sweep
from gemma4_tpu.sweeping import record
from gemma4_tpu.sweeping.record import Sweep
from gemma4_tpu.sweeping.table import Metric, Row, best_metric, best_row, columns, rows_of, swept_keys
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
    """Writes the table and the plots of a sweep folder, and prints what came of it. Returns 0.

    Args:
      folder: the sweep's, or any folder of run folders.
      metric: key of `result.json`; None: the sweep's own.

    Raises:
      UserError: no jobs there, or no job has that metric while some have results.
    """
    sweep = Sweep.open(Path(folder).absolute())
    rows = rows_of(sweep)
    chosen = best_metric(sweep, metric)
    _check_metric(rows, chosen, metric)
    best = best_row(rows, chosen)
    write_text(sweep.folder / "sweep.csv", csv_table(rows, chosen))
    drawn = plot_sweep(rows, chosen, best, sweep.folder / "plots", _title(sweep))
    write_text(sweep.folder / "sweep.md", "\n".join(_page(sweep, rows, chosen, best, drawn)).rstrip() + "\n")
    _print(sweep, rows, chosen, best)
    return 0


def _title(sweep: Sweep) -> str:
    return f"{sweep.folder.parent.name} / {sweep.folder.name}"


def _check_metric(rows: Sequence[Row], chosen: Metric, asked: str | None) -> None:
    numbers = sorted({k for row in rows for k, v in row.result.items() if isinstance(v, int | float)})
    if asked is not None and numbers and asked not in numbers:
        raise UserError(f"metric={asked}: no run has it; there are {', '.join(numbers)}")


def csv_table(rows: Sequence[Row], metric: Metric) -> str:
    """Overrides × results, figures in full."""
    text = io.StringIO()
    keys, results = swept_keys(rows), columns(rows, metric)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["job", *keys, "status", "starts", *results, "plan", "error"])
    for row in rows:
        values = [row.job.values.get(key, "") for key in keys]
        figures = ["" if row.result.get(key) is None else row.result[key] for key in results]
        writer.writerow(
            [row.job.name, *values, row.job.status, row.job.starts, *figures, row.job.plan or "", row.job.error or ""]
        )
    return text.getvalue()


def _page(sweep: Sweep, rows: Sequence[Row], metric: Metric, best: Row | None, drawn: Sequence[Path]) -> Iterator[str]:
    """For people: best first, figures rounded."""
    keys, results = swept_keys(rows), columns(rows, metric)
    yield from [f"# {_title(sweep)}", "", _counts(rows), ""]
    if best is not None:
        told = _figure(metric.key, best.result)
        yield from [f"Best by {metric.key} ({metric.direction}d): {code(best.job.name)}, {told}", ""]
    lines = []
    for row in _ranked(rows, metric):
        values = [plain(row.job.values.get(key, "")) for key in keys]
        cells = [*values, row.job.status, str(row.job.starts), *(_figure(key, row.result) for key in results)]
        cells.append(plain(row.job.error or ""))
        lines.append([f"**{cell}**" if cell else "" for cell in cells] if row is best else cells)
    yield from table([*keys, "status", "starts", *results, "error"], lines)
    yield from ["; ".join(f"`{key}`: {_MEANING[key]}" for key in [*results, "starts"] if key in _MEANING) + ".", ""]
    yield from (f"![{path.stem}]({quote(path.relative_to(sweep.folder).as_posix())})" for path in drawn)
    plans = dict.fromkeys(row.job.plan for row in rows if row.job.plan)
    if len(plans) == 1:
        yield from ["", f"Plan check of every job: {next(iter(plans))}."]
    elif plans:
        yield from ["", "Plan checks before the start:", ""]
        yield from (f"- {code(row.job.name)}: {row.job.plan}" for row in rows if row.job.plan)


def _ranked(rows: Sequence[Row], metric: Metric) -> list[Row]:
    """Best first; those without the metric last, in their order."""
    sign = 1 if metric.direction == record.LOWER_IS_BETTER else -1

    def rank(row: Row) -> tuple[bool, float]:
        value = row.value(metric.key)
        return (value is None, sign * value if value is not None else 0.0)

    return sorted(rows, key=rank)


def _counts(rows: Sequence[Row]) -> str:
    statuses = [row.job.status for row in rows]
    return f"{len(rows)} jobs: " + ", ".join(f"{statuses.count(s)} {s}" for s in dict.fromkeys(statuses)) + "."


def _figure(key: str, result: dict[str, Any]) -> str:
    value = result.get(key)
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, int):
        return f"{value:,}"
    if _LOSS in key or key == "mfu":
        return f"{value:.4f}"
    return f"{value:,.2f}" if abs(value) < 100 else f"{value:,.0f}"


def _print(sweep: Sweep, rows: Sequence[Row], metric: Metric, best: Row | None) -> None:
    out = Console(highlight=False)
    out.print()
    told = [("Sweep", str(sweep.folder)), ("Jobs", _counts(rows))]
    told += [(row.job.status.capitalize(), f"{row.job.name}: {row.job.error}") for row in rows if row.job.error]
    if best is not None:
        told.append((f"Best {metric.key}", f"{_figure(metric.key, best.result)}  {best.job.name}"))
        told.append(("Next", f"python -m gemma4_tpu.merge run={best.folder}"))
    told.append(("Table", f"{sweep.folder / 'sweep.md'}, sweep.csv, plots/"))
    width = max(len(label) for label, _ in told) + 2
    for label, value in told:
        out.print(Text(f"{label:<{width}}", style="bold").append(value, style="not bold"), soft_wrap=True)
