"""Converts the figures of an on-policy update's phases to memory, seconds and what would fit. Imports no JAX."""

from __future__ import annotations

import math
from typing import Any

from gemma4_tpu.config.rollouts import RolloutsConfig
from gemma4_tpu.hardware import GIB
from gemma4_tpu.planning.calibration import Band, ScheduleRates
from gemma4_tpu.planning.planned import Planned
from gemma4_tpu.planning.roofline import PEAKS, roofline
from gemma4_tpu.planning.schedule import from_plain
from gemma4_tpu.planning.walk import walk

PHASES = ("read", "decode", "score")
SCORED_MORE = 2
"""Additional passes over an update's answers whenever sampler and trainer are compared."""
SHARE = 0.95
"""Share of the remaining memory that a cache can take: programs of other shapes need other temporaries."""


def rollouts_of(planned: Planned, answer: dict[str, Any], band: Band | None = None) -> dict[str, Any]:
    """`PlanResult.rollouts`.

    Args:
      planned: the configuration.
      answer: of the compiling process (`answers.Answer`), with `phases`.
      band: of measured over scheduled time; None: by the rooflines, even if there is a schedule.
    """
    config, plan, told = planned.config.rollouts, planned.config.plan, answer["phases"]
    limit, cache = answer["hbm_limit_bytes"], told["kv_cache_bytes"]
    tokens = plan.answer_tokens or config.new_tokens
    found: dict[str, Any] = {"kv_cache_bytes_per_chip": cache, "answer_tokens": tokens}
    if misfit := _misfit(config, told, limit):
        return found | {"misfit": misfit}
    steps = decoding_steps(config, tokens, told["tokens"])
    runs = {
        "read": 1.0,
        "decode": float(steps),
        "score": planned.config.trainer.microbatches * (1 + SCORED_MORE / config.check_every),
    }
    phases = {name: _phase(planned, told[name], told["tokens"] if name == "decode" else 1) for name in PHASES}
    scheduled = band is not None and all("schedule" in told[name] for name in PHASES)
    by = "schedule_seconds" if scheduled else "roofline_seconds"
    if band is not None and scheduled:
        times = {"low": band.high, "high": band.low}
        times["mid"] = (times["low"] + times["high"]) / 2
    else:
        times = {"low": 1 / plan.utilization_low, "high": 1 / plan.utilization_high}
        times["mid"] = 2 / (plan.utilization_low + plan.utilization_high)
    return found | {
        "decoding_steps": steps,
        "idle_slots": 1 - config.prompts * config.samples * tokens / (config.slots * steps),
        "phases": phases,
        "seconds": {
            name: {phase: one[by] * runs[phase] * times[name] for phase, one in phases.items()}
            for name in ("low", "mid", "high")
        },
    }


def decoding_steps(config: RolloutsConfig, tokens: int, segment: int) -> int:
    """Tokens that each slot decodes per update, if all answers have `tokens` tokens.

    A slot waits half a segment, on average, for the next answer.
    """
    answers = config.prompts * config.samples
    return max(math.ceil(answers * (tokens + segment / 2) / config.slots), tokens)


def _phase(planned: Planned, told: dict[str, Any], tokens: int) -> dict[str, Any]:
    """What one run of a phase takes on one chip; for decoding, per token of every slot."""
    counts, scheduled = told["counts"], {}
    if "schedule" in told:
        walked = walk(from_plain(told["schedule"]), ScheduleRates.of(planned.checked.slice))
        scheduled["schedule_seconds"] = walked.seconds / tokens
    seconds = roofline(
        planned.checked.slice, counts["flops"] / tokens, counts["hbm_traffic_bytes"] / tokens,
        {kind: {key: value / tokens for key, value in one.items()} for kind, one in counts["collectives"].items()},
        {way: size / tokens for way, size in counts["link_bytes"].items()},
    )  # fmt: skip
    return {
        "hbm_bytes_per_chip": told["peak_bytes"],
        "flops_per_chip": counts["flops"] / tokens,
        "hbm_traffic_bytes_per_chip": counts["hbm_traffic_bytes"] / tokens,
        "collective_bytes_per_chip": {kind: one["bytes"] / tokens for kind, one in counts["collectives"].items()},
        "roofline_seconds": seconds["update"],
        "bound_by": max(PEAKS, key=lambda peak: seconds[peak]),
        **scheduled,
    }


def _misfit(config: RolloutsConfig, told: dict[str, Any], limit: int) -> str | None:
    """The first phase that does not fit into a chip's HBM, and what would."""
    for name in PHASES:
        needed = told[name].get("peak_bytes") or told[name].get("needed_bytes")
        if "peak_bytes" in told[name] and needed <= limit:
            continue
        how_much = "more" if needed is None else f"{needed / GIB:.1f} GiB"
        better = _advice(name, config, told, limit, needed)
        return f"to {name} needs {how_much}, there are {limit / GIB:.2f} GiB of HBM per chip; {better}"
    return None


def _advice(name: str, config: RolloutsConfig, told: dict[str, Any], limit: int, needed: int | None) -> str:
    if name == "read":
        return f"give fewer rollouts.prompts (now {config.prompts}) or a smaller rollouts.prompt_tokens"
    if name == "score":
        return "give more trainer.microbatches, or a larger mesh.tp"
    each = told["kv_cache_bytes"] / config.slots
    fitting = 0 if needed is None else math.floor(SHARE * (limit - (needed - told["kv_cache_bytes"])) / each)
    if fitting < 1:
        return "weights and what is next to them leave no room for a cache: give a larger mesh.tp or slice"
    slots = min(fitting, config.slots - 1)
    return f"give rollouts.slots={slots} (each takes {each / 2**20:,.0f} MiB), or a larger mesh.tp"
