"""Checks of `hardware=`: the slice, its price, what it can hold, and whether JAX found it. Imports no JAX."""

from __future__ import annotations

from gemma4_tpu.config.keys import did_you_mean
from gemma4_tpu.config.machines import HardwareConfig
from gemma4_tpu.config.schema import LoraConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.hardware import GB, LOCAL, SLICES, chip_of, option_name, slice_of
from gemma4_tpu.prices import kind_of, price_of, regions, spoken

LARGE = {"gemma4_31b": 31e9, "gemma4_26b_a4b": 26e9, "gemma4_12b": 12e9}
"""Parameters of the sizes that only large slices can train in full."""


def hardware_problems(hardware: HardwareConfig) -> list[str]:
    """Problems: an unknown slice, contradictory kinds of capacity, a region without prices."""
    messages = []
    if hardware.name != LOCAL and hardware.name not in SLICES:
        hint = did_you_mean(hardware.name, SLICES, lambda name: f"hardware={option_name(name)}")
        messages.append(
            f"hardware.name={hardware.name}: no such slice{hint} (slices: {', '.join([LOCAL, *SLICES])}); several "
            "slices joined by the data-centre network (multi-slice) are not supported"
        )
    if hardware.spot and hardware.flex_start:
        messages.append("hardware.spot=true, hardware.flex_start=true: give one of them")
    if hardware.region is not None and hardware.usd_per_hour is None and hardware.region not in regions():
        hint = did_you_mean(hardware.region, regions(), "hardware.region={}".format)
        messages.append(
            f"hardware.region={hardware.region}: no price is known there{hint}; give hardware.usd_per_hour with it, or "
            f"one of {', '.join(regions())}"
        )
    return messages


def full_problems(hardware: HardwareConfig, lora: LoraConfig, model_name: str, value_bytes: int) -> list[str]:
    """Full fine-tuning of a large size on a slice that may lack the memory.

    `value_bytes`: bytes that training keeps per weight.
    """
    if lora.enabled or model_name not in LARGE:
        return []
    wanted, needed = slice_of(hardware), value_bytes * LARGE[model_name]
    if wanted is not None and wanted.hbm_bytes > needed:
        return []
    there = "" if wanted is None else f", {option_name(wanted.name)} has {wanted.hbm_bytes / GB:,.0f} GB"
    enough = ", ".join(option_name(s.name) for s in SLICES.values() if s.topology and s.hbm_bytes > needed)
    return [
        f"lora.enabled=false: full fine-tuning of model={model_name} takes {needed / GB:,.0f} GB of HBM{there}; give "
        f"lora=default, another model, or hardware=<one of {enough}>"
    ]


def price_warning(hardware: HardwareConfig) -> str | None:
    """A warning if no price is known for a slice; None if one is, or if there is no slice."""
    if slice_of(hardware) is None or price_of(hardware) is not None:
        return None
    where = f" in {hardware.region}" if hardware.region else ""
    kind = spoken(kind_of(hardware))
    return f"no {kind} price is known for {hardware.name}{where}: costs are left out (hardware.usd_per_hour)"


def check_devices(hardware: HardwareConfig, platform: str, device_kind: str, count: int, slices: int = 1) -> None:
    """Compares the requested slice with what JAX found (over all processes).

    Args:
      hardware: what was requested.
      platform: of the devices, as JAX calls it.
      device_kind: of the devices, as JAX calls it.
      count: devices of all processes.
      slices: number of TPU slices.

    Raises:
      UserError: it is another slice (says which, and what to set instead), or there are several slices.
    """
    if slices > 1 and platform == "tpu":
        raise UserError(
            f"JAX found {slices} TPU slices joined by the data-centre network; multi-slice training is not supported: "
            "start the run on one slice"
        )
    wanted = slice_of(hardware)
    if wanted is None:
        return
    chip = chip_of(platform, device_kind)
    if chip is wanted.chip and count == wanted.devices:
        return
    there = [s.name for s in SLICES.values() if chip is s.chip and count == s.devices]
    found = f"{count} × {device_kind}" + (f" ({platform})" if platform.lower() != device_kind.lower() else "")
    raise UserError(
        f"hardware={option_name(wanted.name)} is {wanted.devices} × {wanted.chip.name}, but JAX found {found}; give "
        + "".join(f"hardware={option_name(name)} or " for name in there)
        + "hardware=local (whatever is there)"
    )
