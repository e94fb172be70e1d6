"""From hours to dollars: prices by kind of capacity, and what preemptions are expected to add. No JAX here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from gemma4_tpu.config.schema import CheckpointConfig, HardwareConfig
from gemma4_tpu.config.tasks import PlanConfig
from gemma4_tpu.hardware import slice_of
from gemma4_tpu.prices import FLEX_START, KINDS, SPOT, Price, flex_start_hours, kind_of, price_of, slice_price

CONFIGURED = "configured"
"""The kind of a price that the configuration gives."""


def usd_estimate(
    hardware: HardwareConfig, plan: PlanConfig, checkpoint: CheckpointConfig, hours: Mapping[str, float], updates: int
) -> dict[str, dict[str, float]]:
    """Kind of capacity → dollars of a run, under the names of `hours`; spot with the preemptions to expect.

    Where `hardware.usd_per_hour` is given, it alone counts, as `configured`. Flex-start is left out where the run may
    take longer than such capacity stays.
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
    """Of `usd_estimate` that at the price which the configuration selects; empty where none is known."""
    return estimates.get(CONFIGURED) or estimates.get(kind_of(hardware), {})


def chosen_price(hardware: HardwareConfig) -> dict[str, Any]:
    """The price that the configuration selects, as a record; empty where none is known."""
    price = price_of(hardware)
    return {} if price is None else asdict(price)


def preemptions(plan: PlanConfig, checkpoint: CheckpointConfig, hours: float, updates: int) -> dict[str, float]:
    """What to expect of spot capacity in a run of so many hours.

    At a rate that is assumed (`plan.hours_between_preemptions`). Each costs a restart (`plan.restart_minutes`) and half
    the time between two checkpoints. That is much: where the notice suffices to save, only the restart is lost.
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
