"""What a plan and a search print on the terminal. `plan.json` is an `estimate.PlanResult`."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from gemma4_tpu.hardware import MeshSizes
from gemma4_tpu.planning.estimate import PlanResult
from gemma4_tpu.planning.misfit import format_bytes
from gemma4_tpu.planning.search import Found, cost, free
from gemma4_tpu.reporting.plan_rows import cost_rows, format_time, plan_rows, schedule_rows

_WIDEST = 200
"""Columns when stdout is not a terminal: enough for any row."""


def print_plan(result: PlanResult, folder: Path) -> None:
    """Prints the plan to stdout."""
    out = _console()
    _print_rows(out, plan_rows(result))
    _print_top(out, result)
    out.print(Text("All figures are estimated, by " + "; ".join(f"{k}: {v}" for k, v in result.estimated_by.items())))
    out.print(Text(f"plan.json and pictures: {folder}"), soft_wrap=True)


def print_schedule(result: PlanResult, folder: Path) -> None:
    """Prints what the schedule adds to an already printed plan."""
    out = _console()
    _print_rows(out, [*schedule_rows(result), *cost_rows(result)])
    _print_top(out, result)
    out.print(Text(f"plan.json and pictures: {folder}"), soft_wrap=True)


def _print_rows(out: Console, rows: list[tuple[str, str]]) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column()
    for label, value in rows:
        table.add_row(label, Text(value))
    out.print()
    out.print(table)
    out.print()


def _print_top(out: Console, result: PlanResult) -> None:
    """Prints the operations that take longest, with their place in our source."""
    if not result.top_operations:
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title, side in (("ms", "right"), ("share", "right"), ("times", "right"), ("part", "left"), ("what", "left")):
        table.add_column(title, justify=side)  # type: ignore[arg-type]
    table.add_column("where")
    for one in result.top_operations:
        what = "/".join(one["operation"].split("/")[-2:])
        direction = "backward " if "transpose(" in one["operation"] else ""
        cells = [f"{one['seconds'] * 1e3:.1f}", f"{one['share']:.1%}", f"{one['times']:,}", one["part"]]
        table.add_row(*cells, Text(f"{direction}{what}"), Text(one["source"]))
    out.print(Text("Most of the core's time, by the schedule:"))
    _print_whole(out, table)
    out.print()


def _print_whole(out: Console, table: Table) -> None:
    """Prints a table with one line per row: a narrower terminal wraps lines, but no cell is split."""
    needed = Measurement.get(out, out.options.update(max_width=_WIDEST), table).maximum
    Console(highlight=False, width=max(out.width, needed)).print(table)


def _console() -> Console:
    """Stdout; if it is not a terminal, lines are long enough for any row."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_WIDEST)


def print_alternatives(result: PlanResult) -> None:
    """Prints the changes tried for a run that does not fit; those that fit come first."""
    if result.fits:
        return
    if not result.alternatives:
        return
    out = _console()
    fitting = [one for one in result.alternatives if one["fits"]]
    out.print()
    out.print(Text("These changes fit, cheapest first:" if fitting else "Nothing that was tried fits:"))
    order = sorted(result.alternatives, key=lambda one: (not one["fits"], one["usd_per_million_real_tokens"] or 0.0))
    for one in order:
        needed = one["hbm_bytes_per_chip"]
        told = f"{format_bytes(needed)} per chip" if needed else "too much"
        cost = one["usd_per_million_real_tokens"]
        money = f", ${cost:.3f} per million real tokens" if cost is not None else ""
        mark = "fits" if one["fits"] else "does not fit"
        out.print(Text(f"  {' '.join(one['overrides'])}: {mark}, {told}{money}"), soft_wrap=True)


def print_search(found: Found, folder: Path) -> None:
    """Prints every compiled candidate, with the front marked, and what was skipped and why."""
    out = _console()
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("", "mesh", "remat", "flags", "rows", "HBM per chip", "free", "roofline", "schedule",
                  "real tokens/s", "$ per million"):  # fmt: skip
        table.add_column(title, justify="left" if title in ("", "mesh", "remat", "flags") else "right")
    front = {id(result) for result in found.front}

    def order(one: PlanResult) -> tuple[bool, bool, float]:
        return not one.fits, one.step_seconds is None, cost(one) if one.fits else 0.0

    for one in sorted((item["plan"] for item in found.results), key=order):
        mesh = str(MeshSizes.recorded(one.mesh))
        cells = ["→" if id(one) in front else "", mesh, one.remat, one.flags, str(one.rows_per_update)]
        if one.fits:
            usd = one.usd_per_million_real_tokens
            cells += [
                format_bytes(one.hbm_bytes_per_chip or 0),
                f"{free(one):.0%}",
                f"{format_time(one.roofline_seconds['update'])} {one.bound_by}",
                format_time(one.step_seconds) if one.step_seconds is not None else "–",
                f"{one.real_tokens_per_second['mid']:,.0f}",
                f"{usd:.3f}" if usd is not None else "no price",
            ]
        else:
            cells += [f"does not fit ({format_bytes(one.hbm_bytes_per_chip or 0)})"]
        table.add_row(*cells)
    out.print()
    _print_whole(out, table)
    if found.front:
        by = "the middle of the schedule's band" if found.front[0].step_seconds is not None else "half the roofline"
        out.print(Text(f"\n→ nothing else is both cheaper and has more HBM free. Tokens and dollars at {by}."))
    for skip in found.skipped[: len(found.skipped) - found.left_out]:
        out.print(Text(f"skipped {skip['candidate']}: {skip['reason']}"))
    if found.left_out:
        limit = found.skipped[-1]["reason"]
        out.print(Text(f"{found.left_out} more were left out by {limit} (search.json lists them)"))
    out.print(Text(f"search.json and hbm.png: {folder}"), soft_wrap=True)
