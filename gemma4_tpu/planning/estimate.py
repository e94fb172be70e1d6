"""Converts the compiler's figures to seconds and dollars: rooflines, the schedule's band, prices. Imports no JAX."""

from __future__ import annotations

import heapq
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gemma4_tpu.models.flops import train_flops_per_token
from gemma4_tpu.planning.calibration import BAND, Band
from gemma4_tpu.planning.kernels import Mask
from gemma4_tpu.planning.money import chosen_price, chosen_usd, preemptions, usd_estimate
from gemma4_tpu.planning.own_runs import band_of_runs
from gemma4_tpu.planning.phase_times import rollouts_of
from gemma4_tpu.planning.planned import Planned
from gemma4_tpu.planning.roofline import PEAKS, roofline
from gemma4_tpu.planning.schedule import COLLECTIVES, PARTS
from gemma4_tpu.planning.walk import Walked
from gemma4_tpu.step.objective_kinds import SFT

TOP = 10
"""Number of operations that a plan lists."""


@dataclass(frozen=True, kw_only=True)
class PlanResult:
    """Contents of `plan.json`. Everything except `hbm_limit_bytes_per_chip` is estimated; `estimated_by` says
    by what.
    """

    fits: bool
    """Whether the compiler found room for the step in HBM."""
    slice: str
    """The slice planned for, such as `v5p-8`."""
    chips: int
    model: str
    trained: str
    """`lora r=64`, `qlora nf4 r=64`, `full`."""
    objective: str = SFT  # plans made before other objectives existed lack it
    """`objective.kind`."""
    teacher: str | None = None
    """Architecture of the objective's teacher, if it has one."""
    lora_rank: int | None = None
    """Rank of the adapters; None: full fine-tuning."""
    mesh: dict[str, int]
    """Sizes of the axes `dp`, `fsdp` and `tp`."""
    remat: str
    """The compiled policy (the one that `auto` chose)."""
    flags: str = "none"  # plans made before flags existed lack it
    """`hardware.flags`."""
    sequence_length: int
    """T, in tokens."""
    rows_per_update: int
    """Rows of T tokens, over all chips."""
    microbatches: int
    hbm_limit_bytes_per_chip: int
    """HBM that the compiler lets a program use."""
    hbm_bytes_per_chip: int | None
    """Arguments and temporaries at their peak, as the compiler compares them with the limit."""
    hbm_parts_bytes_per_chip: dict[str, int] = field(default_factory=dict)
    """`base` weights, `lora` (`weights` in full fine-tuning), `optimizer` state, `average` (with `trainer.ema_decay`),
    an objective's `reference` or `teacher`, `batch` (tokens, counters and layout padding), `temporaries` (activations
    and work space).
    """
    flops_per_chip: float | None = None
    """FLOPs of one update: products, kernels and elementwise work, corrected for loops."""
    flops_parts_per_chip: dict[str, float] = field(default_factory=dict)
    """`matmul`, `kernel` (attention, in the blocks that it visits), `other` (elementwise)."""
    attention_blocks_visited: dict[str, float] = field(default_factory=dict)
    """By mask, `global` or `window …`: the share of its blocks in which two tokens of one example meet. The kernels
    skip the others.
    """
    analytic_flops_per_chip: float | None = None
    """FLOPs that the model's mathematics needs for the real tokens of an update, without rematerialisation."""
    flops_over_analytic: float | None = None
    """Their ratio: padding, rematerialisation, and blocks of the attention kernels that no token needs."""
    hbm_traffic_bytes_per_chip: float | None = None
    """Bytes read from and written to HBM in one update, corrected for loops; excludes arrays in on-chip memory,
    includes blocks that kernels read again and, with a schedule, what products read again.
    """
    hbm_read_again_bytes_per_chip: float | None = None
    """Of these, what products read more than once, window by window; known with a schedule."""
    bytes_accessed_per_chip: float | None = None
    """By XLA's convention of `bytes accessed` (any memory, kernels once), corrected for loops."""
    collectives: dict[str, dict[str, float]] = field(default_factory=dict)
    """Kind → `count`, and `bytes` that a chip sends, in one update."""
    flops_per_real_token_and_chip: float | None = None
    hbm_traffic_bytes_per_real_token_and_chip: float | None = None
    bytes_accessed_per_real_token_and_chip: float | None = None
    real_tokens_per_update: float | None = None
    """Mean over the run, over all chips."""
    fill: float | None = None
    """Real tokens over the slots of an update."""
    updates: int | None = None
    """Number of updates of the configured run."""
    data: str = ""
    """Source of the lengths: `measured: …` or `assumed: …`."""
    roofline_seconds: dict[str, float] = field(default_factory=dict)
    """Lower bounds for one update: `compute`, `hbm`, `interconnect`, each at its peak, and `update`, the largest of
    them.
    """
    bound_by: str | None = None
    """The largest of the three."""
    step_seconds: float | None = None
    """One update by the compiler's schedule; None without one."""
    step_seconds_low: float | None = None
    step_seconds_high: float | None = None
    """The schedule times the band of measured over scheduled time (`planning/calibration.py`)."""
    step_band: dict[str, Any] = field(default_factory=dict)
    """That band: `low`, `high`, `source`."""
    step_parts: dict[str, float] = field(default_factory=dict)
    """Seconds of `step_seconds` by part (`schedule.PARTS`), which add up to it; and `collectives_hidden`, which overlap
    with the core.
    """
    top_operations: list[dict[str, Any]] = field(default_factory=list)
    """The ten on which the core spends most: `seconds`, `share` of the step, `times`, `part`, `operation`, `source`."""
    utilization: dict[str, float] = field(default_factory=dict)
    """Share of the binding roofline that is reached: `low`, `mid`, `high`, at the ends of the schedule's band and in
    between (without a schedule, `plan.utilization_low` and `plan.utilization_high`); with a schedule also its own share
    of the three peaks: `schedule_compute`, `schedule_hbm`, `schedule_interconnect`.
    """
    seconds_per_update: dict[str, float] = field(default_factory=dict)
    """At each utilization; rows shorter than T in proportion; including the `rollouts` before it."""
    real_tokens_per_second: dict[str, float] = field(default_factory=dict)
    """At each utilization, over all chips."""
    hours: dict[str, float] = field(default_factory=dict)
    """All updates of the run, at each utilization; without compilation, evaluation and checkpoints."""
    usd_estimate: dict[str, dict[str, float]] = field(default_factory=dict)
    """`on_demand`, `spot` and `flex_start` where a price is known, or `configured`: dollars at each utilization. Spot
    includes the expected preemptions.
    """
    rollouts: dict[str, Any] = field(default_factory=dict)
    """For an on-policy objective, what precedes each update: `phases` (`read`, `decode`, `score`; each with
    `hbm_bytes_per_chip`, including everything else in HBM, `flops_per_chip`, `hbm_traffic_bytes_per_chip`,
    `collective_bytes_per_chip`, `roofline_seconds`, `bound_by` and, by the compiler's schedule, `schedule_seconds`; for
    `decode`, per token of every slot), `kv_cache_bytes_per_chip`, `answer_tokens` (assumed), `decoding_steps` per
    update, `idle_slots` (share of slots without an answer in progress, over these steps), and `seconds` of each phase
    per update at both ends of the schedule's band and in between (without a schedule, at each utilization that `plan`
    assumes); or `misfit`, in words. Excludes judging.
    """
    usd_per_million_real_tokens: float | None = None
    """At the middle utilization and the price that the configuration selects."""
    price: dict[str, Any] = field(default_factory=dict)
    """That price: `usd_per_hour`, `date`, `source`, `kind`, `region`."""
    preemptions: dict[str, float] = field(default_factory=dict)
    """Assumed for spot capacity, over the longest of `hours`: the `expected` number, and the `hours_lost` to them."""
    lowering_seconds: float | None = None
    compile_seconds: float | None = None
    """Measured on this machine: until memory was assigned or, with a schedule, to the end."""
    compiled_before: bool = False
    """The program was cached by another plan, whose time `compile_seconds` gives."""
    cost_analysis: dict[str, float] = field(default_factory=dict)
    """XLA's own `flops` and `bytes_accessed`, with loops counted once and kernels not at all; with a schedule."""
    not_counted: list[str] = field(default_factory=list)
    """Kernels and loops that the counts could not interpret."""
    message: str = ""
    """Why it does not fit, in the compiler's figures."""
    alternatives: list[dict[str, Any]] = field(default_factory=list)
    """If it does not fit, the changes tried: `overrides`, `fits`, `hbm_bytes_per_chip`,
    `usd_per_million_real_tokens`.
    """
    estimated_by: dict[str, str] = field(default_factory=dict)
    """Group of keys → how they were obtained."""
    versions: dict[str, str] = field(default_factory=dict)
    """`jax` and `libtpu`."""


