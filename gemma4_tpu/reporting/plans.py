"""What a plan shows: a table on the terminal, and a picture of HBM. `plan.json` is `estimate.PlanResult`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from gemma4_tpu.hardware import GIB, MeshSizes
from gemma4_tpu.planning.bands import band, usd_per_million
from gemma4_tpu.planning.estimate import PlanResult
from gemma4_tpu.planning.misfit import format_bytes, misfit_line
from gemma4_tpu.planning.search import LEFT_OUT, Found, cost, free
from gemma4_tpu.plotting import new_figure
from gemma4_tpu.prices import format_usd
from gemma4_tpu.step.objective_kinds import SFT
from gemma4_tpu.tracking.progress import format_seconds

_CAPACITY = {"on_demand": "On demand", "spot": "Spot", "flex_start": "Flex-start, at best", "configured": "Cost"}
HIDDEN = "collectives_hidden"
"""Of `PlanResult.step_parts`: alongside the core."""
_COLOURS = {
    "base": "#4c78c8", "weights": "#4c78c8", "lora": "#54a24b", "optimizer": "#e0a63a", "average": "#8e6bbf",
    "reference": "#b279a2",
    "teacher": "#9d755d",
    "batch": "#9d9d9d", "temporaries": "#d9692c", "free": "#f0f0f0",
}  # fmt: skip
_WIDEST = 200
"""Columns where there is no terminal: enough for any row."""
_MEANING = {
    "base": "base weights",
    "weights": "weights (trained)",
    "lora": "LoRA",
    "optimizer": "optimizer state",
    "average": "average (trainer.ema_decay)",
    "reference": "reference (objective)",
    "teacher": "teacher (objective)",
    "batch": "batch and padding",
    "temporaries": "activations, temporaries",
}


def print_plan(result: PlanResult, folder: Path) -> None:
    """Prints the plan to stdout."""
    out = _console()
    _print_rows(out, plan_rows(result))
    _print_top(out, result)
    out.print(Text("All figures are estimated, by " + "; ".join(f"{k}: {v}" for k, v in result.estimated_by.items())))
    out.print(Text(f"plan.json and pictures: {folder}"), soft_wrap=True)


def print_schedule(result: PlanResult, folder: Path) -> None:
    """Prints what the schedule adds to a plan that is printed already."""
    out = _console()
    _print_rows(out, [*_schedule(result), *_money(result)])
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
    """The operations that take longest, with their place in our source."""
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
    """A table of figures, a line for each row: on a narrower terminal lines run on, but no cell is broken up."""
    needed = Measurement.get(out, out.options.update(max_width=_WIDEST), table).maximum
    Console(highlight=False, width=max(out.width, needed)).print(table)


def _console() -> Console:
    """Stdout; where it is no terminal, lines are long enough for any row."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_WIDEST)


def plan_rows(result: PlanResult) -> list[tuple[str, str]]:
    """A plan in words: (what, figure)."""
    mesh = MeshSizes.recorded(result.mesh)
    rows = [
        ("Run", f"{result.model}, {_trained(result)}, remat {result.remat}, on {result.slice} ({mesh})"),
        (
            "Update",
            f"{result.rows_per_update} rows of {result.sequence_length} in {result.microbatches} microbatch(es)",
        ),
    ]
    if not result.fits:
        return [*rows, ("Fits", f"no: {misfit_line(result)}")]
    limit, used = result.hbm_limit_bytes_per_chip, result.hbm_bytes_per_chip or 0
    rows.append(
        ("Fits", f"yes: {format_bytes(used)} of {format_bytes(limit)} HBM per chip ({1 - used / limit:.0%} free)")
    )
    parts = result.hbm_parts_bytes_per_chip.items()  # of an earlier version, some may have other names
    rows += [(f"  {_MEANING.get(kind, kind)}", format_bytes(size)) for kind, size in parts]
    return [*rows, *_work(result), *_schedule(result), *_rollouts(result), *_money(result)]


