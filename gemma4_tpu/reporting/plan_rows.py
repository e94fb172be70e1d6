"""A plan in words: the rows of its table; estimates as both ends of a band, never a point."""

from __future__ import annotations

from collections.abc import Mapping

from gemma4_tpu.hardware import MeshSizes
from gemma4_tpu.planning.estimate import PlanResult
from gemma4_tpu.planning.misfit import format_bytes, misfit_line
from gemma4_tpu.prices import format_usd
from gemma4_tpu.step.objective_kinds import SFT
from gemma4_tpu.tracking.progress import format_seconds

_CAPACITY = {"on_demand": "On demand", "spot": "Spot", "flex_start": "Flex-start, at best", "configured": "Cost"}
HIDDEN = "collectives_hidden"
"""Key of `PlanResult.step_parts`: time alongside the core."""
MEMORY_PARTS = {
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
"""Kind of `PlanResult.hbm_parts_bytes_per_chip` → its name."""


def band(values: Mapping[str, float], form: str = "{:,.0f}", times: float = 1.0) -> str:
    """`8,000 to 11,000`: from the smaller of `low` and `high` to the larger; one figure where both read alike.

    Args:
      values: at `low` and `high`.
      form: of one figure.
      times: a factor on them.
    """
    ends = [form.format(value * times) for value in sorted((values["low"], values["high"]))]
    return " to ".join(dict.fromkeys(ends))


def usd_per_million(middle: float | None, seconds: Mapping[str, float]) -> dict[str, float] | None:
    """Dollars per million real tokens at both ends; None: no price is known.

    Args:
      middle: those at `mid`.
      seconds: of an update at `low`, `mid` and `high` (`PlanResult.seconds_per_update`).
    """
    return None if middle is None else {end: middle * seconds[end] / seconds["mid"] for end in seconds}


def plan_rows(result: PlanResult) -> list[tuple[str, str]]:
    """A plan in words: (what, figure)."""
    mesh = MeshSizes.recorded(result.mesh)
    rows = [
        ("Run", f"{result.model}, {trained(result)}, remat {result.remat}, on {result.slice} ({mesh})"),
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
    rows += _room(mesh, result)
    parts = result.hbm_parts_bytes_per_chip.items()  # plans of earlier versions may use other names
    rows += [(f"  {MEMORY_PARTS.get(kind, kind)}", format_bytes(size)) for kind, size in parts]
    return [*rows, *_work(result), *schedule_rows(result), *_rollouts(result), *cost_rows(result)]


def _room(mesh: MeshSizes, result: PlanResult) -> list[tuple[str, str]]:
    """The mesh with the fewest chips to a copy of a frozen base that is certain to fit: no part grows by more than the
    number of copies.
    """
    found, needed = mesh, result.hbm_bytes_per_chip or 0
    while result.lora_rank and not result.rollouts and (less := found.less_split):
        if 2 * needed > result.hbm_limit_bytes_per_chip:
            break
        found, needed = less, 2 * needed
    if found == mesh or not needed:
        return []
    told = (
        f"for fewer chips to a copy of the weights, which usually takes less time per row: {' '.join(found.overrides)}",
        f"{found.row_places} row{'s' * (found.row_places != 1)} to a microbatch",
        f"at most {format_bytes(needed)} per chip",
    )
    return [("Room", ", ".join(told))]


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


def schedule_rows(result: PlanResult) -> list[tuple[str, str]]:
    """Time according to the compiler's schedule; no rows without one."""
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
        ("  of which", told),
        ("  alongside", f"collectives {format_time(result.step_parts[HIDDEN])}"),
        (
            "  utilization",
            f"{shares['schedule_compute']:.1%} of the peak FLOP/s, {shares['schedule_hbm']:.1%} of HBM's bandwidth, "
            f"{shares['schedule_interconnect']:.1%} of the links'",
        ),
    ]


def _rollouts(result: PlanResult) -> list[tuple[str, str]]:
    """The sampling before each update; no rows for objectives that sample nothing."""
    told = result.rollouts
    if not told:
        return []
    idle = f" ({told['idle_slots']:.0%} of the slots idle)" if "idle_slots" in told else ""  # not in older plans
    rows = [(
        "Roll-outs",
        f"{told['decoding_steps']:,} steps of decoding per update{idle}, answers of {told['answer_tokens']} tokens"
        f" (assumed); KV cache {format_bytes(told['kv_cache_bytes_per_chip'])} per chip",
    )]  # fmt: skip
    for name, one in told["phases"].items():
        sent = sum(one["collective_bytes_per_chip"].values())
        what = "a token of every slot" if name == "decode" else "once"
        rows.append((
            f"  {name}",
            f"{format_bytes(one['hbm_bytes_per_chip'])} HBM; {what}: {scaled(one['hbm_traffic_bytes_per_chip'])}B of"
            f" traffic, {scaled(sent)}B sent, at least {format_time(one['roofline_seconds'])} ({one['bound_by']})"
            + (f", {format_time(one['schedule_seconds'])} by the schedule" if "schedule_seconds" in one else ""),
        ))  # fmt: skip
    middle, whole = told["seconds"]["mid"], result.seconds_per_update
    parts = {**middle, "update": whole["mid"] - sum(middle.values())}
    shares = ", ".join(f"{name} {format_time(one)} ({one / whole['mid']:.0%})" for name, one in parts.items())
    spent = " to ".join(format_time(one) for one in sorted((whole["low"], whole["high"])))
    price = result.price.get("usd_per_hour")
    usd = f", ${whole['mid'] / 3600 * price:.3f}" if price else ""
    by = "by the schedule's band" if result.step_seconds else "assumed utilization"
    rows.append(("  per update", f"{spent} ({by}){usd}: {shares}; rewards not counted"))
    return rows


def cost_rows(result: PlanResult) -> list[tuple[str, str]]:
    """Speed, duration and cost of the run."""
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
        rows.append(("Cost", "this slice has no known price; give hardware.usd_per_hour"))
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
    """`1.23 T`, `45.6 G`, …: three digits and an SI prefix, ready for a unit."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if amount >= size:
            return f"{amount / size:.3g} {prefix}" if amount < 999.5 * size else f"{amount / size:.0f} {prefix}"
    return f"{amount:.3g} "


def trained(result: PlanResult) -> str:
    """What is trained, by which objective."""
    teacher = f" from {result.teacher}" if result.teacher else ""
    return result.trained if result.objective == SFT else f"{result.trained}, {result.objective}{teacher}"