ESTIMATED_BY = {
    "hbm": "the memory that the TPU compiler assigns to the whole step, compiled without a TPU",
    "flops, traffic, collectives": "counted in the compiled program; attention kernels from the blocks that they visit",
    "rollouts": "memory and counts of the compiled phases; seconds like the update's; an assumed length of answers",
    "roofline": "the counts over the chip's published peaks; each collective over the links of its own mesh axis",
    "seconds, hours, dollars": "the compiler's schedule times a band of measured over scheduled time, or without a"
    " schedule the largest roofline over the assumed utilization; no measurement of this run on a TPU",
}


def estimate(planned: Planned, answer: dict[str, Any], walked: Walked | None = None) -> PlanResult:
    """All figures of a step that fits.

    Args:
      planned: configuration, slice, mesh, and the result of packing its data.
      answer: from the compiling process (`answers.Answer`).
      walked: the time of its schedule.
    """
    compiled, fill = answer["compiled"], planned.fill
    counts, counted, parts = compiled["counts"], _counted(planned, compiled["counts"]), _memory_parts(compiled)
    seconds = roofline(
        planned.checked.slice, counted["flops_per_chip"], counted["hbm_traffic_bytes_per_chip"], counts["collectives"],
        counts["link_bytes"],
    )  # fmt: skip
    band = band_of(planned) if walked is not None else None
    rollouts = rollouts_of(planned, answer, band) if "phases" in answer else {}
    return PlanResult(
        fits="misfit" not in rollouts,
        rollouts=rollouts,
        **planned.recipe.described(),
        estimated_by=ESTIMATED_BY,
        hbm_limit_bytes_per_chip=answer["hbm_limit_bytes"],
        hbm_bytes_per_chip=sum(parts.values()),
        hbm_parts_bytes_per_chip=parts,
        **counted,
        hbm_read_again_bytes_per_chip=counts["hbm_read_again_bytes"] if walked is not None else None,
        real_tokens_per_update=fill.real_tokens_per_update,
        fill=fill.fill,
        updates=fill.updates,
        data=fill.source,
        roofline_seconds=seconds,
        bound_by=max(PEAKS, key=lambda peak: seconds[peak]),
        **(_by_schedule(walked, band) if walked is not None and band is not None else {}),
        **_time_and_money(planned, seconds, walked, rollouts.get("seconds", {})),
        lowering_seconds=answer["lowering_seconds"],
        compile_seconds=answer["compile_seconds"],
        compiled_before=answer.get("kept", False),
        cost_analysis=compiled["cost_analysis"],
        not_counted=counts["not_counted"],
        versions=answer["versions"],
    )