def _work(result: PlanResult) -> list[tuple[str, str]]:
    assert result.flops_per_chip and result.analytic_flops_per_chip and result.real_tokens_per_update
    assert result.hbm_traffic_bytes_per_chip and result.bytes_accessed_per_chip and result.fill is not None
    parts = result.flops_parts_per_chip
    tokens = result.real_tokens_per_update
    collectives = ", ".join(
        f"{kind} {told['count']:,.0f} × ({scaled(told['bytes'])}B)" for kind, told in result.collectives.items()
    )
    seconds = result.roofline_seconds
    return [
        ("Real tokens", f"{tokens:,.0f} per update, fill {result.fill:.1%} ({result.data})"),
        (
            "FLOPs per chip",
            f"{scaled(result.flops_per_chip)}FLOP (products {scaled(parts['matmul'])}, kernels "
            f"{scaled(parts['kernel']).rstrip()}); analytic {scaled(result.analytic_flops_per_chip)}, ratio "
            f"{result.flops_over_analytic:.2f}",
        ),
        (
            "HBM traffic",
            f"{scaled(result.hbm_traffic_bytes_per_chip)}B per chip (bytes accessed by XLA's convention: "
            f"{scaled(result.bytes_accessed_per_chip)}B)",
        ),
        ("Collectives", collectives or "none"),
        (
            "Per real token",
            f"{scaled(result.flops_per_chip / tokens)}FLOP, "
            f"{scaled(result.hbm_traffic_bytes_per_chip / tokens)}B of HBM traffic "
            f"({scaled(result.bytes_accessed_per_chip / tokens)}B accessed by XLA's convention), per chip",
        ),
        (
            "Roofline",
            ", ".join(f"{name} {format_time(seconds[name])}" for name in ("compute", "hbm", "interconnect"))
            + f" per update; bound by {result.bound_by}",
        ),
        *([("Not counted", "; ".join(result.not_counted))] if result.not_counted else []),
    ]


def _schedule(result: PlanResult) -> list[tuple[str, str]]:
    """Time by the compiler's schedule; no rows without one."""
    if result.step_seconds is None:
        return []
    parts = {part: seconds for part, seconds in result.step_parts.items() if part != HIDDEN}
    shares, band = result.utilization, result.step_band
    spent = sorted(parts.items(), key=lambda item: -item[1])
    told = ", ".join(f"{part.replace('_', ' ')} {format_time(seconds)}" for part, seconds in spent if seconds)
    return [
        (
            "Schedule",
            f"{format_time(result.step_seconds)} per update by the compiler; times {band['low']:g} to {band['high']:g}"
            f" (measured over scheduled): {format_time(result.step_seconds_low or 0)} to "
            f"{format_time(result.step_seconds_high or 0)}",
        ),
        ("  of it", told),
        ("  alongside", f"collectives {format_time(result.step_parts[HIDDEN])}"),
        (
            "  utilization",
            f"{shares['schedule_compute']:.1%} of the peak FLOP/s, {shares['schedule_hbm']:.1%} of HBM's bandwidth, "
            f"{shares['schedule_interconnect']:.1%} of the links'",
        ),
    ]


def _rollouts(result: PlanResult) -> list[tuple[str, str]]:
    """What comes before the update; no rows for objectives that sample nothing."""
    told = result.rollouts
    if not told:
        return []
    rows = [(
        "Roll-outs",
        f"{told['decoding_steps']:,} steps of decoding per update, answers of {told['answer_tokens']} tokens (assumed);"
        f" KV cache {format_bytes(told['kv_cache_bytes_per_chip'])} per chip",
    )]  # fmt: skip
    for name, one in told["phases"].items():
        sent = sum(one["collective_bytes_per_chip"].values())
        what = "a token of every slot" if name == "decode" else "once"
        rows.append((
            f"  {name}",
            f"{format_bytes(one['hbm_bytes_per_chip'])} HBM; {what}: {scaled(one['hbm_traffic_bytes_per_chip'])}B of"
            f" traffic, {scaled(sent)}B sent, at least {format_time(one['roofline_seconds'])} ({one['bound_by']})",
        ))  # fmt: skip
    middle, whole = told["seconds"]["mid"], result.seconds_per_update
    parts = {**middle, "update": whole["mid"] - sum(middle.values())}
    shares = ", ".join(f"{name} {format_time(one)} ({one / whole['mid']:.0%})" for name, one in parts.items())
    spent = " to ".join(format_time(one) for one in sorted((whole["low"], whole["high"])))
    price = result.price.get("usd_per_hour")
    usd = f", ${whole['mid'] / 3600 * price:.3f}" if price else ""
    rows.append(("  per update", f"{spent} (assumed utilization){usd}: {shares}; rewards not counted"))
    return rows


