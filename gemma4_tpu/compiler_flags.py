"""Compiler flags of a run: `hardware.flags`, a preset of its chip, and `hardware.compiler_options`. No JAX.

Planning and training take theirs from `compiler_options` alone. What each preset gains by the compiler's schedule:
`docs/planning.md`.
"""

from __future__ import annotations

from typing import Any

from gemma4_tpu.config.schema import HardwareConfig
from gemma4_tpu.hardware import slice_of

_REDUCE_SCATTER = {
    "xla_tpu_use_minor_sharding_for_major_trivial_input": True,
    "xla_tpu_relayout_group_size_threshold_for_reduce_scatter": 1,
    "xla_tpu_assign_all_reduce_scatter_layout": True,
}
"""Layouts with which an all-reduce of which each chip keeps a slice becomes a reduce-scatter."""
_ASYNCHRONOUS_GATHERS = {
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
}
"""Gathers beside products; neither does anything alone."""
TUNED: dict[str, dict[str, Any]] = {"v5p": {**_REDUCE_SCATTER, **_ASYNCHRONOUS_GATHERS}}
"""`hardware.flags=tuned` by chip."""


def compiler_options(hardware: HardwareConfig) -> dict[str, Any]:
    """The preset, where it is asked for, and over it what is given by name."""
    preset = TUNED.get(_chip(hardware), {}) if hardware.flags == "tuned" else {}
    return {**preset, **hardware.compiler_options}


def flags_problem(hardware: HardwareConfig) -> list[str]:
    """A message where a preset is asked for that there is not."""
    if hardware.flags != "tuned" or _chip(hardware) in TUNED:
        return []
    known = ", ".join(sorted(TUNED))
    return [
        f"hardware.flags=tuned: no preset for {hardware.name}, only for {known}; give hardware.flags=none, and "
        "hardware.compiler_options for single flags"
    ]


def _chip(hardware: HardwareConfig) -> str:
    known = slice_of(hardware)
    return known.chip.name if known is not None else hardware.name