def _counted(planned: Planned, counts: dict[str, Any]) -> dict[str, Any]:
    """FLOPs, bytes and collectives of one update, without the blocks that kernels skip."""
    recipe, fill, devices = planned.recipe, planned.fill, planned.checked.slice.devices
    masks = [(Mask(one["window"], one["block_q"], one["block_kv"]), one["flops"]) for one in counts["attention"]]
    visited = {mask: fill.share_visited(mask, recipe.length) for mask, _ in masks}
    skipped = sum(flops * (1 - visited[mask]) for mask, flops in masks)
    flops, traffic = counts["flops"] - skipped, counts["hbm_traffic_bytes"] + counts["hbm_read_again_bytes"]
    tokens, accessed = fill.real_tokens_per_update, counts["bytes_accessed"]
    per_token = train_flops_per_token(
        recipe.arch, recipe.lora, fill.segment_tokens, bool(recipe.new_tokens), recipe.beside
    )
    analytic = per_token * tokens / devices
    return {
        "flops_per_chip": flops,
        "flops_parts_per_chip": {
            "matmul": counts["matmul_flops"],
            "kernel": counts["kernel_flops"] - skipped,
            "other": counts["other_flops"],
        },
        "attention_blocks_visited": {
            "global" if mask.window is None else f"window {mask.window}": share for mask, share in visited.items()
        },
        "analytic_flops_per_chip": analytic,
        "flops_over_analytic": flops / analytic,
        "hbm_traffic_bytes_per_chip": traffic,
        "bytes_accessed_per_chip": accessed,
        "collectives": counts["collectives"],
        "flops_per_real_token_and_chip": flops / tokens,
        "hbm_traffic_bytes_per_real_token_and_chip": traffic / tokens,
        "bytes_accessed_per_real_token_and_chip": accessed / tokens,
    }