def _money(result: PlanResult) -> list[tuple[str, str]]:
    share, rate, hours = result.utilization, result.real_tokens_per_second, result.hours
    by = "assumed" if result.step_seconds is None else "by the schedule's band"
    reached = f"at {share['low']:.0%} to {share['high']:.0%} of the roofline"
    minutes = sorted((hours["low"] * 3600, hours["high"] * 3600))
    rows = [
        ("Speed", f"{band(rate)} real tokens/s {reached} ({by})"),
        ("Run", f"{result.updates:,} updates: {' to '.join(map(format_seconds, minutes))}"),
    ]
    for kind, dollars in result.usd_estimate.items():
        line = " to ".join(dict.fromkeys(map(format_usd, sorted((dollars["low"], dollars["high"])))))
        if kind == "spot" and result.preemptions:
            line += f", with {result.preemptions['expected']:.2g} preemptions (assumed)"
        rows.append((_CAPACITY[kind], line))
    if not result.usd_estimate:
        rows.append(("Cost", "no price is known for this slice; give hardware.usd_per_hour"))
    usd = usd_per_million(result.usd_per_million_real_tokens, result.seconds_per_update)
    if usd is not None:
        price = f"${result.price['usd_per_hour']:g}/h, {result.price['source']}"
        rows.append(("Per million", f"${band(usd, '{:.3f}')} per million real tokens ({price})"))
    before = ", by an earlier plan" if result.compiled_before else ""
    took = f"lowered in {result.lowering_seconds:.0f} s, compiled in {result.compile_seconds:.0f} s{before}"
    return [*rows, ("Compilation", took)]


def format_time(seconds: float) -> str:
    """`123 ms` or `2.34 s`."""
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def scaled(amount: float) -> str:
    """`1.23 T`, `45.6 G`, …: three digits and a prefix of a thousand, ready for a unit."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if amount >= size:
            return f"{amount / size:.3g} {prefix}" if amount < 999.5 * size else f"{amount / size:.0f} {prefix}"
    return f"{amount:.3g} "


def plot_hbm(results: Sequence[PlanResult], path: Path) -> None:
    """Draws one stacked bar of HBM per chip for each result, with the limit as a line."""
    with new_figure(path, (8, 1.9 + 0.8 * len(results))) as figure:
        _draw_bars(figure.subplots(), results)


def _draw_bars(axes: Any, results: Sequence[PlanResult]) -> None:
    drawn: set[str] = set()
    described = [_described(result) for result in results]
    common = [words for words, *others in zip(*described, strict=True) if all(other == words for other in others)]
    for place, result in enumerate(results):
        left = 0.0
        parts = result.hbm_parts_bytes_per_chip if result.fits else {"temporaries": result.hbm_bytes_per_chip or 0}
        for kind, size in parts.items():
            label = _MEANING[kind] if kind not in drawn else None
            axes.barh(place, size / GIB, left=left, color=_COLOURS[kind], label=label, height=0.6)
            drawn.add(kind)
            left += size / GIB
        limit = result.hbm_limit_bytes_per_chip / GIB
        axes.plot([limit, limit], [place - 0.4, place + 0.4], color="#333333", linewidth=2)
        axes.text(limit, place + 0.42, f"{limit:.1f} GiB", ha="center", va="bottom", fontsize=8)
    labels = [", ".join(words for words in one if words not in common) for one in described]
    axes.set_yticks(range(len(results)), labels)
    axes.set_ylim(-0.6, len(results) - 0.2)
    axes.set_xlabel("GiB of HBM per chip (estimated by the TPU compiler)")
    half = len(common) // 2
    axes.set_title("\n".join(", ".join(words) for words in (common[:half], common[half:]) if words), fontsize=10)
    axes.grid(axis="y", visible=False)
    axes.figure.legend(loc="outside lower center", ncols=3, fontsize=9)


def _trained(result: PlanResult) -> str:
    teacher = f" from {result.teacher}" if result.teacher else ""
    return result.trained if result.objective == SFT else f"{result.trained}, {result.objective}{teacher}"


def _described(result: PlanResult) -> list[str]:
    """What may differ between the bars of one picture."""
    rows, batches = result.rows_per_update // result.microbatches, result.microbatches
    return [
        result.model,
        _trained(result),
        result.slice,
        str(MeshSizes.recorded(result.mesh)),
        f"remat {result.remat}",
        f"{rows} row{'s' * (rows > 1)} of {result.sequence_length} × {batches} microbatch{'es' * (batches > 1)}",
    ]


def print_alternatives(result: PlanResult) -> None:
    """Prints what was tried for a run that does not fit, those that fit first."""
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
    """Prints every compiled candidate, the front marked, and what was skipped and why."""
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
    left_out = [skip for skip in found.skipped if skip["reason"].startswith(LEFT_OUT)]
    for skip in found.skipped:
        if skip not in left_out:
            out.print(Text(f"skipped {skip['candidate']}: {skip['reason']}"))
    if left_out:
        out.print(Text(f"{len(left_out)} more were left out by {left_out[0]['reason']} (search.json lists them)"))
    out.print(Text(f"search.json and hbm.png: {folder}"), soft_wrap=True)
