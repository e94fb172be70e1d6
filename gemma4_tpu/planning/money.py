"""From hours to dollars: prices by kind of capacity, and the expected cost of preemptions. Imports no JAX."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from gemma4_tpu.config.machines import HardwareConfig
from gemma4_tpu.config.outputs import CheckpointConfig
from gemma4_tpu.config.tasks import PlanConfig
from gemma4_tpu.hardware import slice_of
from gemma4_tpu.prices import FLEX_START, KINDS, SPOT, Price, flex_start_hours, kind_of, price_of, slice_price

CONFIGURED = "configured"
"""Kind of a price that the configuration sets."""


def usd_estimate(
    hardware: HardwareConfig, plan: PlanConfig, checkpoint: CheckpointConfig, hours: Mapping[str, float], updates: int
) -> dict[str, dict[str, float]]:
    """Kind of capacity → dollars of a run, for each entry of `hours`; spot includes expected preemptions.

    If `hardware.usd_per_hour` is set, it is the only one, as `configured`. Flex-start is omitted if the run can exceed
    its time limit.
    """

    def paid(price: Price, each: float) -> float:
        lost = preemptions(plan, checkpoint, each, updates)["hours_lost"] if price.kind == SPOT else 0.0
        return (each + lost) * price.usd_per_hour

    return {
        name: {key: paid(price, each) for key, each in hours.items()}
        for name, price in _prices(hardware).items()
        if name != FLEX_START or max(hours.values()) <= flex_start_hours()
    }


def chosen_usd(hardware: HardwareConfig, estimates: Mapping[str, Mapping[str, float]]) -> Mapping[str, float]:
    """The entry of `usd_estimate` at the price that the configuration selects; empty if none is known."""
    return estimates.get(CONFIGURED) or estimates.get(kind_of(hardware), {})


def chosen_price(hardware: HardwareConfig) -> dict[str, Any]:
    """The price that the configuration selects, as a record; empty if none is known."""
    price = price_of(hardware)
    return {} if price is None else asdict(price)


def preemptions(plan: PlanConfig, checkpoint: CheckpointConfig, hours: float, updates: int) -> dict[str, float]:
    """Expected preemptions of spot capacity in a run of `hours` hours.

    The rate is assumed (`plan.hours_between_preemptions`). Each costs a restart (`plan.restart_minutes`) and half the
    interval between checkpoints. This is pessimistic: if the notice suffices to save, only the restart is lost.
    """
    expected = hours / plan.hours_between_preemptions
    checkpoint_hours = min(checkpoint.every, updates) * hours / updates
    each = plan.restart_minutes / 60 + checkpoint_hours / 2
    return {"expected": expected, "hours_lost": expected * each}


def _prices(hardware: HardwareConfig) -> dict[str, Price]:
    chosen, wanted = price_of(hardware), slice_of(hardware)
    if chosen is not None and hardware.usd_per_hour is not None:
        return {CONFIGURED: chosen}
    known = {kind: slice_price(wanted, kind, hardware.region) for kind in KINDS} if wanted is not None else {}
    return {kind: price for kind, price in known.items() if price is not None}