def band_of(planned: Planned) -> Band:
    """The band of measured over scheduled time: from `plan.calibration` if given, else the published one.

    Raises:
      UserError: those runs say nothing about this chip.
    """
    own = planned.config.plan.calibration
    return BAND if own is None else band_of_runs(Path(own), planned.checked.slice.chip)


def _by_schedule(walked: Walked, band: Band) -> dict[str, Any]:
    """The figures that come from a schedule."""
    seconds = walked.seconds
    return {
        "step_seconds": seconds,
        "step_seconds_low": seconds * band.low,
        "step_seconds_high": seconds * band.high,
        "step_band": asdict(band),
        "step_parts": {
            **{part: walked.parts[part] for part in PARTS},
            "collectives_hidden": walked.hidden[COLLECTIVES],
        },
        "top_operations": [
            {
                "seconds": spent,
                "share": spent / seconds,
                "times": walked.times[operation],
                "part": operation[0],
                "operation": operation[1],
                "source": operation[2],
            }
            for operation, spent in heapq.nlargest(TOP, walked.operations.items(), key=lambda one: one[1])
        ],
    }


def utilizations(planned: Planned, seconds: dict[str, float], walked: Walked | None) -> dict[str, float]:
    """`low`, `mid` and `high`: shares of the binding roofline that an update reaches in `seconds`."""
    if walked is None:
        low, high = planned.config.plan.utilization_low, planned.config.plan.utilization_high
        return {"low": low, "mid": (low + high) / 2, "high": high}
    reached = {f"schedule_{peak}": seconds[peak] / walked.seconds for peak in PEAKS}
    whole = seconds["update"] / walked.seconds
    band = band_of(planned)
    between = (band.low + band.high) / 2
    return {"low": whole / band.high, "mid": whole / between, "high": whole / band.low, **reached}


def _time_and_money(
    planned: Planned, seconds: dict[str, float], walked: Walked | None, rollouts: dict[str, dict[str, float]]
) -> dict[str, Any]:
    config, fill, reached = planned.config, planned.fill, utilizations(planned, seconds, walked)
    per_update = {
        name: seconds["update"] * fill.length_share / reached[name] + sum(rollouts.get(name, {}).values())
        for name in ("low", "mid", "high")
    }
    rate = {name: fill.real_tokens_per_update / value for name, value in per_update.items()}
    hours = {name: value * fill.updates / 3600 for name, value in per_update.items()}
    dollars = usd_estimate(config.hardware, config.plan, config.checkpoint, hours, fill.updates)
    middle = chosen_usd(config.hardware, dollars).get("mid")
    return {
        "utilization": reached,
        "seconds_per_update": per_update,
        "real_tokens_per_second": rate,
        "hours": hours,
        "usd_estimate": dollars,
        "usd_per_million_real_tokens": middle / fill.updates / fill.real_tokens_per_update * 1e6 if middle else None,
        "price": chosen_price(config.hardware),
        "preemptions": preemptions(config.plan, config.checkpoint, max(hours.values()), fill.updates),
    }


def _memory_parts(compiled: dict[str, Any]) -> dict[str, int]:
    """HBM of one chip by what it holds."""
    named = {kind: size for kind, size in compiled["held"].items() if kind != "batch"}
    rest = compiled["argument_bytes"] - sum(named.values())
    return {**named, "batch": max(rest, 0), "temporaries": compiled["peak_bytes"] - compiled["argument_bytes"]}
