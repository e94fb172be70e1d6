"""Compiler flags of a run: `hardware.flags`, a preset per chip, and `hardware.compiler_options`. Imports no JAX.

Planning and training use `compiler_options` alone. `docs/planning.md` lists what each preset gains by the compiler's
schedule.
"""

from __future__ import annotations

from typing import Any

from gemma4_tpu.config.machines import HardwareConfig
from gemma4_tpu.hardware import slice_of

_REDUCE_SCATTER = {
    "xla_tpu_use_minor_sharding_for_major_trivial_input": True,
    "xla_tpu_relayout_group_size_threshold_for_reduce_scatter": 1,
    "xla_tpu_assign_all_reduce_scatter_layout": True,
}
"""Layouts that turn an all-reduce of which each chip keeps a slice into a reduce-scatter."""
_ASYNCHRONOUS_GATHERS = {
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
}
"""Gathers that overlap with products; neither flag does anything alone."""
_ON_CHIP_MEMORY = {"xla_tpu_scoped_vmem_limit_kib": 48 * 1024}
"""More than the default allows larger windows in products."""
TUNED: dict[str, dict[str, Any]] = {
    "tpu7x": {**_REDUCE_SCATTER, **_ASYNCHRONOUS_GATHERS, **_ON_CHIP_MEMORY},
    "v5p": {**_REDUCE_SCATTER, **_ASYNCHRONOUS_GATHERS, **_ON_CHIP_MEMORY},
    "v6e": {**_REDUCE_SCATTER, **_ASYNCHRONOUS_GATHERS},
    "v5e": {**_REDUCE_SCATTER, **_ASYNCHRONOUS_GATHERS},
}
"""`hardware.flags=tuned` by chip. More on-chip memory pays on tpu7x and v5p, but not on v6e."""


def compiler_options(hardware: HardwareConfig) -> dict[str, Any]:
    """The chip's preset, if requested, overridden by explicit options."""
    known = slice_of(hardware)
    preset = TUNED.get(known.chip.name, {}) if known is not None and hardware.flags == "tuned" else {}
    return {**preset, **hardware.compiler_options}
